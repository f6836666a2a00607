"""Image files from anywhere: decoded exactly, or refused with the reason.

What a training or test set is made of must be what its files show: a file that is damaged, or whose colours
it does not tell by itself, is refused. Records of LMDBs are decoded by `image_codec`, which trusts them.
"""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from esc_basicsr.common.errors import UserError

Pixels = npt.NDArray[Any]

# No other reader of Pillow's is let loose on a file, whatever its name says.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # JPEG's reads MPO too
_OF_8_BITS = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
_WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")  # "a": colours are multiplied by it
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how a file begins
_INFO_TAGS = {"icc_profile": 34675, "xmp": 700}
_RESOLUTION_UNIT, _INCH = 296, 2
_ASSOCIATED = 1  # value of TIFF's tag ExtraSamples: colours are multiplied by alpha
# Texts and profiles of a PNG, unpacked: node editors write megabytes, a bomb would be larger.
_MOST_TEXT = 2**26

# EXIF's orientation -> transposed, upside down, left to right; in this order
_TURNS = {
    **{1: (False, False, False), 2: (False, False, True), 3: (False, True, True), 4: (False, True, False)},
    **{5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False)},
}


class Decoded(NamedTuple):
    """An upright image.

    ``pixels`` is (H, W) gray or (H, W, 3) RGB, uint8 or uint16; or (H, W, 4) CMYK, uint8. ``alpha`` is
    (H, W), of the same type, None where nothing can be transparent.
    """

    pixels: Pixels
    alpha: Pixels | None


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
    with refusing(origin), open_image(data) as image:
        pixels, alpha = decoded(image, data)
        if alpha is not None:
            _check_opaque(alpha)
        pixels = to_8_bits(pixels)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        elif pixels.shape[2] == 4:
            pixels = np.asarray(Image.fromarray(pixels, "CMYK").convert("RGB"))
        return np.ascontiguousarray(pixels[..., ::-1])


def source_image_size(data: BinaryIO, origin: str) -> tuple[int, int]:
    """Read height and width from the head of an image file; EXIF's orientation is not applied.

    Raises:
        UserError: The head is none of a format that is read.
    """
    with refusing(origin), Image.open(data, formats=_FORMATS) as header:
        width, height = header.size
    return height, width


def to_8_bits(values: Pixels) -> npt.NDArray[np.uint8]:
    """Round 16 bits to 8; 8 stay what they are."""
    return values if values.dtype == np.uint8 else ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


class RefusedImageError(Exception):
    """A fault of an image; its message follows the image's name."""


