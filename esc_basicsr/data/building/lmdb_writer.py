"""Making LMDB training sets: HR images, and bicubic LR images that match them."""

import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.common.parallel_map import parallel_map
from esc_basicsr.data.building.build_state import BuildState, Done, build_state
from esc_basicsr.data.building.image_keys import is_key
from esc_basicsr.data.building.lmdb_set import FILES, Lengths, LmdbSet
from esc_basicsr.data.building.lmdb_verification import verify_lmdb
from esc_basicsr.data.building.publish import (
    check_replaceable,
    partial_of,
    put_in_place,
    remove,
    sigterm_raises,
)
from esc_basicsr.data.building.skipped import Skipped, report_of, write_report
from esc_basicsr.data.building.sub_images import Cutting, Record, Source, make_records, space_needed

__all__ = ["COMPRESSION", "build_lmdb_sets"]

# None: records are read far more often than written, and are then cropped without decoding (docs/loader.md).
COMPRESSION = 0
_FORMAT = 2  # of what is written; a build of another is not continued
# Records wait in memory until so many bytes or seconds of them are committed and synced at once.
_COMMIT_BYTES = 32 * 2**20
_COMMIT_SECONDS = 5.0
_HEADS_AT_ONCE = 64  # images whose sizes a process reads as one task
_NAMED = 5  # skipped images that a message names


class _Result(NamedTuple):
    records: list[list[Record]]  # of each set; none if the image was skipped
    skipped: Skipped | None


class _Plan(NamedTuple):
    images: Mapping[str, Source]
    partials: list[Path]  # where the sets are written, HR first
    cutting: Cutting
    workers: int
    label: str


def build_lmdb_sets(
    images: Mapping[str, Source],
    output: Path,
    name: str,
    *,
    scales: Sequence[int] = (),
    crop_size: int = 480,
    step: int = 240,
    compression: int = COMPRESSION,
    workers: int = 1,
    overwrite: bool = False,
    restart: bool = False,
    skipped: Sequence[Skipped] = (),
) -> dict[int, Path]:
    """Write ``<name>_HR`` and, for each scale s, ``<name>_LR_bicubic_X<s>`` LMDBs into ``output``.

    HR is cropped to a multiple of every scale; the whole of it is reduced; then both are cut into sub-images
    that cover the same area, ``<key>_s001`` and on, row by row, the last window flush with the edge. An image
    shorter than ``crop_size`` is not cut along that side.

    The sets are verified and appear together when all are complete. However the process ended before, by a
    kill or a loss of power too, the same call goes on from the records committed last, seconds before, and
    ends with the same sets. Images that cannot be used are skipped, and listed in the file of `report_of`.

    In memory are the records of 2 * ``workers`` + 1 images, and of 32 MiB or 5 seconds of work.

    Args:
        images: Key to image file, or to the image itself: (H, W, 3), RGB. Keys must be ASCII without dots.
        output: Folder that receives the sets; made if need be.
        name: Prefix of the sets' names.
        scales: LR sets to write; none for HR alone.
        crop_size: Side of a sub-image in HR pixels, a multiple of every scale; 0 stores whole images. The
            names of sets of sub-images end in ``_sub``.
        step: Distance of sub-images in HR pixels, a multiple of every scale.
        compression: Of the records, which are PNGs: 0, stored as they are, to 9, smallest.
        workers: Processes that read, reduce and encode. With 1 it all happens in this process; a script that
            asks for more calls this under ``if __name__ == "__main__":``.
        overwrite: Replace sets of the same names.
        restart: Throw away what an interrupted build of these sets left.
        skipped: Images that are not among ``images``, for the report.

    Returns:
        Scale to the set's folder; 1 is HR.

    Raises:
        UserError: Impossible sizes, scales, compression or keys; no image that can be used; existing output;
            an interrupted build that was asked for something else; too small a disk.
    """
    cutting = Cutting(tuple(scales), crop_size, step, compression)
    cutting.check()
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    if not images:
        raise UserError("there are no images to make an LMDB of")
    for key in images:
        if not is_key(key):
            raise UserError(f"image key {key!r} must consist of ASCII letters, digits, '_' and '-'")
    suffix = "_sub.lmdb" if crop_size else ".lmdb"
    targets = {1: output / f"{name}_HR{suffix}"}
    targets |= {scale: output / f"{name}_LR_bicubic_X{scale}{suffix}" for scale in scales}
    folders = [target.resolve() for target in targets.values()]
    plan = _Plan(images, [partial_of(f) for f in folders], cutting, workers, f"{name} in {output}")
    state_folder = folders[0].with_name(folders[0].name + ".build")
    asked = {"format": _FORMAT, **cutting._asdict(), "scales": [*scales]}
    discard = partial(_discard, output, name, suffix)
    with sigterm_raises():
        try:
            with build_state(state_folder, asked, _identities(images), restart, discard) as state:
                if state.done is None or not state.done.is_verified:
                    check_replaceable(folders, FILES, overwrite)
                    done = _write(plan, state)
                    _report(state, report_of(folders[0]), skipped, len(images))
                    if done.uncut:
                        logger.warning(
                            "%d of %d images are shorter than %d pixels along a side, and not cut along it",
                            *(done.uncut, done.images, crop_size),
                        )
                    state.note(done._replace(is_verified=True), ())
                put_in_place(folders)
                state.remove()
        except OSError as error:
            raise UserError(f"{folders[0]} cannot be written: {error}") from error
    return targets


