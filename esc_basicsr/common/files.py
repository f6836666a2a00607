"""Files that are written whole or not at all."""

import contextlib
import hashlib
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


def check_replaceable(path: Path) -> None:
    """See that a name is free, or a plain file's.

    Raises:
        UserError: It is something else's, such as a device's, or no file can have it.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no plain file, and is not replaced: give another name.")
    except OSError as error:  # too long, for one
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def written_whole(target: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Lend a file to write to; it takes the name ``target`` once it is complete and on the disk.

    Until then, and for good if anything fails or the process is killed, what bears that name stays as it is.
    Each writer has a file of its own, so that the last of several wins with a whole one: hidden, in the same
    folder. What a killed process leaves of it is taken over by the next writer of ``target``. A library that
    writes files itself may be given its ``name``.

    Raises:
        UserError: The disk is full, the file cannot be written for another reason, or what bears the name is
            no plain file.
    """
    path = Path(target)
    try:
        check_replaceable(path)
        partial, file = _open_partial(path)
        with file:  # to the end: its lock keeps others from the name
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if os.name == "nt":  # where open files are not renamed, and nothing is locked
                    file.close()
                partial.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. What it was before is unharmed."
        ) from error


def _open_partial(path: Path) -> tuple[Path, BinaryIO]:
    """Open a file beside ``path`` that no other writer has: one made of its name, or any."""
    with contextlib.suppress(ImportError, OSError):  # Windows; another writer's; a disk without locks
        import fcntl

        name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
        partial = path.with_name(f".{name}.partial")
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(open(partial, "wb", opener=_opened_as_it_is))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(
                os.fstat(file.fileno()), partial.stat()
            ):  # not renamed by its writer meanwhile
                file.truncate()  # which only plain files can be
                opened.pop_all()
                return partial, file
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    return partial, partial.open("xb")


def _opened_as_it_is(path: str, _: int) -> int:
    """Open a file for writing without emptying it, as it may be another writer's; links are not followed."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _sync_folder(folder: Path) -> None:
    """Put a new name on the disk, where the system lets folders be opened (Windows does not)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
