"""An image and all that its file says of it, and what of that is still true when it is larger."""

import contextlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import IFDRational
from scipy.ndimage import distance_transform_edt

from esc_basicsr.common.log import logger

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
# suffix of a film that is written -> FFmpeg's name of the format
VIDEO_FORMATS = {".mkv": "matroska", ".mp4": "mp4", ".mov": "mov"}
DEFAULT_CRF = 16  # constant rate factor of a film's encoder: 0 best, 51 smallest

EXIF_IFD = 0x8769
_DIRECTORIES = (EXIF_IFD, 0x8825, 0xA005)  # EXIF's, GPS's, interoperability's
_WIDTH, _HEIGHT = 0xA002, 0xA003  # in EXIF's directory, as the following
_PIXELS_PER_UNIT = (0xA20E, 0xA20F)  # of the sensor
_PLACES = (0x9214, 0xA214)  # where the subject is, in pixels
# GeoTIFF's: size of a pixel, tie points, a matrix, and what the figures mean
_PIXEL_SCALE, _TIE_POINTS, _MATRIX, _KEYS = 33550, 33922, 34264, 34735
_RATIONAL = 50844  # polynomials that lead from the ground to pixels
GEO_TAGS = {_PIXEL_SCALE, _TIE_POINTS, _MATRIX, _KEYS, 34736, 34737, _RATIONAL}
_RASTER_TYPE, _IS_POINT = 1025, 2
# Sizes in XMP: count of pixels, or pixels per unit as a fraction.
_XMP_SIZE = re.compile(
    rb"((?:exif:Pixel[XY]Dimension|tiff:Image(?:Width|Length)|tiff:[XY]Resolution)(?:=[\"']|>)\s*)"
    rb"(\d+)(/0*[1-9]\d*)?"
)


@dataclass(frozen=True)
class ImageFile:
    """An upright image and what its file says of it.

    Args:
        pixels: (H, W) gray or (H, W, 3) RGB; uint8 or uint16.
        alpha: (H, W), of the same type; None where nothing is transparent.
        icc: Its colour profile.
        exif: Its EXIF data, without orientation; of a TIFF its other tags, too.
        xmp: Its XMP data.
        dpi: Resolution, horizontal and vertical.
        texts: Key and text of a PNG's text chunks; ``Comment`` is a JPEG's, too.
        colour: A PNG's chunks on what its numbers mean, such as gAMA, by their names.
        name: Of the file, for messages.
    """

    pixels: Pixels
    alpha: Pixels | None = None
    icc: bytes | None = None
    exif: Image.Exif = field(default_factory=Image.Exif)
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    texts: dict[str, str] = field(default_factory=dict)
    colour: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""

    def visible_colours(self) -> Pixels:
        """Return the pixels, those that are wholly transparent with the colour of the nearest that is not.

        What a program left below them would run into the edges of what is visible.
        """
        if self.alpha is None or self.alpha.all():
            return self.pixels
        if not self.alpha.any():
            return np.zeros_like(self.pixels)
        nearest = distance_transform_edt(self.alpha == 0, return_distances=False, return_indices=True)
        return self.pixels[tuple(nearest)]

    def resized(self, size: tuple[int, int]) -> "ImageFile":
        """Return the image with what its file says of sizes as it is at another height and width.

        Its pixels stay what they are.
        """
        height, width = self.pixels.shape[:2]
        factors = Fraction(size[1], width), Fraction(size[0], height)
        exif = copied_exif(self.exif, self.name)
        # asking for a directory that is not there would make one
        directory = exif.get_ifd(EXIF_IFD) if EXIF_IFD in exif else {}
        for tag, side in ((_WIDTH, size[1]), (_HEIGHT, size[0])):
            if tag in directory:
                directory[tag] = side
        axes = {_PIXELS_PER_UNIT[0]: factors[:1], _PIXELS_PER_UNIT[1]: factors[1:]}
        for tag, own in (axes | dict.fromkeys(_PLACES, factors)).items():
            if tag in directory and (value := _times(directory.pop(tag), own)) is not None:
                directory[tag] = value
        if GEO_TAGS & exif.keys() and not _scale_georeference(exif, factors):
            logger.warning(
                "%s: its georeference is of a kind that is not rescaled: it is dropped.", self.name
            )
            for tag in GEO_TAGS & exif.keys():
                del exif[tag]
        xmp = self.xmp and _XMP_SIZE.sub(lambda found: _larger_in_xmp(found, factors), self.xmp)
        dpi = None if self.dpi is None else (self.dpi[0] * float(factors[0]), self.dpi[1] * float(factors[1]))
        return replace(self, exif=exif, xmp=xmp, dpi=dpi)


