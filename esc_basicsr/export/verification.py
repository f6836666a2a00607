"""Comparing an exported network with the network itself."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from esc_basicsr.common.errors import UserError

__all__ = ["TOLERANCES", "Comparison", "compare", "verify"]

# Largest difference that is let pass, by precision, for outputs within [-1, 1]; larger ones may differ more,
# in proportion. For pictures of 8 bits it is 1/40 of a level, and 2.5 levels.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}


class Comparison(NamedTuple):
    """The result at one size of the input.

    Attributes:
        size: (batch, height, width) of the input.
        difference: Largest absolute difference of the outputs.
        allowed: How large it may be.
    """

    size: tuple[int, int, int]
    difference: float
    allowed: float


def verify(
    network: nn.Module, exported: Callable[[Tensor], Tensor], precision: str, window_size: int
) -> list[Comparison]:
    """Compare at sizes of a window, below it, above it, odd ones, one and several images.

    Args:
        network: The network, float32, on the CPU.
        exported: What is to give the same.
        precision: A key of TOLERANCES.
        window_size: Side of the network's windows, in pixels.

    Raises:
        UserError: It fails at a size, gives another size, or differs by more than is allowed.
    """
    w = window_size
    sizes = [(1, w, w), (1, 7, 5), (2, w + 1, 2 * w - 3), (3, 1, 10)]
    return [compare(network, exported, size, TOLERANCES[precision]) for size in sizes]


def compare(
    network: nn.Module, exported: Callable[[Tensor], Tensor], size: tuple[int, int, int], tolerance: float
) -> Comparison:
    """Compare the outputs for random images of one size, (batch, height, width).

    Raises:
        UserError: As `verify` does.
    """
    batch, height, width = size
    lr = torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(0))
    what = f"the exported network, given {batch}×3×{height}×{width},"
    with torch.inference_mode():
        expected = network(lr)
        try:
            sr = exported(lr.clone())
        except Exception as error:  # a runtime raises what it likes
            raise UserError(
                f"{what} fails ({type(error).__name__}: {error}). Nothing was written."
            ) from error
    if sr.shape != expected.shape:
        shapes = f"{tuple(sr.shape)}, not {tuple(expected.shape)}"
        raise UserError(f"{what} returns {shapes}. Nothing was written.")
    difference = float((sr - expected).abs().max())
    allowed = tolerance * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:  # nor if it is not a number
        raise UserError(
            f"{what} differs from the network by {difference:.1e}, and {allowed:.1e} is allowed. Nothing was "
            "written. Try another precision, format or opset."
        )
    return Comparison(size, difference, allowed)
