"""Loading weights into a network, converting them where they are of another scale."""

import math
import os
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.variants import build_on_meta
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.weights.infer import infer_network_options, network_options, scale_of_to_img, without_prefix
from esc_basicsr.weights.shown import shown

__all__ = ["build_fitting", "check_fit", "load_weights", "rescale_to_img"]

# how many keys an error message lists of each kind
_LISTED = 6


def rescale_to_img(parameter: Tensor, scale: int) -> Tensor:
    """Convert ``to_img``'s weight or bias to another scale.

    Seen as an a×a image for each colour (and feature, kernel row, kernel column) it is resized to b×b
    bilinearly: neighbouring sub-pixels have similar filters, so this starts ×3 and ×4 from ×2 (release).

    Args:
        parameter: Weight or bias of the convolution at scale a.
        scale: The scale b wanted.

    Shape:
        parameter: (3·a², ...). Output: (3·b², ...).
    """
    rest = parameter.shape[1:]
    old = math.isqrt(parameter.shape[0] // 3)
    # [(3 a a), ...] -> [3, rest, a, a]
    images = parameter.reshape(3, old, old, -1).permute(0, 3, 1, 2)
    images = F.interpolate(images.float(), size=(scale, scale), mode="bilinear", align_corners=False)
    return images.permute(0, 2, 3, 1).reshape(3 * scale**2, *rest).to(parameter.dtype)


def build_fitting(
    weights: dict[str, Tensor], source: str | os.PathLike[str]
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network that weights belong to, for evaluation; they are not loaded yet.

    Nothing of a size that the file tells is made before every parameter was found in it.

    Args:
        weights: Parameters by name, as `read_weights` gives them.
        source: Where they come from, for messages.

    Returns:
        The network, on the CPU, and its ``network_g``.

    Raises:
        UserError: They are of no network of this package.
    """
    options = network_options(weights, source)
    try:
        network = build_on_meta(options)
    except ValueError as error:
        raise UserError(f"{source}: these are not weights of an ESC network: {error}") from error
    check_fit(network, weights, source)
    return network.to_empty(device="cpu").eval().requires_grad_(False), options


def load_weights(
    net: nn.Module, weights: dict[str, Tensor], source: str | os.PathLike[str], strict: bool = True
) -> None:
    """Load ``weights`` into ``net``, converting ``to_img`` where they are of another scale.

    Args:
        net: The network.
        weights: Parameters by name, as `read_weights` gives them; not changed.
        source: Where they come from, for messages.
        strict: Whether every key must be there, with its shape. If not, what does not fit is left as it is
            and the log lists it.

    Raises:
        UserError: ``strict`` and the weights do not fit: which keys, which shapes, what to try.
    """
    own = net.state_dict()
    weights = _converted(own, weights, source)
    if strict:
        check_fit(net, weights, source)
    elif report := _misfits(net, weights, source):
        logger.warning("%s\nThese keep their present values (strict loading is off).", report)
    fitting = {key: w for key, w in weights.items() if key in own and w.shape == own[key].shape}
    net.load_state_dict(fitting, strict=False)


def check_fit(net: nn.Module, weights: dict[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Raise what a strict `load_weights` would, and load nothing.

    Args:
        net: The network; it may be on the meta device.
        weights: Parameters by name, as `read_weights` gives them; not changed.
        source: Where they come from, for messages.

    Raises:
        UserError: The weights do not fit: which keys, which shapes, what to try.
    """
    own = net.state_dict()
    weights = _converted(own, weights, source)
    if report := _misfits(net, weights, source):
        raise UserError(f"{report}\n{_remedy(own, weights)}")


def _misfits(net: nn.Module, weights: dict[str, Tensor], source: str | os.PathLike[str]) -> str:
    """Keys and shapes that differ between the network and the weights; empty if none do."""
    own = net.state_dict()
    shapes = [
        f"{key}: {shown(list(weights[key].shape))}, expected {list(own[key].shape)}"
        for key in own
        if key in weights and own[key].shape != weights[key].shape
    ]
    lines = [
        *_listing("missing from the file", [key for key in own if key not in weights]),
        *_listing("unknown to the network", [key for key in weights if key not in own]),
        *_listing("of another shape", shapes),
    ]
    return "\n".join([f"{source} does not fit {type(net).__name__}:", *lines]) if lines else ""


def _converted(
    own: dict[str, Tensor], weights: dict[str, Tensor], source: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """Take a trainer's prefix off the names where they are no names of the network, and convert the scale."""
    weights = dict(weights) if own.keys() & weights.keys() else without_prefix(weights)
    names = ("to_img.weight", "to_img.bias")
    if not all(name in own and name in weights for name in names):
        return weights
    old, new = (scale_of_to_img(state["to_img.bias"]) for state in (weights, own))
    if old is None or new is None or old == new:
        return weights
    if any(weights[name].shape != (3 * old**2, *own[name].shape[1:]) for name in names):
        return weights
    logger.info("%s is of scale ×%d; to_img is converted to ×%d.", source, old, new)
    return weights | {name: rescale_to_img(weights[name], new) for name in names}


def _listing(title: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = [f"    ... and {len(items) - _LISTED} more"] if len(items) > _LISTED else []
    return [f"  {title} ({len(items)}):", *(f"    {shown(item)}" for item in items[:_LISTED]), *more]


def _remedy(own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    theirs, ours = infer_network_options(weights), infer_network_options(own)
    if theirs is None or ours is None:
        return "These are not weights of an ESC network. Check path.pretrain_network_g."
    differing = [
        f"{key}: {theirs.get(key, 'default')} (here {ours.get(key, 'default')})"
        for key in {**theirs, **ours}
        if theirs.get(key) != ours.get(key)
    ]
    if not differing:
        return "The file is of this very network, but incomplete: save it again, or load another checkpoint."
    options = ", ".join(differing)
    return f"The file is of another network_g: {options}. Set these options, or load another checkpoint."
