"""The parts of photographs that layers are looked into with."""

import numpy as np

from esc_basicsr.common.errors import UserError
from esc_basicsr.lab.analysis.images import Pixels, load_image, reduce_by_pillow

__all__ = ["central_lr"]


def central_lr(name: str, most: int, tile: int, least: int, scale: int) -> Pixels:
    """The central part of a photograph, reduced by Pillow's bicubic filter.

    Args:
        name: A file, or an embedded photograph.
        most: The LR image's sides are at most this,
        tile: multiples of this,
        least: and at least this.
        scale: Reduction factor.

    Returns:
        (H, W, 3).

    Raises:
        UserError: The photograph cannot be read, or is too small.
    """
    image = load_image(name)
    sides = image.shape[:2]
    height, width = (min(side // scale, most) // tile * tile for side in sides)
    if min(height, width) < max(least, 1):
        steps = f", in multiples of {tile}" if least > tile > 1 else ""
        raise UserError(
            f"{name} is too small: of {sides[1]}×{sides[0]} pixels, and --size {most}. At ×{scale} it takes "
            f"{least * scale} a side, for an LR image of at least {least}×{least}{steps}. Leave it out, or "
            "ask for another --size."
        )
    top, left = ((side - kept * scale) // 2 for side, kept in zip(sides, (height, width), strict=True))
    part = image[top : top + height * scale, left : left + width * scale]
    return reduce_by_pillow(np.ascontiguousarray(part), scale)
