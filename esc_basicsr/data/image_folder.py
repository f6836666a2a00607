"""Folders of images: finding them, reading them, cropping them for a scale."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.first_few import first_few
from esc_basicsr.common.log import logger
from esc_basicsr.data.source_image import decode_source_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (
    *(".mp4", ".mkv", ".mov", ".m4v", ".webm", ".avi", ".wmv", ".flv", ".3gp"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".vob"),
)
# Of what is not read in folders: named, so that nobody takes them for done.
UNREAD_SUFFIXES = (
    *VIDEO_SUFFIXES,
    *(".avif", ".gif", ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jxl", ".psd", ".exr", ".hdr"),
    *(".dng", ".cr2", ".nef", ".arw", ".tga", ".ico"),
)


def find_images(folder: Path, recursive: bool, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Find the image files in ``folder``, sorted, relative to it; hidden files and folders are ignored.

    The log names images of formats that are not read.

    Raises:
        UserError: ``folder`` is not a folder, or has no images.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: expected one that holds images")
    try:
        found = sorted(_images_in(folder, recursive, ()))
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be searched: {error.strerror}") from error
    unread = [path for path in found if path.suffix.lower() not in suffixes]
    if unread:
        named = first_few([ascii(str(path))[1:-1] for path in unread])
        logger.warning("%s: of formats that are not read, and left out: %s.", folder, named)
    images = [path for path in found if path.suffix.lower() in suffixes]
    if not images:
        raise UserError(f"{folder} holds no images ({', '.join(suffixes)})")
    return images


def _images_in(folder: Path, recursive: bool, within: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Yield image files, read or not, relative to ``folder``; links that lead round in a circle lead to none.

    ``within``: device and inode of the folders that this one is in.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in within:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_file, is_folder = entry.is_file(), recursive and entry.is_dir()
            except OSError:  # a link to itself
                continue
            if is_file and Path(entry.name).suffix.lower() in (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES):
                yield Path(entry.name)
            elif is_folder:
                for path in _images_in(Path(entry.path), recursive, (*within, here)):
                    yield entry.name / path


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Read an image file as 8-bit colour, (H, W, 3), BGR, as `decode_source_image` does.

    Raises:
        UserError: The file cannot be read, or is refused. The message begins with ``path``.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return decode_source_image(data, str(path))


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """Read an image file as `read_image` does, but as RGB."""
    return np.ascontiguousarray(read_image(path)[:, :, ::-1])


def check_scales(scales: Sequence[int]) -> None:
    """Refuse scales that LR images cannot be made for, or not side by side.

    Raises:
        UserError: A scale below 2, or one given twice.
    """
    if any(scale < 2 for scale in scales) or len(set(scales)) != len(scales):
        raise UserError(f"scales must be different integers of at least 2, got {list(scales)}")


def crop_to_multiple(image: npt.NDArray[np.uint8], multiple: int, origin: str) -> npt.NDArray[np.uint8]:
    """Cut rows at the bottom and columns at the right so that both sides are multiples of ``multiple``.

    Raises:
        UserError: A side is shorter than ``multiple``. The message names ``origin``.
    """
    height, width = image.shape[:2]
    if min(height, width) < multiple:
        raise UserError(f"{origin} is {width}x{height}: both sides must be at least {multiple}; remove it")
    return image[: height - height % multiple, : width - width % multiple]
