"""The pictures that networks are looked into with: photographs by name or file, crops, LR of them."""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.image_folder import find_images, read_rgb
from esc_basicsr.data.sample_images import load_sample_image, sample_image_names

__all__ = [
    "IMAGE_HELP",
    "Pixels",
    "add_images_argument",
    "image_names",
    "load_image",
    "reduce_by_pillow",
    "to_tensor",
]

Pixels = npt.NDArray[np.uint8]

IMAGE_HELP = f"a file, or one of the photographs of scikit-image: {', '.join(sample_image_names())}"


# those of scikit-image that are large enough for ×4
_DEFAULT_IMAGES = ("astronaut", "camera", "hubble_deep_field", "motorcycle_left")


def add_images_argument(parser: argparse.ArgumentParser) -> None:
    """Declare ``--images``, see `image_names`."""
    parser.add_argument(
        "--images",
        nargs="+",
        default=list(_DEFAULT_IMAGES),
        help=f"folders, files, or photographs of scikit-image (default: {' '.join(_DEFAULT_IMAGES)})",
    )


def image_names(given: list[str]) -> list[str]:
    """The images that names stand for: a folder for all in it, not searched in depth.

    Raises:
        UserError: A folder holds none.
    """
    names: list[str] = []
    for name in given:
        folder = Path(name)
        names += [str(folder / path) for path in find_images(folder, False)] if folder.is_dir() else [name]
    return list(dict.fromkeys(names))


def load_image(name: str) -> Pixels:
    """Read an image file, or one of the embedded photographs by its name.

    Returns:
        (H, W, 3), RGB.

    Raises:
        UserError: There is neither such a file nor such a photograph, or the file is refused.
    """
    path = Path(name)
    if path.exists():
        return read_rgb(path)
    if name in sample_image_names():
        return load_sample_image(name)
    raise UserError(f"{name}: there is no such file; expected {IMAGE_HELP}.")


def reduce_by_pillow(hr: Pixels, scale: int) -> Pixels:
    """Reduce an image by Pillow's bicubic filter, antialiased, as local attribution maps are defined with.

    Args:
        hr: (H, W, 3); sides that are multiples of ``scale``.
        scale: Reduction factor.

    Returns:
        (H / scale, W / scale, 3).
    """
    height, width = hr.shape[:2]
    reduced = Image.fromarray(hr).resize((width // scale, height // scale), Image.Resampling.BICUBIC)
    return np.asarray(reduced)


def to_tensor(image: Pixels, device: torch.device) -> Tensor:
    """(H, W, 3), 0 to 255 -> (1, 3, H, W), float32, in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))[None]).to(device).float() / 255
