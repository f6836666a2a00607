"""Telling which network weights belong to, by their keys and shapes."""

import math
import re
from typing import Any

from torch import Tensor

__all__ = ["infer_network_options", "scale_of_to_img"]


def infer_network_options(weights: dict[str, Tensor]) -> dict[str, Any] | None:
    """Tell which network a state dict belongs to, by its keys and shapes.

    Args:
        weights: Parameters by name.

    Returns:
        ``network_g``: the registered ``type`` and constructor options, those of an ablation only where they
        differ from the default; None if these are not weights of an ESC network.
    """
    try:
        return _infer(weights)
    except (KeyError, ValueError, ArithmeticError, AttributeError, IndexError):
        return None


def _infer(weights: dict[str, Tensor]) -> dict[str, Any]:
    dim = weights["proj.weight"].shape[0]
    first = "blocks.0."
    is_fp = "lk_spatial" in weights
    unshared = f"{first}pconvs.0.plk_filter"
    options: dict[str, Any] = {"type": "ESCFP" if is_fp else "ESC", "dim": dim}
    large = weights["lk_spatial"] if is_fp else weights.get("plk_filter", weights.get(unshared))
    if large is not None:
        options |= {"pdim": large.shape[0], "kernel_size": large.shape[-1]}
    options["n_blocks"] = 1 + max(int(m[1]) for k in weights if (m := re.match(r"blocks\.(\d{1,6})\.", k)))
    options["conv_blocks"] = 1 + max(
        int(m[1]) for k in weights if (m := re.match(r"blocks\.0\.pconvs\.(\d{1,6})\.", k))
    )
    bias = weights.get(f"{first}attn.relative_position_bias")
    if bias is not None:
        options |= {"window_size": (math.isqrt(bias.shape[1]) + 1) // 2, "num_heads": bias.shape[0]}
    hidden = weights[f"{first}convffns.0.proj.weight"].shape[0]
    ratio = hidden / dim
    options["exp_ratio"] = ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)
    scale = scale_of_to_img(weights["to_img.bias"])
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


def scale_of_to_img(to_img_bias: Tensor) -> int | None:
    """Tell the scale by the bias of ``to_img``, (3·scale²,); None if it is of no scale."""
    scale = math.isqrt(to_img_bias.numel() // 3)
    return scale if scale and 3 * scale**2 == to_img_bias.numel() else None
