"""Upscaling an image file, with what belongs to it."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from esc_basicsr.common.files import check_replaceable
from esc_basicsr.upscale.output_size import OutputSize, upscaled
from esc_basicsr.upscale.read_image import MOST_PIXELS, read_image
from esc_basicsr.upscale.upscaler import Upscaler
from esc_basicsr.upscale.write_image import fitted, write_image


def upscale_file(
    upscaler: Upscaler,
    source: Path,
    target: Path,
    quality: int = 95,
    most_pixels: int = MOST_PIXELS,
    size: OutputSize | None = None,
) -> None:
    """Upscale one image file, with what belongs to it.

    Raises:
        UserError: ``source`` cannot be read, or ``target`` not be written or not hold the image.
    """
    check_replaceable(target)
    image = read_image(source, most_pixels)
    shape = (size or OutputSize()).of(image.pixels.shape, upscaler.scale, image.name)
    image = fitted(target, image, shape)
    pixels = upscaled(upscaler, image.visible_colours(), shape)
    alpha = image.alpha
    if alpha is not None:
        # a constant one stays what it is; the network would come close
        is_constant = bool((alpha == alpha.flat[0]).all())
        alpha = (
            np.full(shape, alpha.flat[0], alpha.dtype) if is_constant else upscaled(upscaler, alpha, shape)
        )
    write_image(target, replace(image, pixels=pixels, alpha=alpha), quality)
