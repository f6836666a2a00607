"""Writing image files with all that belongs to an image: whether a format holds it is seen beforehand."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, PngImagePlugin

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import written_whole
from esc_basicsr.common.log import logger
from esc_basicsr.data.source_image import to_8_bits
from esc_basicsr.data.stored_png import png_chunk
from esc_basicsr.upscale.image_file import FORMATS, GEO_TAGS, ImageFile, Pixels, copied_exif
from esc_basicsr.upscale.read_image import png_chunks

_LONGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383, "PNG": 2**31 - 1}
_MOST_OF_TIFF = 2**32 - 2**20  # bytes; larger ones are BigTIFF, which Pillow does not write

_XMP_TAG, _ICC_TAG, _SOFTWARE = 700, 34675, 305
# Texts that 16-bit TIFFs keep: description, make, model, date, artist, rights.
_TEXT_TAGS = (270, 271, 272, 306, 315, 33432)
_DIRECTORIES = (0x8769, 0x8825, 0xA005)
_METADATA = ("exif", "xmp", "icc", "dpi", "texts")
_PNG_METADATA = (b"iCCP", b"eXIf", b"pHYs", b"tEXt", b"zTXt", b"iTXt")
_TEXTS = {"JPEG": {"Comment"}, "WEBP": set[str](), "TIFF": set[str]()}  # keys that a format holds; PNG all
_LISTED = 5
_GAMMA_OF_SRGB = 45_455


def fitted(path: Path, image: ImageFile, size: tuple[int, int] | None = None) -> ImageFile:
    """Fit an image to the file that it is to become, of another height and width; its pixels stay as many.

    What the format cannot hold of metadata is dropped, with a warning.

    Raises:
        UserError: The format cannot hold the image: its size or its transparency.
    """
    kind = FORMATS[path.suffix.lower()]
    height, width = size or image.pixels.shape[:2]
    longest = _LONGEST_SIDE.get(kind)
    if longest is not None and max(height, width) > longest:
        raise UserError(f"{path}: {width} × {height} pixels are more than {kind} holds: write PNG or TIFF.")
    if kind == "JPEG" and image.alpha is not None:
        if (image.alpha != np.iinfo(image.alpha.dtype).max).any():
            raise UserError(f"{path}: JPEG holds no transparency: write PNG, WebP or TIFF.")
        image = replace(image, alpha=None)
    if image.pixels.dtype == np.uint16 and kind in ("JPEG", "WEBP"):
        logger.warning("%s holds 8 bits: the image's 16 are rounded.", path)
        alpha = None if image.alpha is None else to_8_bits(image.alpha)
        image = replace(image, pixels=to_8_bits(image.pixels), alpha=alpha)
    if image.icc is not None and image.icc[16:20] == b"GRAY" and (image.pixels.ndim == 3 or kind == "WEBP"):
        logger.warning("%s: gray is written as colour, its gray colour profile is dropped.", path)
        image = replace(image, icc=None)
    if kind != "PNG" and (chunks := _colour_that_matters(image.colour)):
        logger.warning(
            "%s: %s holds nothing like a PNG's %s: colours may look otherwise. Write PNG.",
            *(path, kind, ", ".join(chunks)),
        )
    if lost := sorted(image.texts.keys() - _TEXTS.get(kind, {*image.texts})):
        logger.warning("%s: %s holds no texts such as %s.", path, kind, ", ".join(lost[:_LISTED]))
    image = image.resized((height, width))
    if kind != "TIFF" and (geo := {*GEO_TAGS} & image.exif.keys()):
        logger.warning("%s: %s holds no georeference: write TIFF.", path, kind)
        for tag in geo:
            del image.exif[tag]
    return _with_writable_metadata(path, image, kind)


def write_image(path: Path, image: ImageFile, quality: int = 95) -> None:
    """Write an image, whole or not at all; the suffix says in which format.

    Args:
        path: The file; one of that name is replaced.
        image: The image, as `fitted` gives it for this file.
        quality: Of JPEG and WebP, 1 to 100.

    Raises:
        UserError: The file cannot be written.
    """
    kind = FORMATS[path.suffix.lower()]
    try:
        content = _encode(image, kind, quality)
    except Exception as error:  # encoders raise what they like
        raise UserError(f"{path} cannot be written as {kind}: {type(error).__name__}: {error}") from error
    with written_whole(path) as file:
        file.write(content)


def _colour_that_matters(colour: dict[bytes, bytes]) -> list[str]:
    """Name the chunks that say of colours anything but sRGB."""
    if b"sRGB" in colour:
        return []
    gamma = int.from_bytes(colour.get(b"gAMA", b""), "big") or _GAMMA_OF_SRGB
    is_plain = abs(gamma - _GAMMA_OF_SRGB) < 100 and b"cICP" not in colour
    return [] if is_plain else sorted(kind.decode() for kind in colour)


def _with_writable_metadata(path: Path, image: ImageFile, kind: str) -> ImageFile:
    """Drop what the format's encoder refuses, tried out on an image of one pixel."""
    empty = ImageFile(
        np.zeros_like(image.pixels[:1, :1]), None if image.alpha is None else image.alpha[:1, :1]
    )
    kept: dict[str, Any] = {}
    for part in _METADATA:
        value = getattr(image, part)
        try:
            _encode(replace(empty, **kept, **{part: value}), kind, 95)
            kept[part] = value
        except Exception as error:  # encoders raise what they like
            word = {"icc": "its colour profile", "dpi": "its resolution"}.get(part, part.upper())
            logger.warning("%s: %s cannot be written as %s (%s): dropped.", path, word, kind, error)
    lost = image.exif.keys() - {*_TEXT_TAGS, *GEO_TAGS, _SOFTWARE}
    if kind == "TIFF" and image.pixels.dtype == np.uint16 and lost:
        logger.warning("%s: a 16-bit TIFF keeps of EXIF only texts and georeference.", path)
    return replace(image, **{part: kept.get(part, getattr(empty, part)) for part in _METADATA})


