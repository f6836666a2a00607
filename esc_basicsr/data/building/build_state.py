"""The state of a build of LMDB sets on the disk: a killed build is continued.

A folder beside the sets holds ``asked.txt`` (the parameters; then every image with what identifies it) and
``done.jsonl`` (a line whenever records were committed). It is there from before the first record until the
sets have their final names.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import written_whole
from esc_basicsr.data.building.lmdb_set import Lengths
from esc_basicsr.data.building.skipped import Skipped

__all__ = ["BuildState", "Done", "build_state"]

_ASKED = "asked.txt"
_DONE = "done.jsonl"
_PATIENCE = 10.0  # seconds: the processes of a build that was just killed hold its lock until they have ended


class Done(NamedTuple):
    """The state of a build.

    Attributes:
        images: How many of the images are through, in their order.
        uncut: How many of these were not cut along a side.
        lengths: What each set holds of them.
        space: Bytes that all records were estimated to take, uncompressed.
        is_verified: Whether the sets are complete and verified, so that only their names are to be changed.
    """

    images: int
    uncut: int
    lengths: tuple[Lengths, ...]
    space: int
    is_verified: bool = False


class BuildState:
    """The state of one build, which this process alone works on.

    Attributes:
        done: How far the build is; None if it has yet to begin.
    """

    def __init__(self, folder: Path, discard: Callable[[], None]) -> None:
        self._folder = folder
        self._discard = discard
        self.done: Done | None = None
        self._journal: BinaryIO | None = None

    def read(self) -> None:
        """Set ``done`` to what the last complete line says; what a kill left of another is cut off."""
        file = self._folder / _DONE
        if not file.is_file():
            return
        end = 0
        with file.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                self.done = _parse(line, file)[0]
        os.truncate(file, end)

    def note(self, done: Done, skipped: Iterable[Skipped]) -> None:
        """Write down how far the build is, and which images were skipped since the last note."""
        if self._journal is None:
            self._journal = (self._folder / _DONE).open("ab")
        line = json.dumps({**done._asdict(), "skipped": [*skipped]})
        self._journal.write(f"{line}\n".encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.done = done

    def skipped(self) -> Iterator[Skipped]:
        """Yield all images that were skipped, as they were noted."""
        file = self._folder / _DONE
        with file.open("rb") as lines:
            for line in lines:
                yield from _parse(line, file)[1]

    def close(self) -> None:
        """Close what is open."""
        if self._journal is not None:
            self._journal.close()

    def remove(self) -> None:
        """Forget the build, whose sets have their names, or which has not begun."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def abandon(self) -> None:
        """Remove what was written, and forget the build."""
        self._discard()
        self.remove()


@contextmanager
def build_state(
    folder: Path, asked: Mapping[str, Any], images: Iterable[str], restart: bool, discard: Callable[[], None]
) -> Iterator[BuildState]:
    """Lend the state of the build that is asked for: of an interrupted one, or of one that is to begin.

    Args:
        folder: Where the state is kept.
        asked: The parameters, as JSON has them.
        images: What identifies each image, in their order: a line without line break, its key first.
        restart: Throw away an interrupted build.
        discard: Removes what was written of it.

    Raises:
        UserError: An interrupted build was asked for something else; or another process works on it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # It stays: whoever waits for a lock whose file is removed and made anew would hold another one.
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise UserError(f"another process is building these sets: {lock.lock_file} is locked") from None
    state = BuildState(folder, discard)
    try:
        file = folder / _ASKED
        if file.is_file() and not restart:
            difference = _difference(file, asked, images)
            if difference:
                raise UserError(
                    f"{folder} is of an interrupted build that was asked for something else: {difference}. "
                    "Ask for the same to go on with it, or pass --restart to throw it away and begin anew"
                )
            state.read()
        else:
            state.abandon()
            folder.mkdir()
            with written_whole(file) as lines:
                lines.write(f"{json.dumps(asked)}\n".encode())
                lines.writelines(f"{image}\n".encode() for image in images)
        yield state
    finally:
        state.close()
        if state.done is None:  # nothing was begun
            state.remove()
        lock.release()


def _parse(line: bytes, file: Path) -> tuple[Done, list[Skipped]]:
    try:
        noted = json.loads(line)
        skipped = [Skipped(*each) for each in noted.pop("skipped")]
        lengths = tuple(Lengths(*each) for each in noted.pop("lengths"))
        return Done(lengths=lengths, **noted), skipped
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{file} is damaged: pass --restart to begin the build anew") from None


def _difference(file: Path, asked: Mapping[str, Any], images: Iterable[str]) -> str | None:
    """Describe the first difference between a build and the one that is asked for now, or return None."""
    with file.open(encoding="utf-8") as lines:
        try:
            before = json.loads(next(lines))
        except (ValueError, StopIteration):
            return f"{file.name} is damaged"
        for name in {**before, **asked}:
            if before.get(name) != asked.get(name):
                return f"{name} was {before.get(name)} and is {asked.get(name)}"
        for line, image in zip_longest(lines, images):
            if line is None:
                return f"image {image.split(' ')[0]!r} was not among the images"
            if image is None:
                return f"image {line.split(' ')[0]!r} is no longer among the images"
            if line.rstrip("\n") != image:
                old, new = line.split(" ")[0], image.split(" ")[0]
                if old == new:
                    return f"image {new!r} has changed since"
                return f"the images are others, from {min(old, new)!r} on"
    return None
