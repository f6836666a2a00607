"""Image files with all that belongs to an image: bit depth, transparency, colour profile, metadata."""

import io
import re
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import written_whole
from esc_basicsr.common.log import logger
from esc_basicsr.data.source_image import RefusedImageError, check_single, is_deep, open_image, refusing
from esc_basicsr.data.stored_png import png_chunk

__all__ = ["FORMATS", "ImageFile", "read_image", "write_image"]

Pixels = npt.NDArray[Any]

# suffix -> Pillow's name of the format
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_LONGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}

_ORIENTATION = 0x0112
_EXIF_IFD = 0x8769
_XMP_TAG = 700
_ICC_TAG = 34675
# Tags of a TIFF that say how its pixels are stored, which EXIF data of it have too.
_STORAGE = {
    *(254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, 292, 293),
    *(317, 318, 319, 320, 321, 322, 323, 324, 325, 330, 332, 333, 336, 337, 338, 339, 340, 341, 347, 529),
    *(530, 531, 532, _XMP_TAG, _ICC_TAG),
}
_DIRECTORIES = (_EXIF_IFD, 0x8825, 0xA005)  # EXIF's, GPS's, interoperability's
_WIDTH, _HEIGHT = 0xA002, 0xA003  # in EXIF's directory
_DESCRIPTION, _SOFTWARE = 270, 305
# Texts that 16-bit TIFFs keep: description, make, model, date, artist, rights; and the software.
_TEXT_TAGS = (_DESCRIPTION, 271, 272, 306, 315, 33432)

# EXIF's orientation -> transposed, upside down, left to right; in this order
_TURNS = {
    **{1: (False, False, False), 2: (False, False, True), 3: (False, True, True), 4: (False, True, False)},
    **{5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False)},
}


@dataclass(frozen=True)
class ImageFile:
    """An upright image and what its file says of it.

    Args:
        pixels: (H, W) gray or (H, W, 3) RGB; uint8 or uint16.
        alpha: (H, W), of the same type; None where nothing is transparent.
        icc: Its colour profile.
        exif: Its EXIF data, without orientation.
        xmp: Its XMP data.
        dpi: Resolution, horizontal and vertical.
        texts: Key and text of a PNG's text chunks; ``Comment`` is a JPEG's, too.
    """

    pixels: Pixels
    alpha: Pixels | None = None
    icc: bytes | None = None
    exif: Image.Exif = field(default_factory=Image.Exif)
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    texts: dict[str, str] = field(default_factory=dict)

    def enlarged(self, pixels: Pixels, alpha: Pixels | None) -> "ImageFile":
        """Return the same image with other pixels, and its new size in EXIF."""
        exif = Image.Exif()
        exif.load(self.exif.tobytes())
        # asking for a directory that is not there would make one
        directory = exif.get_ifd(_EXIF_IFD) if _EXIF_IFD in exif else {}
        for tag, side in ((_WIDTH, pixels.shape[1]), (_HEIGHT, pixels.shape[0])):
            if tag in directory:
                directory[tag] = side
        return replace(self, pixels=pixels, alpha=alpha, exif=exif)


