"""Reading an LMDB of images, from any process."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb
import numpy as np
import numpy.typing as npt

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.image_codec import decode_image
from esc_basicsr.data.meta_info import read_meta_info
from esc_basicsr.data.stored_png import crop_stored_png

__all__ = ["ImageLMDB", "check_lmdb", "shared_environment"]

_WALK = Path(__file__).with_name("lmdb_walk.py")

# LMDB allows one environment for a file in a process: readers share it. Device and inode -> environment.
_environments: WeakValueDictionary[tuple[int, int], Any] = WeakValueDictionary()
_environments_pid = os.getpid()


def shared_environment(folder: Path) -> Any:
    """Open the LMDB in ``folder`` for this process, or share the environment that is open.

    Keep what it returns no longer than this process: ask again after a fork.

    Raises:
        UserError: There is no readable LMDB.
    """
    global _environments_pid
    if _environments_pid != os.getpid():
        # This process was forked. LMDB forbids the parent's environments here, and py-lmdb opens no second
        # one for a file while they are there. Closing our copies leaves the parent's untouched.
        for inherited in list(_environments.values()):
            inherited.close()
        _environments.clear()
        _environments_pid = os.getpid()
    try:
        status = (folder / "data.mdb").stat()
        file = (status.st_dev, status.st_ino)
        environment = _environments.get(file)
        if environment is None:
            check_lmdb(folder)
            environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
            _environments[file] = environment
    except (lmdb.Error, OSError) as error:
        raise UserError(f"the LMDB {folder} cannot be opened: {error}") from error
    return environment


def check_lmdb(folder: Path) -> None:
    """Refuse an LMDB that is cut short or damaged; look at it once while it stays unchanged.

    A process of its own looks first, as reading a damaged one may crash the process that reads.

    Raises:
        UserError: It cannot be opened, is cut short, or its tree of keys is damaged.
    """
    try:
        status = (folder / "data.mdb").stat()
        fault = _fault_of(folder, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"the LMDB {folder} cannot be opened: {error}") from error
    if fault:
        raise UserError(
            f"the LMDB {folder} cannot be read: data.mdb is cut short or damaged ({fault}). "
            "Copy or build it anew"
        )


@functools.lru_cache(maxsize=32)
def _fault_of(folder: Path, *_: int) -> str:
    walk = subprocess.run([sys.executable, _WALK, folder], capture_output=True, text=True, check=False)
    if not walk.returncode:
        return ""
    return " ".join(walk.stderr.split()) or f"LMDB crashed, exit code {walk.returncode}"


class ImageLMDB:
    """The images of one LMDB, read-only.

    Fit for data loaders: the environment is opened when a process first reads, is never carried through a
    fork, and is dropped on pickling. So workers may be forked or spawned at any time.

    Args:
        path: Folder with data.mdb and BasicSR's meta_info.txt (a line an image: ``name.png (h,w,c) level``;
            ``name`` is the key).

    Attributes:
        keys: The keys, in the order of meta_info.txt. They and ``sizes`` are read once per process for all
            readers of an unchanged file, take the file's bytes and 16 more an image, and are shared with
            forked workers.
        sizes: (len, 2) int32, height and width of each image as meta_info.txt states them; read-only.

    Raises:
        UserError: The folder, data.mdb or meta_info.txt is missing, or meta_info.txt is malformed or empty.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise UserError(
                f"the LMDB {self.path} does not exist. datasets/README.md says how it is made: "
                "python -m esc_basicsr lmdb"
            )
        for name in ("data.mdb", "meta_info.txt"):
            if not (self.path / name).is_file():
                raise UserError(f"{self.path} has no {name}: it is no image LMDB, or an incomplete one")
        self.keys, self.sizes = read_meta_info(self.path / "meta_info.txt")
        self._environment: Any = None
        self._pid: int | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the environment, which belongs to this process."""
        return {**self.__dict__, "_environment": None, "_pid": None}

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Decode image ``index``.

        Returns:
            (H, W, 3), BGR.

        Raises:
            UserError: The record is missing or cannot be decoded; the message names its key.
        """
        with self._record(index) as record:
            return decode_image(record, self._origin(index))

    def read_crop(self, index: int, top: int, left: int, height: int, width: int) -> npt.NDArray[np.uint8]:
        """Read a window of image ``index``; where the record is a stored PNG, without decoding it.

        Any other record, of a set that was made with compression or by other tools, is decoded as a whole.
        The pixels are the same.

        Returns:
            (height, width, 3), BGR.

        Raises:
            UserError: The record is missing, cannot be decoded, or is of another size than meta_info.txt
                states; the message names its key.
            ValueError: The window does not lie within the image.
        """
        rows, columns = size = tuple(self.sizes[index].tolist())
        if not (0 <= top < top + height <= rows and 0 <= left < left + width <= columns):
            raise ValueError(f"a window {width}x{height} at ({left}, {top}) is not within {columns}x{rows}")
        with self._record(index) as record:
            crop = crop_stored_png(record, size, top, left, height, width)
            if crop is not None:
                return crop
            image = decode_image(record, self._origin(index))
        if image.shape[:2] != size:
            raise UserError(
                f"{self._origin(index)} is {image.shape[1]}x{image.shape[0]}, but meta_info.txt says "
                f"{columns}x{rows}: rebuild the LMDB"
            )
        return image[top : top + height, left : left + width]

    @contextmanager
    def _record(self, index: int) -> Iterator[memoryview]:
        """Lend the bytes of a record, which lie in the mapped file."""
        if self._pid != os.getpid():
            self._environment = shared_environment(self.path)
            self._pid = os.getpid()
        key = self.keys[index]
        with self._environment.begin(buffers=True) as transaction:
            try:
                record = transaction.get(key.encode("utf-8"))
            except lmdb.Error as error:
                raise UserError(f"{self._origin(index)} cannot be read: {error}") from error
            if record is None:
                raise UserError(
                    f"the LMDB {self.path} has no record {key!r}, though its meta_info.txt lists it: "
                    "rebuild it"
                )
            yield record

    def _origin(self, index: int) -> str:
        return f"record {self.keys[index]!r} of the LMDB {self.path}"
