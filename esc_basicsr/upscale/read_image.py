"""Reading image files with all that belongs to an image."""

import importlib
import io
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import torch
from PIL import Image, ImageCms

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.common.memory import available_memory
from esc_basicsr.data.image_folder import IMAGE_SUFFIXES
from esc_basicsr.data.source_image import (
    RefusedImageError,
    decoded,
    exif_of,
    open_image,
    orientation_of,
    refusing,
)
from esc_basicsr.upscale.image_file import ImageFile, Pixels

MOST_PIXELS = 10**9  # of an image, by default
_DECODING = 3  # copies of an image that decoding takes, at most

READ_SUFFIXES = (*IMAGE_SUFFIXES, ".avif", ".heic", ".heif", ".jxl")
# Pillow's name of a format -> how its files begin (HEIF's after their first four bytes), the module that
# reads them, and what installs it
_PLUGINS = {
    "AVIF": (
        re.compile(rb"....ftyp(?:avi[fs]|(?:mif1|msf1).{4,32}avif)", re.DOTALL),
        "PIL.AvifImagePlugin",
        "pip install -U pillow",
    ),
    "HEIF": (
        re.compile(rb"....ftyp(?:hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL),
        "pillow_heif",
        "pip install 'esc-basicsr[heic]'",
    ),
    "JXL": (
        re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
        "pillow_jxl",
        "pip install 'esc-basicsr[jxl]'",
    ),
}

_ORIENTATION = 0x0112
_DESCRIPTION = 270
_XMP_TAG, _ICC_TAG = 700, 34675
_IPTC_TAGS = (33723, 34377)
_IPTC = 0x0404  # among a JPEG's resources of Photoshop
# Tags of a TIFF that say how its pixels are stored, which EXIF data of it have too.
_STORAGE = {
    *(254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 282, 283, 284),
    *(292, 293, 296, 297, 317, 320, 321, 322, 323, 324, 325, 330, 332, 333, 336, 337, 338, 339, 340, 341),
    *(347, 529, 530, 531, 532, _XMP_TAG, _ICC_TAG),
}
_TIFF_COLOUR = {301: "TransferFunction", 318: "WhitePoint", 319: "PrimaryChromaticities"}
_PNG_COLOUR = (b"cICP", b"mDCV", b"cLLI", b"gAMA", b"cHRM", b"sRGB")
_LIKE_SRGB = {1, 2, 6, 13}  # primaries and transfers of H.273: BT.709, unspecified, BT.601, sRGB
_GAIN_MAP = re.compile(rb"hdrgm:|HDRGainMap|Container:Directory")


def read_image(path: Path, most_pixels: int = MOST_PIXELS) -> ImageFile:
    """Read a PNG, JPEG, WebP, BMP or TIFF file, upright as EXIF says, with 8 or 16 bits.

    AVIF, HEIC and JPEG XL are read where Pillow or a plugin of it does; those of 10 or 12 bits become 16.

    Palettes become colours; CMYK becomes sRGB by its colour profile where it has one. The log names what
    cannot be kept.

    Args:
        path: The file.
        most_pixels: An image of more is refused.

    Raises:
        UserError: The file cannot be read, is no such image, is damaged, animated, of several pages, or
            larger than the memory or ``most_pixels``.
    """
    available = available_memory(torch.device("cpu"))
    try:
        size = path.stat().st_size
        if size > available:
            raise UserError(f"{path}: its {size / 2**30:,.1f} GiB do not fit into the memory")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    with refusing(str(path), most_pixels), open_image(data, _format_by_plugin(data)) as image:
        width, height = image.size
        samples = width * height * len(image.getbands())
        # perhaps, of the others
        is_deep = image.format in ("TIFF", *_PLUGINS) or (image.format == "PNG" and data[24] == 16)
        if (needed := _DECODING * samples * (2 if is_deep else 1)) > available:
            raise RefusedImageError(
                f"has {width} × {height} pixels, which take {needed / 2**30:,.1f} GiB to decode, and "
                f"{available / 2**30:,.1f} are available: cut it into parts, or close other programs"
            )
        exif = exif_of(image)
        transposed = orientation_of(image) in (5, 6, 7, 8)
        pixels, alpha = decoded(image, data, _deep_samples(image, data))
        icc = image.info.get("icc_profile")
        if pixels.ndim == 3 and pixels.shape[2] == 4:
            pixels, icc = _to_srgb(pixels, icc), None
        if image.format == "PNG":
            colour = {kind: content for kind, content in png_chunks(data) if kind in _PNG_COLOUR}
        else:
            colour = {} if icc else _colour_of_heif(data)
        return ImageFile(
            pixels,
            alpha,
            icc,
            _kept_exif(exif, image, str(path)),
            _kept_xmp(image, data, str(path)),
            _resolution(image, transposed),
            _texts(image, str(path)),
            colour,
            str(path),
        )


def _format_by_plugin(data: bytes) -> list[str]:
    """Load the plugin that a file needs, if any.

    Raises:
        RefusedImageError: It is not installed.
    """
    for kind, (signature, module, means) in _PLUGINS.items():
        if signature.match(data):
            try:
                plugin = importlib.import_module(module)
                if kind == "HEIF":
                    plugin.register_heif_opener(thumbnails=False)
                Image.init()
                if kind not in Image.OPEN:
                    raise ImportError(kind)
            except ImportError:
                raise RefusedImageError(f"is {kind}, which needs a plugin: {means}") from None
            return [kind]
    return []


def _deep_samples(image: Image.Image, data: bytes) -> Pixels | None:
    """Decode to 16 bits what has more than 8, of which Pillow keeps 8; None for other images.

    Raises:
        RefusedImageError: It is animated, or of floats, which a plugin of Pillow does not say.
    """
    if image.format == "AVIF":
        found = re.search(rb"av1C..(.)", data, re.DOTALL)
        bits = 8 if found is None else {2: 10, 3: 12}.get(found[1][0] >> 5 & 3, 8)  # its flags of depth
        samples = imagecodecs.avif_decode(data) if bits > 8 else None
    elif image.format == "HEIF":
        bits = image.info["bit_depth"]
        heif = importlib.import_module("pillow_heif")
        samples = None
        if bits > 8:
            samples = np.asarray(heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)) >> (16 - bits)
    elif image.format == "JXL" and not getattr(image, "jpeg", False):
        samples = imagecodecs.jpegxl_decode(data)
        if samples.shape[:2] != image.size[::-1]:
            raise RefusedImageError("is animated: save the frame that is wanted by itself")
        if samples.dtype.kind == "f" or (samples.ndim == 3 and samples.shape[2] > 4):
            raise RefusedImageError("has floats or more than 4 channels: save it with 8 or 16 bits")
        bits = _bits_of(samples, np.asarray(image))
    else:
        return None
    if samples is None or samples.dtype == np.uint8:
        return None
    return np.rint(samples * (65535 / (2**bits - 1))).clip(0, 65535).astype(np.uint16)


