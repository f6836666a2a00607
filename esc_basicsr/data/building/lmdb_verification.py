"""Verifying that an LMDB of images holds what its lists say."""

import itertools
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import lmdb
from tqdm import tqdm

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building.lmdb_set import CHECKSUMS
from esc_basicsr.data.image_codec import decode_image
from esc_basicsr.data.lmdb_reader import ImageLMDB, check_lmdb

__all__ = ["verify_lmdb"]

_PNG_SIZE = struct.Struct(">16xII")  # of its head: what precedes width and height, and these
_NAMED = 10  # faults that are named; a lost disk would fill the screen


_Known = tuple[int, int]  # bytes of a record, and their CRC-32
_UNKNOWN = (-1, 0)


def verify_lmdb(folder: Path, expected: int | None = None) -> int:
    """Look at every record that meta_info.txt lists.

    Where checksums.txt lies beside it, each record's bytes must have its checksum, which was taken when they
    had been seen to decode; this is as good as decoding them, and only as slow as reading. Otherwise, as in
    sets that BasicSR's scripts made, each record is decoded. Its size must be that of meta_info.txt.

    Args:
        folder: The set. More records than meta_info.txt lists are no fault: leaving images out of a set is
            done by taking out their lines.
        expected: The number of records there must be, and of lines that list them.

    Returns:
        Records looked at.

    Raises:
        UserError: There is no such set, its lists cannot be read, or records are missing or damaged; the
            message names the first ones.
    """
    images = ImageLMDB(folder)
    faults: list[str] = []  # the first ones
    count = 0
    check_lmdb(folder)
    try:
        # its own environment, as records are read in turn here: the readers' has no readahead
        environment = lmdb.open(str(folder), readonly=True, lock=False)
    except lmdb.Error as error:
        raise UserError(f"the LMDB {folder} cannot be opened: {error}") from error
    rows = zip(images.keys, images.sizes.tolist(), _known_of(images), strict=True)
    bar = tqdm(rows, f"checking {folder}", len(images), unit="record", disable=None)
    with environment, bar:
        entries = environment.stat()["entries"]
        if expected is not None and not entries == len(images) == expected:
            raise UserError(
                f"{folder} has {entries} records and lists {len(images)}; {expected} were put there. "
                "Build the set anew"
            )
        for key, size, known in bar:
            try:
                with environment.begin(buffers=True) as transaction:
                    fault = _fault(transaction.get(key.encode("utf-8")), (size[0], size[1]), known)
            except lmdb.Error as error:
                fault = f"cannot be read: {error}"
            if fault is not None:
                count += 1
                if count <= _NAMED:
                    faults.append(f"record {key!r} {fault}")
    if count:
        more = f"; and {count - _NAMED} more" if count > _NAMED else ""
        raise UserError(
            f"{folder}: {count} of {len(images)} records are not what they should be: "
            f"{'; '.join(faults)}{more}. Build the set anew"
        )
    return len(images)


def _known_of(images: ImageLMDB) -> Iterator[_Known | None]:
    """Yield what checksums.txt says of each image; None where there is no such file."""
    file = images.path / CHECKSUMS
    if not file.is_file():
        yield from itertools.repeat(None, len(images))
        return
    lines = _known(file)
    for key in images.keys:
        # lines may have been taken out of meta_info.txt
        yield next((known for name, known in lines if name == key), _UNKNOWN)


def _known(file: Path) -> Iterator[tuple[str, _Known]]:
    with file.open(encoding="ascii", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                key, length, checksum = line.split()
                yield key, (int(length), int(checksum, 16))
            except ValueError:
                raise UserError(
                    f"{file}, line {number}: expected 'key bytes checksum', got {line.rstrip()!r}"
                ) from None


def _fault(record: memoryview | None, size: tuple[int, int], known: _Known | None) -> str | None:
    """Return what is wrong with a record, as a message that follows its key, or None."""
    if record is None:
        return "is missing"
    if known is None:
        try:
            found = decode_image(record, "it").shape[:2]
        except UserError:
            return "cannot be decoded"
    elif known is _UNKNOWN:
        return f"is not listed in {CHECKSUMS}, or not in the order of meta_info.txt"
    elif (len(record), zlib.crc32(record)) != known:
        return "has other bytes than were written"
    else:
        width, height = _PNG_SIZE.unpack_from(record)
        found = height, width
    if found != size:
        return f"is {found[1]}x{found[0]}, but meta_info.txt says {size[1]}x{size[0]}"
    return None