def copied_exif(exif: Image.Exif, name: str = "") -> Image.Exif:
    """Copy EXIF data, without tags whose values are none that EXIF can hold; the log names them."""
    copy = Image.Exif()
    try:
        copy.load(exif.tobytes())
        return copy
    except Exception:  # what Pillow raises depends on the values
        copy.clear()
    lost = []
    for directory in (None, *_DIRECTORIES[:2]):
        with contextlib.suppress(Exception):  # a directory that is none
            values = exif if directory is None else exif.get_ifd(directory)
            for tag in set(values) - {*_DIRECTORIES}:
                try:
                    alone = Image.Exif()
                    for target in (alone, copy):  # the first to see that it can be written
                        (target if directory is None else target.get_ifd(directory))[tag] = values[tag]
                        alone.tobytes()
                except Exception:
                    lost.append(ExifTags.TAGS.get(tag, str(tag)))
    logger.warning("%s: EXIF's %s make no sense, and are dropped.", name, ", ".join(lost) or "directories")
    return copy


def _larger_in_xmp(found: re.Match[bytes], factors: tuple[Fraction, Fraction]) -> bytes:
    """Multiply a number of XMP, or a fraction, by the factor of the axis that it is of."""
    is_height = any(word in found[1] for word in (b"YDim", b"Length", b"YRes"))
    value = Fraction((found[2] + (found[3] or b"")).decode()) * factors[is_height]
    if found[3] is None:
        return found[1] + b"%d" % round(value)
    value = value.limit_denominator(10**6)
    return found[1] + b"%d/%d" % (value.numerator, value.denominator)


def _times(value: Any, factors: Sequence[Fraction]) -> Any:
    """Multiply a number or several by the factors in turn; None if one is none."""
    values = value if isinstance(value, tuple) else (value,)
    try:
        are_numbers = all(isinstance(one, int | float | IFDRational) and math.isfinite(one) for one in values)
    except ZeroDivisionError:
        return None
    if not are_numbers:
        return None
    scaled = tuple(
        IFDRational(Fraction(float(one)).limit_denominator(10**6) * factor)
        if isinstance(one, IFDRational | float)
        else round(one * factor)
        for one, factor in zip(values, itertools.cycle(factors), strict=False)
    )
    return scaled if isinstance(value, tuple) else scaled[0]


def _scale_georeference(exif: Image.Exif, factors: tuple[Fraction, Fraction]) -> bool:
    """Rescale a GeoTIFF's tags, if its pixels are areas and its figures are such as the format has."""
    across, down = map(float, factors)
    try:
        keys = exif.get(_KEYS, ())
        entries = [tuple(keys[first : first + 4]) for first in range(4, len(keys), 4)]
        is_point = any(entry[0] == _RASTER_TYPE and entry[3] == _IS_POINT for entry in entries)
        if is_point or _RATIONAL in exif:
            return False
        if (size := exif.get(_PIXEL_SCALE)) is not None:
            exif[_PIXEL_SCALE] = (float(size[0]) / across, float(size[1]) / down, float(size[2]))
        if (points := exif.get(_TIE_POINTS)) is not None:  # column, row, height, and the same on the ground
            exif[_TIE_POINTS] = tuple(
                float(value) * (across, down, 1, 1, 1, 1)[place % 6] for place, value in enumerate(points)
            )
        if (matrix := exif.get(_MATRIX)) is not None:
            exif[_MATRIX] = tuple(
                float(value) / (across, down, 1, 1)[place % 4] for place, value in enumerate(matrix)
            )
    except (TypeError, ValueError, IndexError):
        return False
    return True