def _identities(images: Mapping[str, Source]) -> Iterator[str]:
    """Yield what identifies each image: its file's size and time, or a digest of its pixels."""
    for key, source in images.items():
        if isinstance(source, np.ndarray):
            digest = hashlib.blake2b(np.ascontiguousarray(source).data, digest_size=16)
            yield f"{key} {source.shape} {digest.hexdigest()}"
        else:
            try:
                status = Path(source).stat()
                yield f"{key} {status.st_size} {status.st_mtime_ns}"
            except OSError:
                yield f"{key} missing"


def _discard(output: Path, name: str, suffix: str) -> None:
    """Remove what an interrupted build left, of whatever scales."""
    for pattern in (f"{name}_HR{suffix}", f"{name}_LR_bicubic_X*{suffix}"):
        for folder in output.glob(partial_of(Path(pattern)).name):
            remove(folder)


def _write(plan: _Plan, state: BuildState) -> Done:
    """Bring the sets from where the state says they are to their end, and verify them."""
    done = state.done
    if done is None:
        done = Done(0, 0, (Lengths(0, 0, 0),) * len(plan.partials), _space_needed(plan))
        _check_space(plan, done.space)
        for folder in plan.partials:
            remove(folder)
            folder.mkdir()
        state.note(done, ())
    else:
        _check_space(plan, done.space)
    if done.images < len(plan.images):
        done = _write_records(plan, state, done)
    if done.lengths[0].records:
        for folder, lengths in zip(plan.partials, done.lengths, strict=True):
            try:
                verify_lmdb(folder, lengths.records)
            except UserError as error:
                raise UserError(f"{error}, by --restart") from error
    return done


def _space_needed(plan: _Plan) -> int:
    sources = iter(plan.images.values())
    chunks = iter(lambda: [*islice(sources, _HEADS_AT_ONCE)], [])
    spaces = parallel_map(partial(space_needed, cutting=plan.cutting), chunks, plan.workers)
    count = math.ceil(len(plan.images) / _HEADS_AT_ONCE)
    with closing(spaces), tqdm(spaces, f"estimating the space for {plan.label}", count, disable=None) as bar:
        return sum(bar)


def _check_space(plan: _Plan, space: int) -> None:
    disk = plan.partials[0].parent
    there = sum(file.stat().st_size for folder in plan.partials for file in folder.glob("*"))
    free, needed = shutil.disk_usage(disk).free / 1e9, (space - there) / 1e9
    if needed <= free:
        return
    if plan.cutting.compression == 0:
        raise UserError(
            f"{disk} has {free:.2f} GB of free space, and the sets need {needed:.2f} GB: make room, choose "
            "another disk, or store them with --compression 1"
        )
    logger.warning(
        "%s has %.2f GB of free space, and the sets need up to %.2f GB; photos take some 55 %% of that",
        disk, free, needed,
    )  # fmt: skip


def _write_records(plan: _Plan, state: BuildState, done: Done) -> Done:
    count, begin = len(plan.images), done.images
    if begin:
        logger.info("%s: continued from image %d of %d on", plan.label, begin + 1, count)
    tasks = islice(plan.images.items(), begin, None)
    skipped: list[Skipped] = []
    waiting = 0  # bytes
    committed = time.monotonic()
    try:
        with ExitStack() as stack:
            sets = [
                stack.enter_context(closing(LmdbSet(folder, plan.cutting.compression, lengths)))
                for folder, lengths in zip(plan.partials, done.lengths, strict=True)
            ]
            work = parallel_map(partial(_work, cutting=plan.cutting), tasks, plan.workers)
            results = stack.enter_context(closing(work))
            label = f"making {plan.label}"
            bar = tqdm(results, label, count, unit="image", initial=begin, disable=None)
            for result in stack.enter_context(bar):
                if result.skipped is not None:
                    skipped.append(result.skipped)
                else:
                    first = result.records[0][0]
                    is_uncut = min(first.height, first.width) < plan.cutting.crop_size
                    done = done._replace(uncut=done.uncut + is_uncut)
                    for lmdb_set, records in zip(sets, result.records, strict=True):
                        lmdb_set.put(records)
                        waiting += sum(len(record.png) for record in records)
                done = done._replace(images=done.images + 1)
                is_due = waiting >= _COMMIT_BYTES or time.monotonic() - committed >= _COMMIT_SECONDS
                if is_due or done.images == count:
                    done = done._replace(lengths=tuple(lmdb_set.commit() for lmdb_set in sets))
                    state.note(done, skipped)
                    skipped, waiting, committed = [], 0, time.monotonic()
    except BaseException:
        stored = state.done.images if state.done else 0
        logger.warning("%d of %d images are stored; the same command goes on from there", stored, count)
        raise
    return done


def _work(task: tuple[str, Source], cutting: Cutting) -> _Result:
    key, source = task
    try:
        return _Result(make_records(key, source, cutting), None)
    except (UserError, MemoryError, cv2.error) as error:
        origin = f"image {key!r}" if isinstance(source, np.ndarray) else str(source)
        reason = str(error).removeprefix(origin).strip() if isinstance(error, UserError) else repr(error)
        return _Result([], Skipped(origin, reason))


def _report(state: BuildState, report: Path, skipped: Sequence[Skipped], images: int) -> None:
    """List the images that were skipped; refuse sets without any image."""

    def every() -> Iterator[Skipped]:
        return chain(skipped, state.skipped())

    named = "; ".join(f"{image} {reason}" for image, reason in islice(every(), _NAMED))
    if not named:
        report.unlink(missing_ok=True)
        return
    count, total = write_report(report, every()), images + len(skipped)
    more = "; ..." if count > _NAMED else ""
    if count == total:
        state.abandon()
        raise UserError(f"none of the {total} images can be used, as {report} lists: {named}{more}")
    logger.warning("%d of %d images were skipped, as %s lists: %s%s", count, total, report, named, more)
