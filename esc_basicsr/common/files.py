"""Files that are written whole or not at all."""

import contextlib
import os
import secrets
import tempfile
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


def check_writable(folder: Path) -> None:
    """Make a folder, and those above it, and see that files can be written into it.

    Raises:
        UserError: It cannot be made, or nothing be written into it.
    """
    make_folder_of(folder / "file")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: nothing can be written here: {error.strerror or error}") from error


@contextlib.contextmanager
def written_whole(target: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Lend a file to write to; it takes the name ``target`` once it is complete and on the disk.

    Until then, and for good if anything fails or the process is killed, what bears that name stays as it is.
    Each writer has a file of its own, so that the last of several wins with a whole one; a killed process may
    leave it: ``.<random>.partial``, hidden, in the same folder.

    Raises:
        UserError: The disk is full, the file cannot be written for another reason, or what bears the name is
            no plain file.
    """
    path = Path(target)
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no plain file, and is not replaced: give another name.")
        with partial.open("xb") as file:
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