def _bits_of(samples: Pixels, known: Pixels) -> int:
    """Tell how many bits samples have, by the same image in the whole range of its type."""
    white = float(samples.mean()) / max(float(known.mean()), 1e-3) * np.iinfo(known.dtype).max
    return min((10, 12, 16), key=lambda bits: abs(math.log2(white + 1) - bits))


def _colour_of_heif(data: bytes) -> dict[bytes, bytes]:
    """Word as a PNG's chunk what HEIC and AVIF say of their primaries and transfer, unless that is usual."""
    found = re.search(rb"colrnclx(.{4})", data, re.DOTALL)
    if found is None:
        return {}
    primaries, transfer = struct.unpack(">HH", found[1])
    is_usual = {primaries, transfer} <= _LIKE_SRGB
    return {} if is_usual else {b"cICP": bytes([primaries, transfer, 0, 1])}  # as full-range RGB


def _kept_exif(exif: Image.Exif, image: Image.Image, name: str) -> Image.Exif:
    """Take out of EXIF data what says how the file's pixels were stored."""
    lost = [word for tag, word in _TIFF_COLOUR.items() if tag in exif]
    photoshop = image.info.get("photoshop")
    if exif.keys() & set(_IPTC_TAGS) or (isinstance(photoshop, dict) and _IPTC in photoshop):
        lost.append("IPTC")
    if lost:
        logger.warning("%s: %s cannot be kept.", name, ", ".join(lost))
    for tag in {_ORIENTATION, *_STORAGE, *_TIFF_COLOUR, *_IPTC_TAGS} & exif.keys():
        del exif[tag]
    if str(exif.get(_DESCRIPTION)).startswith('{"shape": '):  # tifffile's, of the size that it was
        del exif[_DESCRIPTION]
    return exif


def _kept_xmp(image: Image.Image, data: bytes, name: str) -> bytes | None:
    """Reset the orientation in XMP, which readers would apply once more; drop what tells of a gain map."""
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if image.format == "JXL" and (box := re.search(rb"(.{4})xml (?=<)", data, re.DOTALL)):
        xmp = data[box.end() : box.start() + int.from_bytes(box[1], "big")]  # its plugin reads none
    if image.format == "JXL" and b"brobxml " in data:
        logger.warning("%s: XMP that is compressed cannot be kept.", name)
    if not xmp:
        return None
    xmp = xmp.encode("utf-8") if isinstance(xmp, str) else bytes(xmp)
    if _GAIN_MAP.search(xmp):
        logger.warning("%s: its HDR gain map cannot be kept, nor XMP, which says that there is one.", name)
        return None
    return re.sub(rb"(tiff:Orientation(?:=[\"']|>))\d", rb"\g<1>1", xmp)


def _texts(image: Image.Image, name: str) -> dict[str, str]:
    """Return comments, without ImageMagick's raw profiles: the orientation in that of EXIF is applied."""
    if isinstance(comment := image.info.get("comment"), bytes):
        return {"Comment": comment.decode("utf-8", "replace")}
    texts = getattr(image, "text", None) or {}
    profiles = [key for key in texts if key.startswith("Raw profile type ")]
    if lost := sorted({*profiles} - {"Raw profile type exif"}):
        logger.warning("%s: %s cannot be kept.", name, ", ".join(lost))
    return {key: str(texts[key]) for key in texts if key not in ("XML:com.adobe.xmp", *profiles)}


def _resolution(image: Image.Image, transposed: bool) -> tuple[float, float] | None:
    try:
        horizontal, vertical = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # none, or none that makes sense
        return None
    if not all(math.isfinite(value) and value > 0 for value in (horizontal, vertical)):
        return None
    return (vertical, horizontal) if transposed else (horizontal, vertical)


def _to_srgb(pixels: Pixels, icc: bytes | None) -> Pixels:
    image = Image.fromarray(pixels, "CMYK")
    if icc is None:
        return np.asarray(image.convert("RGB"))
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        converted = ImageCms.profileToProfile(
            image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (OSError, ImageCms.PyCMSError) as error:
        raise RefusedImageError(
            f"is CMYK, and its colour profile does not fit it ({error}): save it as RGB"
        ) from error
    return np.asarray(converted)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of a PNG's chunks; of another file's bytes nothing that means something."""
    start = 8
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        yield kind, data[start + 8 : start + 8 + length]
        start += 12 + length
