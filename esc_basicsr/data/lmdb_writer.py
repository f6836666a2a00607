"""Making LMDB training sets: HR images, and bicubic LR images that match them."""

import math
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import cv2
import lmdb
import numpy as np
import numpy.typing as npt
import torch

from esc_basicsr.data.degradation import reduce_uint8
from esc_basicsr.data.image_codec import encode_png
from esc_basicsr.data.image_folder import check_scales, crop_to_multiple, find_images, read_image
from esc_basicsr.data.progress import progress
from esc_basicsr.data.publish import publishing
from esc_basicsr.errors import UserError
from esc_basicsr.log import logger

__all__ = ["COMPRESSION", "build_lmdb_sets", "collect_images"]

# None: records are read far more often than written, and are then cropped without decoding (docs/loader.md).
COMPRESSION = 0
_FILES = ("data.mdb", "lock.mdb", "meta_info.txt")
_FIRST_MAP_SIZE = 64 * 2**20
_LONGEST_KEY = 500  # LMDB's limit is 511 bytes; a sub-image adds its number


class _Record(NamedTuple):
    key: str
    height: int
    width: int
    png: bytes


class _Task(NamedTuple):
    key: str
    source: Path | npt.NDArray[np.uint8]
    scales: tuple[int, ...]
    crop_size: int
    step: int
    compression: int


def collect_images(folders: Sequence[Path]) -> dict[str, Path]:
    """Give every image under ``folders`` a key: its path within its folder, without suffix, joined by ``_``.

    Keys are sorted. They are ASCII and without dots, as BasicSR needs: a letter beyond ASCII is written as
    its code point, any other sign as ``_``.

    Raises:
        UserError: A folder is missing or empty, or two images get one key.
    """
    images: dict[str, Path] = {}
    for folder in folders:
        for relative in find_images(folder, recursive=True):
            key = _ascii_key("_".join(relative.with_suffix("").parts))
            path = folder / relative
            if key in images:
                raise UserError(
                    f"{images[key]} and {path} would both be stored as {key!r}: rename one of them"
                )
            if len(key) > _LONGEST_KEY:
                raise UserError(
                    f"{path}: its key would have {len(key)} letters, at most {_LONGEST_KEY} are possible"
                )
            images[key] = path
    return dict(sorted(images.items()))


def _ascii_key(name: str) -> str:
    ascii_name = "".join(letter if letter.isascii() else f"u{ord(letter):x}" for letter in name)
    return re.sub(r"[^A-Za-z0-9_-]", "_", ascii_name)


def build_lmdb_sets(
    images: Mapping[str, Path | npt.NDArray[np.uint8]],
    output: Path,
    name: str,
    *,
    scales: Sequence[int] = (),
    crop_size: int = 480,
    step: int = 240,
    compression: int = COMPRESSION,
    workers: int = 1,
    overwrite: bool = False,
) -> dict[int, Path]:
    """Write ``<name>_HR`` and, for each scale s, ``<name>_LR_bicubic_X<s>`` LMDBs into ``output``.

    HR is cropped to a multiple of every scale; the whole of it is reduced; then both are cut into sub-images
    that cover the same area, ``<key>_s001`` and on, row by row, the last window flush with the edge. An image
    shorter than ``crop_size`` is not cut along that side. The sets appear together when all are complete.

    Args:
        images: Key to image file, or to the image itself: (H, W, 3), RGB. Keys must be ASCII without dots.
        output: Folder that receives the sets; made if need be.
        name: Prefix of the sets' names.
        scales: LR sets to write; none for HR alone.
        crop_size: Side of a sub-image in HR pixels, a multiple of every scale; 0 stores whole images. The
            names of sets of sub-images end in ``_sub``.
        step: Distance of sub-images in HR pixels, a multiple of every scale.
        compression: Of the records, which are PNGs: 0, stored as they are, to 9, smallest.
        workers: Processes that read, reduce and encode. With 1 it all happens in this process.
        overwrite: Replace sets of the same names.

    Returns:
        Scale to the set's folder; 1 is HR.

    Raises:
        UserError: Impossible sizes, scales, compression or keys; an unreadable or too small image; existing
            output.
    """
    _check_numbers(scales, crop_size, step, compression, workers)
    if not images:
        raise UserError("there are no images to make an LMDB of")
    for key in images:
        if not key or _ascii_key(key) != key:
            raise UserError(f"image key {key!r} must consist of ASCII letters, digits, '_' and '-'")
    suffix = "_sub.lmdb" if crop_size else ".lmdb"
    targets = {1: output / f"{name}_HR{suffix}"}
    targets |= {scale: output / f"{name}_LR_bicubic_X{scale}{suffix}" for scale in scales}

    tasks = (
        _Task(key, source, tuple(scales), crop_size, step, compression) for key, source in images.items()
    )
    uncut = 0
    with publishing(list(targets.values()), _FILES, overwrite) as partials, ExitStack() as stack:
        writers = [stack.enter_context(_LmdbWriter(partial, compression)) for partial in partials]
        results = stack.enter_context(closing(_run_in_order(_make_records, tasks, workers)))
        bar = stack.enter_context(progress(f"making LMDB sets {name} in {output}", len(images)))
        for records_of_sets in results:
            for writer, records in zip(writers, records_of_sets, strict=True):
                writer.put(records)
            first = records_of_sets[0][0]
            uncut += min(first.height, first.width) < crop_size
            bar.update()
    if uncut:
        logger.warning(
            "%d of %d images are shorter than %d pixels along a side and were not cut along it",
            uncut, len(images), crop_size,
        )  # fmt: skip
    return targets


