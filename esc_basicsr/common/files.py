"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from esc_basicsr.common.errors import UserError


def is_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a file exists; False too where the name is too long for one."""
    return os.path.isfile(path)  # noqa: PTH113 - Path's raises for such a name


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder exists; False too where the name is too long for one."""
    return os.path.isdir(path)  # noqa: PTH112


def make_folder_of(path: Path) -> None:
    """Make the folder that a file is to be written into, and those above it.

    Raises:
        UserError: It cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made: {error.strerror or error}") from error


@contextlib.contextmanager
def written_whole(target: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Lend a file to write to; it takes the name ``target`` once it is complete and on the disk.

    Until then, and for good if anything fails or the process is killed, what bears that name stays as it is.
    A killed process may leave ``<target>.partial``, which the next writing of ``target`` replaces.

    Raises:
        UserError: The disk is full, or the file cannot be written for another reason.
    """
    path = Path(target)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{path} cannot be written: {error.strerror or error}. What it was before is unharmed."
            ) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Put a new name on the disk, where the system lets folders be opened (Windows does not)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
