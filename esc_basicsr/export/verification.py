"""Comparing an exported network with the network itself."""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from esc_basicsr.common.errors import UserError

# Largest difference that is let pass, by precision, for outputs within [-1, 1]; larger ones may differ more,
# in proportion. For pictures of 8 bits it is 1/40 of a level, and 2.5 levels.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}


def verify(
    network: nn.Module, exported: Callable[[Tensor], Tensor], precision: str, window_size: int
) -> list[tuple[str, float, float]]:
    """Compare at sizes of a window, below it, above it, odd ones, one and several images.

    Args:
        network: The network, float32, on the CPU.
        exported: What is to give the same.
        precision: A key of TOLERANCES.
        window_size: Side of the network's windows, in pixels.

    Returns:
        For each size: batch×3×height×width, the outputs' largest difference, and how large it may be.

    Raises:
        UserError: It fails at a size, gives another size, or differs by more than is allowed.
    """
    w = window_size
    sizes = [(1, 3, w, w), (1, 3, 7, 5), (2, 3, w + 1, 2 * w - 3), (3, 3, 1, 10)]
    return [_compare(network, exported, size, TOLERANCES[precision]) for size in sizes]


def _compare(
    network: nn.Module, exported: Callable[[Tensor], Tensor], size: tuple[int, ...], tolerance: float
) -> tuple[str, float, float]:
    shape = "×".join(map(str, size))
    lr = torch.rand(size, generator=torch.Generator().manual_seed(0))

    def failure(what: str, advice: str = "") -> UserError:
        return UserError(f"the exported network, given {shape}, {what}. Nothing was written.{advice}")

    with torch.inference_mode():
        expected = network(lr)
        try:
            sr = exported(lr.clone())
        except Exception as error:  # a runtime raises what it likes
            raise failure(f"fails ({type(error).__name__}: {error})") from error
    if sr.shape != expected.shape:
        raise failure(f"returns {tuple(sr.shape)}, not {tuple(expected.shape)}")
    difference = float((sr - expected).abs().max())
    allowed = tolerance * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:  # nor if it is not a number
        raise failure(
            f"differs from the network by {difference:.1e}, and {allowed:.1e} is allowed",
            " Try another precision, format or opset.",
        )
    return shape, difference, allowed
