"""From an HR image to the records of LMDB sets: cut, reduced, encoded, and decoded again to be sure."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.data.degradation import reduce_uint8
from esc_basicsr.data.image_codec import decode_image, encode_png
from esc_basicsr.data.image_folder import check_scales, crop_to_multiple, read_image
from esc_basicsr.data.source_image import source_image_size

__all__ = ["Cutting", "Record", "Source", "make_records", "space_needed"]

Source = str | Path | npt.NDArray[np.uint8]  # an image file, or the image itself: (H, W, 3), RGB

_PAGE = 4096  # bytes, LMDB's unit
_FRAME = 128  # bytes, more than a record's frame as a PNG takes
_LISTED = 512  # bytes, more than its entry in LMDB's tree and its lines in text files take


class Cutting(NamedTuple):
    """The cutting, reduction and encoding of every image."""

    scales: tuple[int, ...]  # of the LR images; none for HR alone
    crop_size: int  # side of a sub-image in HR pixels; 0 leaves images whole
    step: int  # distance of sub-images in HR pixels
    compression: int  # of the PNGs, from 0, stored as they are, to 9

    def check(self) -> None:
        """Refuse what cannot be made; warn of what is hardly meant.

        Raises:
            UserError: Impossible scales, sizes or compression.
        """
        check_scales(self.scales)
        if self.compression not in range(10):
            raise UserError(f"the compression must be from 0 (none) to 9 (smallest), got {self.compression}")
        multiple = self.multiple
        if self.crop_size < 0 or self.crop_size % multiple:
            raise UserError(
                f"the crop size must be 0 or a multiple of {multiple} for the scales, got {self.crop_size}"
            )
        if self.crop_size and (self.step < 1 or self.step % multiple):
            raise UserError(
                f"the step must be a positive multiple of {multiple} for the scales, got {self.step}"
            )
        if self.crop_size and self.step > self.crop_size:
            logger.warning(
                "the step, %d, is larger than the crop size, %d: what lies between sub-images is lost",
                self.step, self.crop_size,
            )  # fmt: skip

    @property
    def multiple(self) -> int:
        """Both sides of an image are cut to a multiple of this, so that every scale divides them."""
        return math.lcm(*self.scales)

    def starts(self, length: int) -> list[int]:
        """List where windows begin on a side of ``length`` pixels; the last one ends with the side."""
        if not self.crop_size or length <= self.crop_size:
            return [0]
        last = length - self.crop_size
        return [*range(0, last, self.step), last]


class Record(NamedTuple):
    """One image of a set."""

    key: str
    height: int
    width: int
    png: bytes
    checksum: int  # CRC-32 of these, once they were seen to decode to the image


def make_records(key: str, source: Source, cutting: Cutting) -> list[list[Record]]:
    """Make one image's records: a list for HR, then one for each scale, all with the same keys.

    Every record is decoded again and compared with its pixels: as the same bytes always give the same image,
    their checksum is from then on evidence that a record decodes, and to what.

    Raises:
        UserError: The image is refused or too small, or a record does not decode to what was encoded. The
            message begins with its path, or its key.
    """
    if isinstance(source, np.ndarray):
        origin = f"image {key!r}"
        image = source[:, :, ::-1]  # RGB, to OpenCV's BGR
    else:
        origin = str(source)
        image = read_image(Path(source))
    whole = crop_to_multiple(image, cutting.multiple, origin)
    height, width = whole.shape[:2]
    windows = [(top, left) for top in cutting.starts(height) for left in cutting.starts(width)]
    records: list[list[Record]] = []
    for scale in (1, *cutting.scales):
        resized = whole if scale == 1 else reduce_uint8(whole, scale)
        side = cutting.crop_size // scale or max(resized.shape)
        set_records = []
        for number, (top, left) in enumerate(windows, start=1):
            y, x = top // scale, left // scale
            part = np.ascontiguousarray(resized[y : y + side, x : x + side])
            record_key = f"{key}_s{number:03d}" if cutting.crop_size else key
            set_records.append(_encode(origin, record_key, part, cutting.compression))
        records.append(set_records)
    return records


def _encode(origin: str, key: str, image: npt.NDArray[np.uint8], compression: int) -> Record:
    png = encode_png(image, compression)
    if not np.array_equal(decode_image(png, origin), image):
        raise UserError(f"{origin} is not the same once it is encoded: this machine's memory may be faulty")
    return Record(key, image.shape[0], image.shape[1], png, zlib.crc32(png))


def space_needed(sources: Sequence[Source], cutting: Cutting) -> int:
    """Estimate, by the images' sizes, the bytes that all records take if nothing is compressed.

    An image whose size cannot be read counts nothing.
    """
    total = 0
    for source in sources:
        try:
            height, width = _size(source)
        except UserError:
            continue
        height, width = (side - side % cutting.multiple for side in (height, width))
        windows = len(cutting.starts(height)) * len(cutting.starts(width))
        side = cutting.crop_size or max(height, width)
        for scale in (1, *cutting.scales):
            rows, columns = min(height, side) // scale, min(width, side) // scale
            size = rows * (3 * columns + 6) + _FRAME
            # LMDB gives what is longer than half a page pages of its own; pages of others are not all full.
            stored = math.ceil(size / _PAGE) * _PAGE if size > _PAGE // 2 else 1.5 * size
            total += windows * math.ceil(stored + _LISTED)
    return total


def _size(source: Source) -> tuple[int, int]:
    if isinstance(source, np.ndarray):
        return source.shape[0], source.shape[1]
    try:
        with Path(source).open("rb") as file:
            return source_image_size(file, str(source))
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error
