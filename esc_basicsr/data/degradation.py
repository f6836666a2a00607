"""The degradation of classical super-resolution: antialiased bicubic reduction to 8-bit images."""

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esc_basicsr.archs.resize import imresize

__all__ = ["make_pair", "reduce_uint8"]


def reduce_uint8(image: npt.NDArray[np.uint8], scale: int) -> npt.NDArray[np.uint8]:
    """Reduce an 8-bit image as MATLAB's ``imresize(image, 1 / scale, 'bicubic')`` does.

    The arithmetic is float32 from end to end; the result is rounded to 8 bits once, halves up, and clipped.

    Args:
        image: (H, W, C), any order of channels. H and W must be multiples of ``scale``: otherwise HR and LR
            would not cover the same area.
        scale: Reduction factor, an integer >= 1.

    Returns:
        (H / scale, W / scale, C), C-contiguous.

    Raises:
        ValueError: H or W is not a positive multiple of ``scale``.
    """
    # torch, not numpy, multiplies: torch limits a loader's workers to one thread each, numpy's BLAS does not.
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()
    return _reduce(planes, scale).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def make_pair(hr: Tensor, scale: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Make LR and HR for BasicSR's models of 8-bit HR images; LR as `reduce_uint8` makes it, on any device.

    Args:
        hr: (..., H, W), uint8; sides that are multiples of ``scale``.
        scale: Reduction factor.
        dtype: Of the arithmetic: float32, or float64, which neither TF32 nor autocast makes less exact. The
            two differ in less than a thousandth of LR pixels, by one level.

    Returns:
        ``lq``: (..., H / scale, W / scale), ``gt``: (..., H, W); float32, levels / 255.

    Raises:
        ValueError: H or W is not a positive multiple of ``scale``.
    """
    planes = hr.to(dtype)
    lq = _reduce(planes, scale).float().div_(255)
    return {"lq": lq, "gt": planes.float().div_(255)}


def _reduce(planes: Tensor, scale: int) -> Tensor:
    """Reduce (..., H, W), floating point levels, to levels: whole numbers from 0 to 255."""
    height, width = planes.shape[-2:]
    if height < scale or width < scale or height % scale or width % scale:
        raise ValueError(
            f"to be reduced by {scale} an image must have sides that are multiples of {scale}, "
            f"got {height}x{width}"
        )
    return imresize(planes, Fraction(1, scale)).add_(0.5).floor_().clamp_(0, 255)
