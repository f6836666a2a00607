"""The images that networks are looked into with: by name or file, their centres, LR of them."""

import argparse
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.image_folder import find_images, read_rgb
from esc_basicsr.data.sample_images import load_sample_image, sample_image_names
from esc_basicsr.metrics.quality import Image

_HELP = f"a file, or one of scikit-image's: {', '.join(sample_image_names())}"
# those of scikit-image that are large enough for ×4
_DEFAULT_IMAGES = ("astronaut", "camera", "hubble_deep_field", "motorcycle_left")


def add_image_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """Declare ``--image``, see `load_image`."""
    parser.add_argument("--image", default=default, help=f"{_HELP} (default: {default})")


def add_images_argument(parser: argparse.ArgumentParser) -> None:
    """Declare ``--images``, see `image_names`."""
    parser.add_argument(
        "--images",
        nargs="+",
        default=list(_DEFAULT_IMAGES),
        help=f"folders, files, or images of scikit-image (default: {' '.join(_DEFAULT_IMAGES)})",
    )


def image_names(given: list[str]) -> list[str]:
    """List the images that names stand for: a folder for all in it, not searched in depth.

    Raises:
        UserError: A folder holds none.
    """
    names: list[str] = []
    for name in given:
        folder = Path(name)
        names += [str(folder / path) for path in find_images(folder, False)] if folder.is_dir() else [name]
    return list(dict.fromkeys(names))


def load_image(name: str) -> Image:
    """Read an image file, or one of the embedded images by its name, as (H, W, 3) RGB.

    Raises:
        UserError: There is neither such a file nor such an image, or the file is refused.
    """
    path = Path(name)
    if path.exists():
        return read_rgb(path)
    if name in sample_image_names():
        return load_sample_image(name)
    raise UserError(f"{name}: there is no such file; expected {_HELP}.")


def reduce_by_pillow(hr: Image, scale: int) -> Image:
    """Reduce an image, whose sides are multiples of ``scale``, by Pillow's antialiased bicubic filter."""
    height, width = hr.shape[:2]
    reduced = PIL.Image.fromarray(hr).resize((width // scale, height // scale), PIL.Image.Resampling.BICUBIC)
    return np.asarray(reduced)


def to_tensor(image: Image, device: torch.device) -> Tensor:
    """Convert (H, W, 3), 0 to 255, to (1, 3, H, W), float32, in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))[None]).to(device).float() / 255


def central_lr(name: str, most: int, tile: int, least: int, scale: int) -> Image:
    """Reduce the central part of an image by Pillow's bicubic filter.

    Args:
        name: A file, or an embedded image.
        most: The LR image's sides are at most this,
        tile: multiples of this,
        least: and at least this.
        scale: Reduction factor.

    Raises:
        UserError: The image cannot be read, or is too small.
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