def read_image(path: Path) -> ImageFile:
    """Read a PNG, JPEG, WebP, BMP or TIFF file, upright as EXIF says, with 8 or 16 bits.

    Palettes become colours; CMYK becomes sRGB by its colour profile where it has one.

    Raises:
        UserError: The file cannot be read, is no such image, is damaged, animated or of several pages.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not data:
        raise UserError(f"{path} is empty (0 bytes)")
    with refusing(str(path)):
        with open_image(io.BytesIO(data)) as header:
            check_single(header)
            deep = is_deep(header, data)
            header.verify()
        with open_image(io.BytesIO(data)) as image:
            exif = image.getexif()
            orientation = exif.get(_ORIENTATION, 1)
            if deep:
                pixels, alpha = _deep_pixels(image, data, orientation)
                icc = image.info.get("icc_profile")
            else:
                pixels, alpha, icc = _pixels(image)
            for tag in {_ORIENTATION, *_STORAGE} & exif.keys():
                del exif[tag]
            if str(exif.get(_DESCRIPTION)).startswith('{"shape": '):  # tifffile's, of the size that it was
                del exif[_DESCRIPTION]
            xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
            xmp = _upright_xmp(xmp.encode("utf-8") if isinstance(xmp, str) else xmp)
            return ImageFile(
                pixels, alpha, icc, exif, xmp, _resolution(image, transposed=orientation >= 5), _texts(image)
            )


def _texts(image: Image.Image) -> dict[str, str]:
    if isinstance(comment := image.info.get("comment"), bytes):
        return {"Comment": comment.decode("utf-8", "replace")}
    texts = getattr(image, "text", None) or {}
    return {key: str(value) for key, value in texts.items() if key != "XML:com.adobe.xmp"}


def _upright_xmp(xmp: bytes | None) -> bytes | None:
    """Reset the orientation in XMP: readers would apply it once more."""
    return xmp and re.sub(rb"(tiff:Orientation(?:=[\"']|>))\d", rb"\g<1>1", xmp)


def _resolution(image: Image.Image, transposed: bool) -> tuple[float, float] | None:
    dpi = image.info.get("dpi")
    if not dpi:
        return None
    horizontal, vertical = (float(value) for value in dpi)
    return (vertical, horizontal) if transposed else (horizontal, vertical)


def _pixels(image: Image.Image) -> tuple[Pixels, Pixels | None, bytes | None]:
    """Return pixels, transparency and colour profile of an image of at most 8 bits."""
    icc = image.info.get("icc_profile")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "CMYK":
        upright, icc = _to_srgb(upright, icc), None
    has_alpha = upright.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    is_gray = upright.mode in ("1", "L", "LA")
    array = np.asarray(
        upright.convert(("LA" if is_gray else "RGBA") if has_alpha else "L" if is_gray else "RGB")
    )
    if not has_alpha:
        return array, None, icc
    return np.squeeze(array[..., :-1], axis=2) if is_gray else array[..., :-1], array[..., -1], icc


def _to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc is None:
        return image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        converted = ImageCms.profileToProfile(
            image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (OSError, ImageCms.PyCMSError) as error:
        raise RefusedImageError(
            f"is CMYK, and its colour profile does not fit it ({error}): save it as RGB"
        ) from error
    assert converted is not None  # it is None where the image itself is changed
    return converted


def _deep_pixels(image: Image.Image, data: bytes, orientation: int) -> tuple[Pixels, Pixels | None]:
    if "transparency" in image.info:
        raise RefusedImageError("has 16 bits and a transparent colour, which is not read: save it with alpha")
    array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if array is None or array.dtype != np.uint16:
        raise RefusedImageError(
            "cannot be decoded: it is damaged, or its 16 bits are of a kind that is not read"
        )
    transposed, upside_down, left_to_right = _TURNS.get(orientation, _TURNS[1])
    if transposed:
        array = array.swapaxes(0, 1)
    array = array[:: -1 if upside_down else 1, :: -1 if left_to_right else 1]
    if array.ndim == 2:
        return np.ascontiguousarray(array), None
    # OpenCV gives gray with alpha as colour
    alpha = np.ascontiguousarray(array[..., 3]) if array.shape[2] == 4 else None
    is_gray = image.mode in ("LA", "I;16", "L", "I")
    return np.ascontiguousarray(array[..., 0] if is_gray else array[..., 2::-1]), alpha


def write_image(path: Path, image: ImageFile, quality: int = 95) -> None:
    """Write an image, whole or not at all; the suffix says in which format.

    Args:
        path: The file; one of that name is replaced.
        image: The image.
        quality: Of JPEG and WebP, 1 to 100.

    Raises:
        UserError: The format cannot hold it (transparency in JPEG, sides too long), or the file cannot be
            written.
    """
    kind = FORMATS[path.suffix.lower()]
    height, width = image.pixels.shape[:2]
    longest = _LONGEST_SIDE.get(kind)
    if longest is not None and max(height, width) > longest:
        raise UserError(f"{path}: {width} × {height} pixels are more than {kind} holds: write PNG or TIFF.")
    if kind == "JPEG" and image.alpha is not None:
        raise UserError(f"{path}: JPEG holds no transparency: write PNG, WebP or TIFF.")
    is_16_bit = image.pixels.dtype == np.uint16
    if _has_gray_profile(image) and _becomes_colour(image, kind):
        logger.warning("%s: gray is written as colour, its gray colour profile is dropped.", path)
        image = replace(image, icc=None)
    if is_16_bit and kind in ("JPEG", "WEBP"):
        raise UserError(f"{path}: {kind} holds 8 bits, the image has 16: write PNG or TIFF.")
    try:
        if not is_16_bit:
            content = _encode(image, kind, quality)
        else:
            content = _encode_deep_png(image) if kind == "PNG" else _encode_deep_tiff(image)
    except Exception as error:  # encoders raise what they like at metadata that they do not
        raise UserError(f"{path} cannot be written as {kind}: {type(error).__name__}: {error}") from error
    with written_whole(path) as file:
        file.write(content)


def _with_alpha(image: ImageFile) -> Pixels:
    """Stack colours or gray and transparency, if there is any: (H, W) or (H, W, C)."""
    if image.alpha is None:
        return image.pixels
    return np.dstack([image.pixels, image.alpha])


def _has_gray_profile(image: ImageFile) -> bool:
    return image.icc is not None and image.icc[16:20] == b"GRAY"  # the field of the profile's colours


def _becomes_colour(image: ImageFile, kind: str) -> bool:
    is_deep_with_alpha = image.pixels.dtype == np.uint16 and image.alpha is not None
    return image.pixels.ndim == 3 or kind == "WEBP" or is_deep_with_alpha


def _deep_channels(image: ImageFile) -> Pixels:
    """Stack as `_with_alpha`, but gray with transparency as colour: 16-bit encoders know no other."""
    array = _with_alpha(image)
    return array[..., [0, 0, 0, 1]] if array.ndim == 3 and array.shape[2] == 2 else array


def _encode(image: ImageFile, kind: str, quality: int) -> bytes:
    exif = Image.Exif()
    exif.load(image.exif.tobytes())
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
    Image.fromarray(np.ascontiguousarray(_with_alpha(image))).save(buffer, kind, **options)
    return buffer.getvalue()


def _png_texts(image: ImageFile) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, text in image.texts.items():
        info.add_text(key, text)
    if image.xmp:
        info.add_itxt("XML:com.adobe.xmp", image.xmp.decode("utf-8", "replace"))
    return info


def _encode_deep_png(image: ImageFile) -> bytes:
    """Encode pixels by OpenCV, as Pillow writes no colours of 16 bits, and metadata by Pillow."""
    array = _deep_channels(image)
    if array.ndim == 3:
        array = array[..., [2, 1, 0, *range(3, array.shape[2])]]
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(array))
    data = encoded.tobytes()
    # The chunks of an empty image that Pillow writes with the same metadata.
    plain = replace(image, pixels=np.zeros((1, 1), np.uint8), alpha=None)
    chunks = [
        (kind, content)
        for kind, content in _png_chunks(_encode(plain, "PNG", 0))
        if kind in (b"iCCP", b"eXIf", b"pHYs", b"tEXt", b"zTXt", b"iTXt")
    ]
    head = 8 + 12 + 13  # signature and IHDR
    return data[:head] + b"".join(png_chunk(*chunk) for chunk in chunks) + data[head:]


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, start = [], 8
    while start < len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        chunks.append((kind, data[start + 8 : start + 8 + length]))
        start += 12 + length
    return chunks


def _encode_deep_tiff(image: ImageFile) -> bytes:
    """Encode by tifffile, as Pillow writes no colours of 16 bits. Of EXIF only TIFF's own texts are kept."""
    array = _deep_channels(image)
    tags: list[tuple[Any, ...]] = [
        (tag, 2, 0, str(image.exif[tag]), True) for tag in _TEXT_TAGS if tag in image.exif
    ]
    if image.icc:
        tags.append((_ICC_TAG, 7, len(image.icc), image.icc, True))
    if image.xmp:
        tags.append((_XMP_TAG, 1, len(image.xmp), image.xmp, True))
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        array,
        photometric="minisblack" if array.ndim == 2 else "rgb",
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
