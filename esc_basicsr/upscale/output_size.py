"""Sizes that no network gives: images are upscaled further, then reduced."""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from PIL import Image

from esc_basicsr.common.errors import UserError
from esc_basicsr.upscale.image_file import Pixels
from esc_basicsr.upscale.upscaler import Upscaler


@dataclass(frozen=True)
class OutputSize:
    """A size that results are to have; by default the one that the network makes.

    Args:
        outscale: Times as large, 1 or more.
        box: Width and height that the result fits into, as large as it can be, its sides in proportion.
    """

    outscale: Fraction | None = None
    box: tuple[int, int] | None = None

    def of(self, image: Sequence[int], scale: int, name: str, multiple: int = 1) -> tuple[int, int]:
        """Return height and width of the result.

        Args:
            image: Height and width of what is upscaled.
            scale: Of the network.
            name: Of the image's file, for messages.
            multiple: What the sides are to be multiples of, as video wants even ones.

        Raises:
            UserError: The network makes nothing as large; or the image is larger than the box.
        """
        height, width = image[:2]
        factor = Fraction(scale) if self.outscale is None else self.outscale
        if self.box is not None:
            across, down = (side // multiple * multiple for side in self.box)  # so as not to exceed it
            factor = min(Fraction(across, width), Fraction(down, height))
        if factor > scale:
            raise UserError(
                f"{name}: {width} × {height} pixels would be enlarged ×{float(factor):.4g}, and the network "
                f"makes ×{scale}: choose one of a larger scale, or a smaller result."
            )
        if factor < 1:
            raise UserError(f"{name}: {width} × {height} pixels are larger than the result is to be.")
        rows, columns = (max(1, round(side * factor / multiple)) * multiple for side in (height, width))
        return rows, columns

    def __str__(self) -> str:
        """Name the size, as files are named by it: ``x3.5`` or ``3840x2160``."""
        if self.box is not None:
            return f"{self.box[0]}x{self.box[1]}"
        return "" if self.outscale is None else f"x{float(self.outscale):.6g}"


def read_factor(text: str) -> Fraction:
    """Read how many times as large a result is to be, such as 3.5.

    Raises:
        UserError: It is no such number.
    """
    found = re.fullmatch(r"[0-9]{1,6}([./][0-9]{1,9})?", text)  # Fraction would work for days on 1e999999999
    with contextlib.suppress(ZeroDivisionError):
        if found is not None:
            return Fraction(text)
    raise UserError(f"expected a number such as 3.5, got {text!r}")


def read_box(text: str) -> tuple[int, int]:
    """Read width and height, such as 3840x2160.

    Raises:
        UserError: It is no such text.
    """
    found = re.fullmatch(r"([1-9]\d{0,8})[x×]([1-9]\d{0,8})", text.lower())
    if found is None:
        raise UserError(f"expected width and height such as 3840x2160, got {text!r}")
    return int(found[1]), int(found[2])


def upscaled(upscaler: Upscaler, pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Upscale an image by the network, then reduce it to a size.

    Args:
        upscaler: What upscales it.
        pixels: (H, W) gray or (H, W, 3) RGB; uint8 or uint16.
        size: Height and width of the result, at most those that the network makes, rounded up.

    Returns:
        Of the same type and channels, of the height and width of ``size``.
    """
    return reduced(upscaler(pixels), size)


def reduced(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Reduce an image by antialiased bicubic interpolation of its values as they are encoded.

    As the images are reduced that the networks learn from: what a network enlarged gives its input again. In
    linear light it would not, and what light the values stand for depends on colour profiles.

    Args:
        pixels: (H, W) or (H, W, C); uint8 or uint16.
        size: Height and width of the result.
    """
    if pixels.shape[:2] == size:
        return pixels
    if pixels.ndim == 3:
        return np.dstack([reduced(channel, size) for channel in np.moveaxis(pixels, 2, 0)])
    values = Image.fromarray(pixels.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.rint(np.asarray(values)).clip(0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)
