"""MATLAB-compatible bicubic resizing, as two matrix products.

Super-resolution's benchmarks are defined by MATLAB's ``imresize(image, scale, 'bicubic')``. Resizing is
linear and separable: with one matrix for the rows and one for the columns, the same few lines run on any
device, and gradients pass through. Needs torch only.
"""

import functools
import math
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["imresize", "resize_matrix"]


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, which is zero from distance 2 on."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resize_matrix(in_size: int, out_size: int, scale: float | Fraction, antialias: bool = True) -> Tensor:
    """Build the matrix that resizes a line of ``in_size`` pixels to ``out_size`` pixels.

    Pixel i of the output lies at (i + 0.5) / scale - 0.5 in the input: the outer edges of both lines
    coincide. Beyond its ends the line goes on as its mirror image, the edge pixel repeated.

    Args:
        in_size: Pixels of the input, at least 1.
        out_size: Pixels of the output, at least 1.
        scale: Output pixels per input pixel.
        antialias: Widen the kernel by 1 / scale when ``scale`` is below 1, as MATLAB does by default.

    Returns:
        (out_size, in_size), float64, on the CPU; each row sums to 1.

    Raises:
        ValueError: A size below 1, or a scale that is not above 0.
    """
    if in_size < 1 or out_size < 1 or scale <= 0:
        raise ValueError(
            f"resizing needs sizes of at least 1 and a scale above 0, got {in_size} -> {out_size} "
            f"at scale {scale}"
        )
    factor = float(scale)
    stretch = min(factor, 1.0) if antialias else 1.0
    reach = 2 / stretch
    centre = (torch.arange(out_size, dtype=torch.float64) + 0.5) / factor - 0.5
    taps = math.ceil(2 * reach) + 1
    # source: (out_size, taps), indices that may lie outside the line
    source = (centre - reach).ceil().long()[:, None] + torch.arange(taps)
    weight = _cubic((centre[:, None] - source) * stretch)
    weight = weight / weight.sum(dim=1, keepdim=True)
    mirrored = source.remainder(2 * in_size)
    mirrored = torch.where(mirrored < in_size, mirrored, 2 * in_size - 1 - mirrored)
    return torch.zeros(out_size, in_size, dtype=torch.float64).scatter_add_(1, mirrored, weight)


@functools.lru_cache(maxsize=16)
def _matrix(in_size: int, scale: float | Fraction, dtype: torch.dtype, device: torch.device) -> Tensor:
    # MATLAB's output size. The margin keeps 10 * 1.1, which is 11.000000000000002, from becoming 12.
    out_size = max(1, math.ceil(in_size * scale - 1e-6))
    # A matrix first needed within inference mode must serve training afterwards.
    with torch.inference_mode(False), torch.no_grad():
        return resize_matrix(in_size, out_size, scale).to(dtype).to(device)


def imresize(image: Tensor, scale: float | Fraction) -> Tensor:
    """Resize as MATLAB's ``imresize(image, scale, 'bicubic')`` does, antialiased when ``scale`` is below 1.

    Args:
        image: Floating point, any range. In float16 and bfloat16 the arithmetic is done in float32.
        scale: Output pixels per input pixel; ``Fraction(1, 3)`` is exact where 1 / 3 is not.

    Shape:
        Input: (..., H, W), H, W >= 1.
        Output: (..., ceil(H * scale), ceil(W * scale)), of the input's dtype, neither clamped nor rounded.

    Raises:
        TypeError: ``image`` is not floating point.
        ValueError: ``scale`` is not above 0, or ``image`` has no pixels.
    """
    if not image.is_floating_point():
        raise TypeError(f"imresize needs a floating point image, got {image.dtype}: convert it first")
    dtype = image.dtype if image.dtype == torch.float64 else torch.float32
    rows = _matrix(image.shape[-2], scale, dtype, image.device)
    columns = _matrix(image.shape[-1], scale, dtype, image.device)
    return (rows @ image.to(dtype) @ columns.T).to(image.dtype)
