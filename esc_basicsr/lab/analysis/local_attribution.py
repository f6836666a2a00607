"""Local attribution maps: which pixels of the LR image the detail in a window of the output depends on.

Source: Gu and Dong, "Interpreting Super-Resolution Networks with Local Attribution Maps", CVPR 2021,
arXiv:2011.11265, and its demonstration code. Two things are ours: a gradient of zero where the output is flat
(the demonstration zeroes NaN afterwards, which takes a flat spot's whole receptive field out of the map), and
integration by midpoints, which may be asked for.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.signal import fftconvolve
from torch import Tensor

from esc_basicsr.lab.analysis.features import Values

FOLD = 50
LARGEST_SIGMA = 1.2
INTEGRATIONS = ("right", "midpoint")

_KERNEL_SIZE = 9
# a border narrower than the kernel's reach cannot be reflected
LEAST_SIDE = _KERNEL_SIZE // 2 + 1
_ROUNDING = 1e-10


class Window(NamedTuple):
    """A square of the output: its left column, its top row, its side."""

    x: int
    y: int
    size: int


class Attribution(NamedTuple):
    """The contribution of each value of an image."""

    values: Tensor  # (3, H, W), signed
    # the most that a pixel's absolute gradients, summed over colours, add up to on the path
    sensitivity: float


def detail(sr: Tensor, window: Window) -> Tensor:
    """Measure how much detail a window holds: the sum of its gradients' lengths, by forward differences.

    Its own gradient is zero where the image is flat.

    Args:
        sr: (1, C, H, W).
        window: At most ``H - 1`` and ``W - 1`` at its lower right: each pixel has neighbours.

    Raises:
        ValueError: The window reaches beyond them.
    """
    height, width = sr.shape[-2:]
    left, top, size = window
    if min(left, top) < 0 or size < 1 or top + size > height - 1 or left + size > width - 1:
        raise ValueError(
            f"expected {window} within the first {height - 1} rows and {width - 1} columns of the output"
        )
    seen = sr[..., top : top + size + 1, left : left + size + 1]
    here = seen[..., :-1, :-1]
    squares = (here - seen[..., 1:, :-1]).square() + (here - seen[..., :-1, 1:]).square()
    is_flat = squares == 0
    return squares.masked_fill(is_flat, 1).sqrt().masked_fill(is_flat, 0).sum()


def gaussian_kernel(sigma: float) -> Tensor:
    """Make a Gaussian, (9, 9), float64, of sum 1; the identity for ``sigma`` 0."""
    offset = torch.arange(_KERNEL_SIZE, dtype=torch.float64) - _KERNEL_SIZE // 2
    distance = offset.square()[:, None] + offset.square()
    kernel = (-distance / (2 * (sigma + 1e-5) ** 2)).exp()
    return kernel / kernel.sum()


def blur(image: Tensor, sigma: float) -> Tensor:
    """Convolve each channel with `gaussian_kernel`, the border reflected without repeating the edge.

    Shape:
        image, output: (B, C, H, W), H, W >= `LEAST_SIDE`.
    """
    B, C, H, W = image.shape
    padded = F.pad(image, [_KERNEL_SIZE // 2] * 4, mode="reflect")
    kernel = gaussian_kernel(sigma).to(image)[None, None]
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel).view(B, C, H, W)


def attribute(
    functional: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor, Tensor], Tensor],
    lq: Tensor,
    fold: int = FOLD,
    integration: str = "right",
    on_step: Callable[[], object] = lambda: None,
) -> Attribution:
    """Attribute a number that a network makes of an image to the image's values.

    The gradient is integrated along a path of ever sharper images, from a blur of sigma 1.2 to the image
    itself. Path and sum are in float64, the network in its own precision.

    Args:
        functional: Makes the number of an image, (1, 3, H, W).
        gradient: Gives the number's gradient with regard to the image.
        lq: (1, 3, H, W), in [0, 1], H, W >= `LEAST_SIDE`.
        fold: Steps of the path.
        integration: Where a step's gradient is taken: at its ``right`` end, as the source does, or at its
            ``midpoint``.
        on_step: Called after each step.
    """
    exact = lq.double()
    values = torch.zeros_like(exact)
    absolute = torch.zeros_like(exact)
    before = blur(exact, LARGEST_SIGMA)
    for step in range(1, fold + 1):
        after = blur(exact, LARGEST_SIGMA * (1 - step / fold))
        at = after if integration == "right" else blur(exact, LARGEST_SIGMA * (1 - (step - 0.5) / fold))
        with torch.enable_grad():
            leaf = at.detach().to(lq.dtype).requires_grad_()
            slope = gradient(functional(leaf), leaf).double()
        values += slope * (after - before)
        absolute += slope.abs()
        before = after
        on_step()
    return Attribution(values[0], float(absolute.sum(1).max()))


def relative_map(attribution: Attribution) -> Values:
    """Make the map that is drawn: sum over colours, absolute value, over its maximum.

    Returns:
        (H, W), in [0, 1].

    Raises:
        ValueError: The attribution is not finite, or no more than rounding.
    """
    summed = attribution.values.sum(0).abs().cpu().numpy()
    largest = float(summed.max())
    if not np.isfinite(largest):
        raise ValueError("the attribution is not finite")
    if largest <= _ROUNDING * attribution.sensitivity:
        raise ValueError("the attribution is zero but for rounding")
    return summed / largest


def gini(values: npt.ArrayLike) -> float:
    """Return the Gini coefficient of non-negative values: 0 if they are equal, towards 1 if one has all."""
    ordered = np.sort(np.asarray(values, np.float64), axis=None)
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))


def diffusion_index(relative: Values) -> float:
    """Return how widely a map is spread, from 100 / (H W) to 100; to be compared between maps of one size.

    100 (1 - Gini coefficient), 1e-7 added to each value as in the source.
    """
    return 100 * (1 - gini(relative + 1e-7))


def attribution_density(relative: Values) -> Values:
    """Estimate the kernel density of a map over its own pixels, over its maximum.

    Equal to scipy's ``gaussian_kde`` over the pixels' positions, weighted by their values, by one
    convolution: a Gaussian of the weighted covariance times n_eff^(-1/3) (Scott's rule for two dimensions).

    Returns:
        (H, W), in [0, 1].

    Raises:
        ValueError: The non-zero pixels lie on one line, so that there is no such Gaussian.
    """
    height, width = relative.shape
    weights = relative / relative.sum()
    positions = np.argwhere(relative)
    if np.linalg.matrix_rank(positions - positions[0]) < 2:
        raise ValueError("the non-zero pixels of the map lie on one line")
    covariance = np.cov(np.indices(relative.shape).reshape(2, -1), aweights=weights.ravel())
    spread = covariance * np.square(weights).sum() ** (1 / 3)
    # offsets from -(side - 1) to side - 1, so that nothing wraps around
    offsets = np.stack(
        np.meshgrid(np.arange(1 - height, height), np.arange(1 - width, width), indexing="ij"), axis=-1
    )
    gaussian = np.exp(-0.5 * ((offsets @ np.linalg.inv(spread)) * offsets).sum(-1))
    density = fftconvolve(weights, gaussian, mode="same")
    return np.clip(density / density.max(), 0, 1)
