"""Whether the pages of an LMDB lead where they may: liblmdb follows them unseen, out of the file if need be.

What is looked at is what reading by keys depends on: the two heads, and of the tree of keys every page but
those of the records. Nothing of the records themselves is read.
"""

import functools
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esc_basicsr.common.errors import UserError

__all__ = ["check_pages"]

_MAGIC = 0xBEEFC0DE
_VERSION = 1
_HEAD = 16  # bytes of a page before its nodes' places: number, padding, flags, lower, upper
_BRANCH, _LEAF, _META = 1, 2, 8  # flags of pages
_KIND = 0x6F  # all flags that tell what a page is
_INTEGER_KEYS = 8  # the only setting there is, of the tree of free pages
_BIG = 1  # flag of a node whose record has pages of its own
_NODE = 8  # bytes of a node before its key
_DEEPEST = 32  # LMDB's own limit of levels
_KEPT = 32

Bytes = npt.NDArray[np.uint8]


class _Head(NamedTuple):
    page_size: int
    depth: int
    root: int
    last: int  # page


class _DamagedError(Exception):
    """What is wrong."""


def check_pages(file: Path) -> None:
    """Look at an LMDB's data file, once while it stays unchanged.

    Takes a second for a million records, and reads 1/1000 of a set of images.

    Args:
        file: data.mdb, on a machine of 64 bits, low byte first, as every common one is.

    Raises:
        UserError: It is cut short or damaged, so that reading it could crash.
    """
    try:
        status = file.stat()
        _check(file, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    except _DamagedError as error:
        raise UserError(
            f"the LMDB {file.parent} cannot be read: {file.name} is cut short or damaged ({error}). Copy or "
            "build it anew"
        ) from None
    except OSError as error:
        raise UserError(f"the LMDB {file.parent} cannot be opened: {error}") from error


@functools.lru_cache(maxsize=_KEPT)
def _check(file: Path, *_: int) -> None:
    with file.open("rb") as opened:
        if not os.fstat(opened.fileno()).st_size:
            raise _DamagedError("it is empty")
        data = np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    _check_tree(data, _newest_head(data))


def _newest_head(data: Bytes) -> _Head:
    """The head that holds, of the two that are written in turn."""
    page_size = int.from_bytes(data[40:44].tobytes(), "little")
    if page_size not in (2**power for power in range(9, 17)):
        raise _DamagedError("no head of an LMDB")
    heads = {}
    for number in (0, 1):
        page = data[number * page_size :][:page_size].tobytes()
        if len(page) < page_size:
            raise _DamagedError("a head is missing")
        flags = int.from_bytes(page[10:12], "little")
        magic, version, _, map_size, own_size, settings = struct.unpack_from("<IIQQIH", page, _HEAD)
        # after 48 bytes of the tree of free pages, which reading does not need, that of the records
        _, kinds, depth, *_, root = struct.unpack_from("<IHHQQQQQ", page, _HEAD + 24 + 48)
        last, transaction = struct.unpack_from("<QQ", page, _HEAD + 24 + 96)
        if not flags & _META or magic != _MAGIC or version != _VERSION or own_size != page_size:
            raise _DamagedError("no head of an LMDB")
        if kinds or settings & ~_INTEGER_KEYS:
            raise _DamagedError("its records are of a kind that no set of images has")
        if max(last, map_size) >= 2**47 or depth > _DEEPEST:
            raise _DamagedError("a head leads nowhere")
        heads[transaction, number == 0] = _Head(page_size, depth, root, last)
    head = heads[max(heads)]
    if (head.last + 1) * page_size > len(data):
        raise _DamagedError(f"{len(data):,} bytes of {(head.last + 1) * page_size:,}")
    return head


def _check_tree(data: Bytes, head: _Head) -> None:
    level = [] if head.root == 2**64 - 1 else [head.root]
    if bool(level) != bool(head.depth):
        raise _DamagedError("its head and its tree do not agree")
    seen = 0
    for depth in range(head.depth, 0, -1):
        below: list[int] = []
        for number in level:
            below += _children(data, head, number, is_leaf=depth == 1)
        seen += len(level)
        if seen + len(below) > head.last:
            raise _DamagedError("pages are there more than once")
        level = below


def _children(data: Bytes, head: _Head, number: int, is_leaf: bool) -> Iterator[int]:
    """The pages that a page of the tree leads to; a leaf leads to records, which must lie within the file."""
    if not 2 <= number <= head.last:
        raise _DamagedError(f"a page {number}, of {head.last + 1}")
    page = data[number * head.page_size : (number + 1) * head.page_size]
    own, _, flags, lower, upper = struct.unpack_from("<QHHHH", page.data)
    size = head.page_size
    if own != number or flags & _KIND != (_LEAF if is_leaf else _BRANCH):
        raise _DamagedError(f"page {number} is of the wrong kind")
    if not _HEAD + 2 <= lower <= upper <= size or lower % 2:
        raise _DamagedError(f"page {number} has no room for its nodes")
    places = page[_HEAD:lower].view("<u2").astype(np.int64)
    if places.min() < upper or places.max() + _NODE > size:
        raise _DamagedError(f"page {number} has nodes beyond it")
    nodes = page[places[:, None] + np.arange(_NODE)].view("<u2").astype(np.int64)
    low, high, node_flags, key_sizes = nodes.T
    ends = places + _NODE + key_sizes
    if not is_leaf:
        if ends.max() > size or len(places) < 2:
            raise _DamagedError(f"page {number} has nodes beyond it")
        yield from (low + (high << 16) + (node_flags << 32)).tolist()
        return
    lengths = low + (high << 16)
    if (node_flags & ~_BIG).any() or not key_sizes.min():
        raise _DamagedError(f"page {number} has records of another kind")
    is_big = node_flags == _BIG
    if (ends + np.where(is_big, 8, lengths)).max() > size:
        raise _DamagedError(f"page {number} has nodes beyond it")
    if is_big.any():
        first = page[ends[is_big, None] + np.arange(8)].view("<u8")[:, 0]
        needed = (_HEAD + lengths[is_big] + size - 1) // size  # pages
        if (
            first.min() < 2
            or first.max() > head.last
            or (first.astype(np.int64) + needed).max() > head.last + 1
        ):
            raise _DamagedError("a record lies beyond the file")