@contextmanager
def refusing(origin: str, most_pixels: int | None = None) -> Iterator[None]:
    """Turn everything that reading an image raises into a UserError.

    Args:
        origin: Where the image comes from; messages begin with it.
        most_pixels: Of an image; Pillow's limit, 179 million, by default.
    """
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    # Pillow refuses twice what it warns of.
    Image.MAX_IMAGE_PIXELS = before[0] if most_pixels is None else max(most_pixels // 2, 1)
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _MOST_TEXT
    tifffile.logger().disabled = True
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
        advice = "" if most_pixels is None else "raise --max-megapixels, or "
        raise UserError(f"{origin} has more than {limit:,} pixels: {advice}cut it into parts") from None
    except MemoryError:
        raise UserError(f"{origin} cannot be decoded: there is not enough memory") from None
    except Exception as error:  # a damaged file brings out of a decoder whatever its bytes lead to
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{origin} cannot be decoded: it is truncated or damaged ({message}). Replace or remove it"
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = before
        tifffile.logger().disabled = False


def open_image(data: bytes, more_formats: Sequence[str] = ()) -> Image.Image:
    """Open an image file of a format that is read, and no other; its pixels are not decoded yet.

    Args:
        data: The file's bytes.
        more_formats: Pillow's names of formats that are read besides.

    Raises:
        RefusedImageError: It is empty, animated or of several pages.
        Exception: It is damaged.
    """
    if not data:
        raise RefusedImageError("is empty (0 bytes): replace or remove it")
    formats = (*_FORMATS, *more_formats)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as header:
            _check_single(getattr(header, "n_frames", 1) if header.format != "MPO" else 1)
            header.verify()  # the checksum of every chunk of a PNG; decoding alone would stop before the last
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        if data[:4] not in _TIFF:
            raise
        return _tiff_without_pixels(data)


def _check_single(frames: int) -> None:
    if frames > 1:
        raise RefusedImageError(f"has {frames} frames or pages: save the one that is wanted by itself")


def _tiff_without_pixels(data: bytes) -> Image.Image:
    """Describe a TIFF that Pillow does not know, such as gray with alpha of 16 bits, as Pillow does."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        _check_single(len(file.pages))
        page: Any = file.pages[0]
        if page.imagewidth * page.imagelength > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError
        image = Image.new("LA", (page.imagewidth, page.imagelength))
        image.format = "TIFF"
        image.info["exif"] = b"Exif\0\0" + data
        image.info |= {key: page.tags.valueof(tag) for key, tag in _INFO_TAGS.items() if tag in page.tags}
        if page.tags.valueof(_RESOLUTION_UNIT) == _INCH:
            image.info["dpi"] = page.get_resolution()
    return image


def decoded(image: Image.Image, data: bytes, samples: Pixels | None = None) -> Decoded:
    """Decode an image that `open_image` opened, and turn it upright.

    Args:
        image: The image.
        data: Its file's bytes.
        samples: As they are stored, (H, W) or (H, W, C), where another reader has decoded them.

    Raises:
        RefusedImageError: Its samples are of a kind that is not read.
        Exception: It is damaged.
    """
    if samples is not None:
        pixels, alpha = _split_alpha(samples)
    elif image.format == "PNG":
        pixels, alpha = _split_alpha(imagecodecs.png_decode(data))
    elif image.format == "TIFF":
        pixels, alpha = _decode_tiff(image, data)
    else:
        pixels, alpha = _decode_by_pillow(image)
    if not pixels.size:
        raise RefusedImageError("has no pixels: replace or remove it")
    # To look for EXIF after the pixels, Pillow decodes a PNG that has none.
    has_exif = image.format != "PNG" or any(mark in data for mark in (b"eXIf", b"iTXt", b"Raw profile type"))
    orientation = orientation_of(image) if has_exif else 1
    return Decoded(_upright(pixels, orientation), None if alpha is None else _upright(alpha, orientation))


def exif_of(image: Image.Image) -> Image.Exif:
    """Read an image's EXIF data, and a TIFF's tags; none where they are damaged."""
    try:
        return image.getexif()
    except Exception:  # what Pillow raises depends on the bytes
        return Image.Exif()


def orientation_of(image: Image.Image) -> int:
    """Read how an image is to be turned, as EXIF says."""
    # JPEG XL says it outside of EXIF, and its decoder does it, unless it restores a JPEG that was packed.
    is_upright = image.format == "JXL" and not getattr(image, "jpeg", False)
    return 1 if is_upright else exif_of(image).get(ExifTags.Base.Orientation, 1)


def _decode_by_pillow(image: Image.Image) -> Decoded:
    if image.mode not in (*_OF_8_BITS, *_WITH_ALPHA):
        raise RefusedImageError(
            f"has samples of a kind that is not read (Pillow's mode {image.mode}): save it with 8 or 16 bits"
        )
    image.load()
    if image.mode == "CMYK":
        return Decoded(np.asarray(image), None)
    is_gray = image.mode in ("1", "L", "LA", "La")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        return _split_alpha(np.asarray(image.convert("LA" if is_gray else "RGBA")))
    return Decoded(np.asarray(image.convert("L" if is_gray else "RGB")), None)


def _decode_tiff(image: Image.Image, data: bytes) -> Decoded:
    """Decode samples of 16 bits by tifffile, of which Pillow drops half, and others by Pillow."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        _check_whole(page, len(data))
        if page.bitspersample != 16:
            return _decode_by_pillow(image)
        array = page.asarray()
        photometric, extra = int(page.photometric), [int(sample) for sample in page.extrasamples]
        if page.planarconfig == 2 and array.ndim == 3:  # plane by plane
            array = np.moveaxis(array, 0, -1)
    colours = {0: 1, 1: 1, 2: 3}.get(photometric, 0)  # white to black, black to white, RGB
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype.newbyteorder("=") != np.uint16 or channels not in (colours, colours + 1):
        raise RefusedImageError(
            f"has 16-bit samples of a kind that is not read ({page.photometric.name.lower()}, {channels} "
            f"channels, {array.dtype}): save it as gray or RGB"
        )
    array = array.astype(np.uint16, copy=False)
    if channels == colours:
        pixels, alpha = array, None
    else:
        pixels, alpha = _split_alpha(array)
        if extra == [_ASSOCIATED]:
            pixels = _unmultiplied(pixels, alpha)
    return Decoded(np.uint16(65535) - pixels if photometric == 0 else pixels, alpha)


def _check_whole(page: Any, size: int) -> None:
    """Refuse a TIFF that promises more rows than it holds, which decoders fill up without a word."""
    wanted = int(np.prod(page.chunked))
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    if len(parts) < wanted or any(count == 0 or start + count > size for start, count in parts):
        raise RefusedImageError("cannot be decoded: it is truncated, rows are missing. Replace or remove it")
    if page.compression == tifffile.COMPRESSION.JPEG:
        page.asarray()  # which libtiff, and with it Pillow, fills up as well


def _split_alpha(array: Pixels) -> Decoded:
    """Split off the alpha channel of two or four."""
    if array.ndim == 2 or array.shape[2] in (1, 3):
        return Decoded(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array, None)
    return Decoded(array[..., 0] if array.shape[2] == 2 else array[..., :3], array[..., -1])


def _unmultiplied(pixels: Pixels, alpha: Pixels | None) -> Pixels:
    """Divide colours by the alpha that they were multiplied by."""
    assert alpha is not None
    opacity = np.maximum(alpha, 1).astype(np.float64) / 65535
    values = pixels / (opacity if pixels.ndim == 2 else opacity[..., None])
    return np.minimum(np.rint(values), 65535).astype(np.uint16)


def _upright(array: Pixels, orientation: int) -> Pixels:
    transposed, upside_down, left_to_right = _TURNS.get(orientation, _TURNS[1])
    array = array.swapaxes(0, 1) if transposed else array
    return np.ascontiguousarray(array[:: -1 if upside_down else 1, :: -1 if left_to_right else 1])


def _check_opaque(alpha: Pixels) -> None:
    """Refuse transparent pixels: the colours below them are what a program left there."""
    transparent = np.count_nonzero(alpha != np.iinfo(alpha.dtype).max)
    if transparent:
        raise RefusedImageError(
            f"is transparent in {transparent:,} of {alpha.size:,} pixels: put it on a ground, or remove it"
        )
