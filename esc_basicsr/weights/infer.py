"""Telling which network weights belong to, by their keys and shapes."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from esc_basicsr.archs.upsamplers import UPSAMPLERS
from esc_basicsr.common.errors import UserError

__all__ = ["infer_network_options", "network_options", "scale_of_to_img", "without_prefix"]

# Where trainers keep the network among others; what begins otherwise is then of another network.
_PREFIXES = ("net_g.", "generator.", "model.", "network.", "net.")


def infer_network_options(weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Tell which network a state dict belongs to, by its keys and shapes.

    Args:
        weights: Parameters by name, with a trainer's prefix or without.

    Returns:
        ``network_g``: the registered ``type`` and constructor options, those with a default only where they
        differ from it; None if these are not weights of a network of this package.
    """
    try:
        return _infer(without_prefix(weights))
    except (KeyError, ValueError, ArithmeticError, AttributeError, IndexError):
        return None


def network_options(weights: Mapping[str, Tensor], source: object) -> dict[str, Any]:
    """Tell which network weights belong to, as `infer_network_options` does.

    Raises:
        UserError: They are of none of this package: which they resemble.
    """
    options = infer_network_options(weights)
    if options is not None:
        return options
    weights = without_prefix(weights)
    if "plk_filter" in weights and any(key.startswith("blocks.0.pconvs.") for key in weights):
        meta = weights.get("to_img.MetaUpsample")
        known = meta is not None and meta.numel() == 7 and int(meta[1]) < len(UPSAMPLERS)
        names = [UPSAMPLERS[int(meta[1])]] if known and meta is not None else []
        own = sorted({key.split(".")[0] for key in weights} - {"blocks"})
        raise UserError(
            f"{source}: weights of another trainer's variant of ESC, which this package does not have "
            f"({', '.join([*names, *own])}): run them in the program that they were trained with."
        )
    raise UserError(f"{source}: these are not weights of an ESC network.")


def without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take a trainer's prefix off the names of parameters, and leave out those of its other networks."""
    for prefix in _PREFIXES:
        inner = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if inner:
            return without_prefix(inner)
    return dict(weights)


def _infer(weights: dict[str, Tensor]) -> dict[str, Any]:
    is_real = any(re.match(r"skip\.\d\.weight", key) for key in weights)
    is_fp = "lk_spatial" in weights
    proj = weights["proj.weight"] if "proj.weight" in weights else weights["proj.1.weight"]
    dim, channels = proj.shape[:2]
    first = "blocks.0."
    unshared = f"{first}pconvs.0.plk_filter"
    options: dict[str, Any] = {"type": "ESCFP" if is_fp else "ESC", "dim": dim}
    large = weights["lk_spatial"] if is_fp else weights.get("plk_filter", weights.get(unshared))
    if large is not None:
        options |= {"pdim": large.shape[0], "kernel_size": large.shape[-1]}
    options["n_blocks"] = _count(weights, r"blocks\.(\d{1,6})\.")
    options["conv_blocks"] = _count(weights, r"blocks\.0\.pconvs\.(\d{1,6})\.")
    if options["n_blocks"] * options["conv_blocks"] > len(weights):
        raise KeyError("blocks")
    bias = weights.get(f"{first}attn.relative_position_bias")
    if bias is not None:
        options |= {"window_size": (math.isqrt(bias.shape[1]) + 1) // 2, "num_heads": bias.shape[0]}
    hidden = weights[f"{first}convffns.0.proj.weight"].shape[0]
    ratio = hidden / dim
    options["exp_ratio"] = ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)
    if is_real:
        return options | _infer_real(weights, channels)
    if channels != 3:
        options |= {"in_channels": channels, "out_channels": channels}
    scale = scale_of_to_img(weights["to_img.bias"], channels)
    if scale is None:
        raise KeyError("to_img.bias")
    options["upscaling_factor"] = scale
    if is_fp:
        return options
    if f"{first}lns.0.weight" in weights:
        options["use_ln"] = True
    if f"{first}pconvs.0.attn.to_qkv.weight" in weights:
        return options | {"token_mixer": "attention"}
    if bias is None:
        options["token_mixer"] = "conv_attention"
    if unshared in weights:
        options["share_large_kernel"] = False
    if f"{first}pconvs.0.plk.dwc_proj.1.weight" not in weights:
        options["dynamic_kernel"] = False
    return options


def _infer_real(weights: dict[str, Tensor], channels: int) -> dict[str, Any]:
    """Tell what ESCReal and ESCRealM have beside the others' options."""
    meta = weights.get("to_img.MetaUpsample")
    if meta is None:
        last = weights["to_img.end_conv.weight" if "to_img.offset.weight" in weights else "to_img.8.weight"]
        options: dict[str, Any] = {"type": "ESCReal", "upscaling_factor": 4}
        if "to_img.offset.weight" in weights:
            options["use_dysample"] = True
        return options | _channels(channels, last.shape[0])
    _, upsampler, scale, _, out_channels, mid_dim, _ = meta.tolist()
    is_unshuffled = "proj.1.weight" in weights  # a first convolution behind a pixel unshuffle
    unshuffle = math.isqrt(channels // out_channels) if is_unshuffled else 1
    if is_unshuffled and (unshuffle not in (2, 4) or channels != out_channels * unshuffle**2):
        raise KeyError("proj.1.weight")
    options = {
        "type": "ESCRealM",
        "upscaling_factor": scale // unshuffle,
        "upsampler": UPSAMPLERS[upsampler],
        "mid_dim": mid_dim,
    }
    if not is_unshuffled and scale <= 2:
        options["unshuffle_mod"] = False
    return options | _channels(channels // unshuffle**2, out_channels)


def _channels(in_channels: int, out_channels: int) -> dict[str, int]:
    options = {"in_channels": in_channels, "out_channels": out_channels}
    return {key: channels for key, channels in options.items() if channels != 3}


def _count(keys: Iterable[str], pattern: str) -> int:
    """Count the indices that keys have, which go from 0 without a gap."""
    indices = {int(match[1]) for key in keys if (match := re.match(pattern, key))}
    if indices != set(range(len(indices))):
        raise KeyError(pattern)
    return len(indices)


def scale_of_to_img(to_img_bias: Tensor, channels: int = 3) -> int | None:
    """Tell the scale by the bias of ``to_img``, (channels·scale²,); None if it is of no scale."""
    scale = math.isqrt(to_img_bias.numel() // channels)
    return scale if scale and channels * scale**2 == to_img_bias.numel() else None
