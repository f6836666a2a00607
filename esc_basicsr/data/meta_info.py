"""BasicSR's list of an LMDB's images, meta_info.txt, in little memory."""

import functools
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esc_basicsr.common.errors import UserError

__all__ = ["Keys", "read_meta_info"]

# "0801_s003.png (480,480,3) 1". The key ends at the first dot, as in BasicSR's paired_paths_from_lmdb.
_LINE = re.compile(r"([^.\n]+)\.[^\n]*\((\d{1,9}),\s*(\d{1,9}),\s*\d+\)", re.ASCII)
_KEPT = 32  # lists of a process; a mix of sets for training and some for validation are well below


class Keys(Sequence[str]):
    """Keys of images, held as one string of bytes.

    A list of str would take four times the memory, and a worker that was forked would copy it bit by bit, as
    every use of an object writes its count of references.

    Args:
        text: The keys' bytes in UTF-8, one after the other.
        ends: (len,) where each ends.
    """

    def __init__(self, text: bytes, ends: npt.NDArray[np.int64]) -> None:
        self._text = text
        self._ends = ends

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # nobody takes slices
        """Return a key."""
        position = range(len(self))[index]
        begin = int(self._ends[position - 1]) if position else 0
        return self._text[begin : int(self._ends[position])].decode()

    def __iter__(self) -> Iterator[str]:
        """Yield the keys in turn."""
        begin = 0
        for end in map(int, self._ends):
            yield self._text[begin:end].decode()
            begin = end

    def __eq__(self, other: object) -> bool:
        """Return whether ``other`` is a sequence of the same keys."""
        if isinstance(other, Keys):
            return self._text == other._text and np.array_equal(self._ends, other._ends)
        if isinstance(other, list | tuple):
            return [*self] == [*other]
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]


def read_meta_info(file: Path) -> tuple[Keys, npt.NDArray[np.int32]]:
    """Read an LMDB's keys and sizes, or return those read before from the same unchanged file.

    Args:
        file: A line an image: ``name.png (h,w,c) level``; ``name`` is the key.

    Returns:
        The keys, and (len, 2) height and width, read-only.

    Raises:
        UserError: The file is missing, empty, malformed or no UTF-8.
    """
    try:
        status = file.stat()
        return _read(file, status.st_mtime_ns, status.st_size, status.st_ino)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


@functools.lru_cache(maxsize=_KEPT)
def _read(file: Path, *_: int) -> tuple[Keys, npt.NDArray[np.int32]]:
    text, ends, sizes = bytearray(), array("q"), array("i")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                match = _LINE.match(line.decode())
            except UnicodeDecodeError:
                match = None
            if match is None:
                found = line.decode(errors="replace").rstrip()
                raise UserError(
                    f"{file}, line {number}: expected 'name.png (height,width,channels) level', got {found!r}"
                )
            text += match[1].encode()
            ends.append(len(text))
            sizes.extend((int(match[2]), int(match[3])))
    if not ends:
        raise UserError(f"{file} lists no images: rebuild the LMDB")
    table = np.array(sizes, dtype=np.int32).reshape(-1, 2)
    table.flags.writeable = False
    return Keys(bytes(text), np.array(ends, dtype=np.int64)), table