def _with_alpha(image: ImageFile) -> Pixels:
    """Stack colours or gray and transparency, if there is any: (H, W) or (H, W, C)."""
    array = image.pixels if image.alpha is None else np.dstack([image.pixels, image.alpha])
    return np.ascontiguousarray(array)


def _encode(image: ImageFile, kind: str, quality: int) -> bytes:
    array = _with_alpha(image)
    if kind == "PNG":
        return _encode_png(image, array)
    if kind == "TIFF" and (array.dtype == np.uint16 or array.nbytes > _MOST_OF_TIFF):
        return _encode_tiff(image, array)
    return _encode_by_pillow(image, array, kind, quality)


def _encode_by_pillow(image: ImageFile, array: Pixels, kind: str, quality: int) -> bytes:
    exif = copied_exif(image.exif)
    has_directories = any(tag in exif for tag in _DIRECTORIES)
    of_kind: dict[str, dict[str, Any]] = {
        "PNG": {"pnginfo": _png_texts(image)},
        "JPEG": {"quality": quality, "subsampling": 0, "comment": image.texts.get("Comment", "")},
        "WEBP": {"quality": quality, "method": 4},
        # Pillow's own writer alone, which compresses nothing, writes EXIF's directories.
        "TIFF": {} if has_directories else {"compression": "tiff_adobe_deflate"},
    }
    options = of_kind[kind]
    if image.xmp and kind in ("JPEG", "WEBP"):
        options["xmp"] = image.xmp
    if image.icc:
        options["icc_profile"] = image.icc
    if image.dpi:
        options["dpi"] = image.dpi
    if image.xmp and kind == "TIFF":
        exif[_XMP_TAG] = image.xmp
    if len(exif):
        options["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def _png_texts(image: ImageFile) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, text in image.texts.items():
        info.add_text(key, text)
    if image.xmp:
        info.add_itxt("XML:com.adobe.xmp", image.xmp.decode("utf-8", "replace"))
    return info


def _encode_png(image: ImageFile, array: Pixels) -> bytes:
    """Encode pixels by imagecodecs, as Pillow writes no colours of 16 bits, and metadata by Pillow."""
    data = bytes(imagecodecs.png_encode(array))
    plain = _encode_by_pillow(image, np.zeros((1, 1), np.uint8), "PNG", 0)
    chunks = [*image.colour.items(), *(chunk for chunk in png_chunks(plain) if chunk[0] in _PNG_METADATA)]
    head = 8 + 12 + 13  # signature and IHDR
    return data[:head] + b"".join(png_chunk(*chunk) for chunk in chunks) + data[head:]


def _encode_tiff(image: ImageFile, array: Pixels) -> bytes:
    """Encode by tifffile, as Pillow writes no colours of 16 bits."""
    tags: list[tuple[Any, ...]] = [
        (tag, 2, 0, str(image.exif[tag]), True) for tag in _TEXT_TAGS if tag in image.exif
    ]
    for tag in sorted(GEO_TAGS):
        if (value := image.exif.get(tag)) is not None:
            kind = 2 if isinstance(value, str) else 3 if all(isinstance(one, int) for one in value) else 12
            tags.append((tag, kind, 0 if kind == 2 else len(value), value, True))
    if image.icc:
        tags.append((_ICC_TAG, 7, len(image.icc), image.icc, True))
    if image.xmp:
        tags.append((_XMP_TAG, 1, len(image.xmp), image.xmp, True))
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        array,
        photometric="minisblack" if image.pixels.ndim == 2 else "rgb",
        planarconfig="contig" if array.ndim == 3 else None,
        extrasamples=None if image.alpha is None else ["unassalpha"],
        compression="zlib",
        predictor=False,
        resolution=image.dpi,
        resolutionunit="inch" if image.dpi else None,
        extratags=tags,
        metadata=None,
        software=str(image.exif.get(_SOFTWARE, "")),  # if there is None, it takes tifffile's name
    )
    return buffer.getvalue()
