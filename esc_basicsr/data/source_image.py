"""Image files from anywhere: to 8-bit colour, or refused with the reason.

What a training or test set is made of must be what its files show: a file that is damaged, or whose colours
it does not tell by itself, is refused. Records of LMDBs are decoded by `image_codec`, which trusts them.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from esc_basicsr.common.errors import UserError

__all__ = [
    "RefusedImageError",
    "check_single",
    "decode_source_image",
    "is_deep",
    "open_image",
    "refusing",
    "source_image_size",
]

# No other reader of Pillow's is let loose on a file, whatever its name says.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # JPEG's reads MPO too
_OF_8_BITS = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
_WITH_ALPHA = ("LA", "PA", "RGBA")
# tags of TIFF
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR, _EXTRA_SAMPLES = 258, 262, 284, 338
_ORIENTATION = 0x0112  # a tag of EXIF


def decode_source_image(data: bytes, origin: str) -> npt.NDArray[np.uint8]:
    """Decode the bytes of a PNG, JPEG, WebP, BMP or TIFF file to 8-bit colour.

    Gray becomes three equal channels, 16 bits are rounded to 8, CMYK becomes RGB by (1 - C)(1 - K) without
    regard to colour profiles, EXIF's orientation is applied, an opaque alpha channel is dropped, and of a
    camera's multi-picture JPEG (MPO) the first image is taken.

    Args:
        data: The file's bytes.
        origin: Where the bytes come from; the error message begins with it.

    Returns:
        (H, W, 3), BGR, contiguous.

    Raises:
        UserError: The file is empty, truncated or damaged as far as its format lets that be seen, of another
            format, transparent anywhere, animated or of several pages, of 32 bits or float, or larger than
            179 million pixels.
    """
    if not data:
        raise UserError(f"{origin} is empty (0 bytes): replace or remove it")
    with refusing(origin):
        with open_image(io.BytesIO(data)) as header:
            check_single(header)
            deep = is_deep(header, data)
            mode = header.mode
            header.verify()  # the checksum of every chunk of a PNG; decoding alone would stop before the last
        with open_image(io.BytesIO(data)) as image:
            return _decode_deep(image, data) if deep else _decode(image, mode)


def source_image_size(data: BinaryIO, origin: str) -> tuple[int, int]:
    """Read height and width from the head of an image file; EXIF's orientation is not applied.

    Raises:
        UserError: The head is none of a format that is read.
    """
    with refusing(origin), open_image(data) as header:
        width, height = header.size
    return height, width


class RefusedImageError(Exception):
    """A fault of an image; its message follows the image's name."""


@contextmanager
def refusing(origin: str) -> Iterator[None]:
    """Turn everything that reading an image raises into a UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of oddities that do not keep it from decoding
            yield
    except RefusedImageError as error:
        raise UserError(f"{origin} {error}") from None
    except UnidentifiedImageError:
        known = "PNG, JPEG, WebP, BMP or TIFF of 8 or 16 bits"
        raise UserError(
            f"{origin} cannot be decoded as an image: {known} is expected. Replace or remove it"
        ) from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(f"{origin} has more than {limit:,} pixels: cut it into parts") from None
    except MemoryError:
        raise UserError(f"{origin} cannot be decoded: there is not enough memory") from None
    except Exception as error:  # a damaged file brings out of Pillow and OpenCV whatever its bytes lead to
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{origin} cannot be decoded: it is truncated or damaged ({message}). Replace or remove it"
        ) from error


def open_image(data: BinaryIO) -> Image.Image:
    """Open an image file of a format that is read, and no other; its pixels are not decoded yet."""
    return Image.open(data, formats=_FORMATS)


def check_single(header: Image.Image) -> None:
    """Refuse animations and files of several pages."""
    frames = getattr(header, "n_frames", 1)
    if frames > 1 and header.format != "MPO":
        raise RefusedImageError(f"has {frames} frames or pages: save the one that is wanted by itself")


def is_deep(header: Image.Image, data: bytes) -> bool:
    """Return whether samples have 16 bits, of which Pillow drops the lower ones where there are colours."""
    if header.format == "PNG":
        deep = data[24] == 16
    elif header.format == "TIFF":
        deep = 16 in header.tag_v2.get(_BITS_PER_SAMPLE, ())  # type: ignore[attr-defined]
    else:
        deep = False
    if not deep and header.mode not in (*_OF_8_BITS, *_WITH_ALPHA):
        raise RefusedImageError(
            f"has samples of a kind that is not read (Pillow's mode {header.mode}): save it with 8 or 16 bits"
        )
    if deep and header.format == "TIFF":
        _check_deep_tiff(header.tag_v2)  # type: ignore[attr-defined]
    return deep


def _check_deep_tiff(tags: Any) -> None:
    """Refuse what OpenCV, which decodes 16 bits, gives other colours for than the file means."""
    unread = {
        "its 16 bits are stored plane by plane": tags.get(_PLANAR) == 2,
        "its 16-bit gray runs from white to black": tags.get(_PHOTOMETRIC) == 0,
        "its 16-bit colours are multiplied by alpha": 1 in tags.get(_EXTRA_SAMPLES, ()),
    }
    for reason, is_so in unread.items():
        if is_so:
            raise RefusedImageError(f"is not read: {reason}. Save it in the usual form")


def _decode(image: Image.Image, mode: str) -> npt.NDArray[np.uint8]:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if mode in _WITH_ALPHA or "transparency" in image.info:
        rgba = np.asarray(upright.convert("RGBA"))
        _check_opaque(rgba[..., 3], 255)
        rgb = rgba[..., :3]
    else:
        rgb = np.asarray(upright.convert("RGB"))
    return np.ascontiguousarray(rgb[..., ::-1])


def _decode_deep(image: Image.Image, data: bytes) -> npt.NDArray[np.uint8]:
    if image.getexif().get(_ORIENTATION, 1) != 1:
        raise RefusedImageError("has 16 bits and is turned by EXIF, which is not read: save it upright")
    if "transparency" in image.info:
        raise RefusedImageError("has 16 bits and a transparent colour, which is not read: save it without")
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise RefusedImageError(
            "cannot be decoded: it is damaged, or its 16 bits are of a kind that is not read"
        )
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        _check_opaque(pixels[..., 3], 0xFFFF)
        pixels = pixels[..., :3]
    rounded = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.ascontiguousarray(rounded if rounded.ndim == 3 else np.repeat(rounded[..., None], 3, axis=2))


def _check_opaque(alpha: npt.NDArray[np.generic], opaque: int) -> None:
    """Refuse transparent pixels: the colours below them are what a program left there."""
    transparent = np.count_nonzero(alpha != opaque)
    if transparent:
        raise RefusedImageError(
            f"is transparent in {transparent:,} of {alpha.size:,} pixels: put it on a ground, or remove it"
        )
