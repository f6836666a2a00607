"""One LMDB of images as it is written: records, BasicSR's meta_info.txt, and checksums.txt beside it."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import lmdb

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building.sub_images import Record

__all__ = ["CHECKSUMS", "FILES", "META_INFO", "Lengths", "LmdbSet"]

META_INFO = "meta_info.txt"
# A line a record, in the order of meta_info.txt: key, bytes, CRC-32 in hexadecimal.
CHECKSUMS = "checksums.txt"
FILES = ("data.mdb", "lock.mdb", META_INFO, CHECKSUMS)

_FIRST_MAP_SIZE = 64 * 2**20


class Lengths(NamedTuple):
    """The part of a set that is there."""

    records: int
    meta_info: int  # bytes
    checksums: int  # bytes


class LmdbSet:
    """A set that is being written, to be closed by `contextlib.closing`.

    What is put waits in memory until it is committed. LMDB commits whole or not at all, and syncs; the lines
    of the text files follow. So a set holds at least what `commit` returned last, and perhaps records beyond
    it, after a kill of the process and after a loss of power alike.

    Args:
        folder: Where it is; it must exist.
        compression: Of the records, for the third field of meta_info.txt.
        lengths: What is to be there already. Lines beyond it are cut off; records beyond it are put again.

    Raises:
        UserError: What is to be there already is not.
    """

    def __init__(self, folder: Path, compression: int, lengths: Lengths) -> None:
        self._folder = folder
        self._compression = compression
        self._lengths = lengths
        self._waiting: list[Record] = []
        try:
            self._environment = lmdb.open(str(folder), map_size=_FIRST_MAP_SIZE)
        except lmdb.Error as error:
            raise UserError(f"{folder} cannot be continued: {error}. Pass --restart to begin anew") from error
        if self._environment.stat()["entries"] < lengths.records:
            raise UserError(
                f"{folder} has fewer records than it had when the build was interrupted: "
                "pass --restart to begin anew"
            )
        self._meta_info = _open_at(folder / META_INFO, lengths.meta_info)
        self._checksums = _open_at(folder / CHECKSUMS, lengths.checksums)

    def put(self, records: Sequence[Record]) -> None:
        """Take ``records`` in; they are written by `commit`."""
        self._waiting += records

    def commit(self) -> Lengths:
        """Write what waits, and sync it to the disk.

        Raises:
            UserError: LMDB cannot write, as when the disk is full.
            OSError: A text file cannot be written.
        """
        stored = False
        while not stored:
            try:
                with self._environment.begin(write=True) as transaction:
                    for record in self._waiting:
                        transaction.put(record.key.encode("ascii"), record.png)
                stored = True
            except lmdb.MapFullError:
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])
            except lmdb.Error as error:
                raise UserError(f"writing {self._folder} failed: {error}") from error
        _append(
            self._meta_info,
            (f"{r.key}.png ({r.height},{r.width},3) {self._compression}" for r in self._waiting),
        )
        _append(self._checksums, (f"{r.key} {len(r.png)} {r.checksum:08x}" for r in self._waiting))
        records = self._lengths.records + len(self._waiting)
        self._waiting = []
        self._lengths = Lengths(records, self._meta_info.tell(), self._checksums.tell())
        return self._lengths

    def close(self) -> None:
        """Let go of the files; what waits is not written."""
        self._meta_info.close()
        self._checksums.close()
        self._environment.close()


def _open_at(file: Path, length: int) -> BinaryIO:
    """Open a file to be written on from ``length``, cutting off what lies beyond."""
    opened = file.open("r+b" if file.exists() else "w+b")
    if opened.seek(0, os.SEEK_END) < length:
        opened.close()
        raise UserError(
            f"{file} is shorter than it was when the build was interrupted: pass --restart to begin anew"
        )
    opened.truncate(length)
    opened.seek(length)
    return opened


def _append(file: BinaryIO, lines: Iterable[str]) -> None:
    file.writelines(f"{line}\n".encode("ascii") for line in lines)
    file.flush()
    os.fsync(file.fileno())