def _check_numbers(scales: Sequence[int], crop_size: int, step: int, compression: int, workers: int) -> None:
    check_scales(scales)
    if compression not in range(10):
        raise UserError(f"the compression must be from 0 (none) to 9 (smallest), got {compression}")
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    multiple = math.lcm(*scales)
    if crop_size < 0 or crop_size % multiple:
        raise UserError(
            f"the crop size must be 0 or a multiple of {multiple} for the scales, got {crop_size}"
        )
    if crop_size and (step < 1 or step % multiple):
        raise UserError(f"the step must be a positive multiple of {multiple} for the scales, got {step}")
    if crop_size and step > crop_size:
        logger.warning(
            "the step, %d, is larger than the crop size, %d: what lies between sub-images is left out",
            step, crop_size,
        )  # fmt: skip


def _make_records(task: _Task) -> list[list[_Record]]:
    """One image's records: a list for HR, then one for each scale. All lists have the same keys."""
    multiple = math.lcm(*task.scales)
    if isinstance(task.source, Path):
        image = read_image(task.source)
        origin = str(task.source)
    else:
        image = task.source[:, :, ::-1]  # RGB, to OpenCV's BGR
        origin = f"image {task.key!r}"
    whole = crop_to_multiple(image, multiple, origin)
    height, width = whole.shape[:2]
    lefts = _starts(width, task.crop_size, task.step)
    windows = [(top, left) for top in _starts(height, task.crop_size, task.step) for left in lefts]
    records: list[list[_Record]] = []
    for scale in (1, *task.scales):
        resized = whole if scale == 1 else reduce_uint8(whole, scale)
        side = task.crop_size // scale or max(resized.shape)
        set_records = []
        for number, (top, left) in enumerate(windows, start=1):
            y, x = top // scale, left // scale
            part = np.ascontiguousarray(resized[y : y + side, x : x + side])
            key = f"{task.key}_s{number:03d}" if task.crop_size else task.key
            png = encode_png(part, task.compression)
            set_records.append(_Record(key, part.shape[0], part.shape[1], png))
        records.append(set_records)
    return records


def _starts(length: int, crop_size: int, step: int) -> list[int]:
    """Where windows of ``crop_size`` begin on a side of ``length``; the last one ends with the side."""
    if not crop_size or length <= crop_size:
        return [0]
    last = length - crop_size
    return [*range(0, last, step), last]


def _run_in_order(
    function: Callable[[_Task], list[list[_Record]]], tasks: Iterable[_Task], workers: int
) -> Generator[list[list[_Record]], None, None]:
    """``map`` over processes, with few results waiting at a time so that memory stays flat."""
    if workers == 1:
        yield from map(function, tasks)
        return
    pending: deque[Future[list[list[_Record]]]] = deque()
    with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
        try:
            for task in tasks:
                pending.append(pool.submit(function, task))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"a worker process died, perhaps for want of memory: use fewer than {workers} --workers"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which stops the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker has the main process's handler
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    # One thread each: the workers fill the cores, and thread pools do not survive the fork.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _end_with_main_process() -> None:
    """A killed main process cannot stop its workers, which would wait for tasks for ever."""
    main_process = multiprocessing.parent_process()
    if main_process is not None:
        main_process.join()
        os._exit(1)


class _LmdbWriter:
    """Writes records into a new LMDB with BasicSR's meta_info.txt."""

    def __init__(self, folder: Path, compression: int) -> None:
        self._folder = folder
        self._compression = compression
        # Nothing reads the set before it is complete, so that syncing once, at the end, is enough.
        self._environment = lmdb.open(str(folder), map_size=_FIRST_MAP_SIZE, sync=False)
        self._meta_info = (folder / "meta_info.txt").open("w", encoding="ascii", newline="\n")

    def __enter__(self) -> "_LmdbWriter":
        return self

    def put(self, records: Sequence[_Record]) -> None:
        """Commit ``records``, enlarging the map when it is full.

        Raises:
            UserError: LMDB cannot write, as when the disk is full.
        """
        stored = False
        while not stored:
            try:
                with self._environment.begin(write=True) as transaction:
                    for record in records:
                        transaction.put(record.key.encode("ascii"), record.png)
                stored = True
            except lmdb.MapFullError:
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])
            except lmdb.Error as error:
                raise UserError(f"writing {self._folder} failed: {error}") from error
        for record in records:
            size = f"({record.height},{record.width},3)"
            self._meta_info.write(f"{record.key}.png {size} {self._compression}\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._meta_info.close()
        if kind is None:
            self._environment.sync(True)
        self._environment.close()
