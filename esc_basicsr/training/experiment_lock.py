"""One run at a time in an experiment's folder: a second one would move the first one's away."""

import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import check_writable
from esc_basicsr.common.log import logger

__all__ = ["hold", "release"]

_held: list[FileLock] = []


def hold(folder: Path) -> None:
    """Take the lock of an experiment, or of a test's results, until `release` or this process's end.

    The system gives it back when the process is gone, however it ended.

    Args:
        folder: The experiment's; the lock lies beside it, with the name of who holds it.

    Raises:
        UserError: Another process has it, or nothing can be written there.
    """
    check_writable(folder.parent)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    holder = folder.with_name(f".{folder.name}.holder")
    try:
        lock.acquire()
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise UserError(
            f"{folder} is in use by {who}: wait for it to end, or give this run another name."
        ) from None
    except (NotImplementedError, OSError) as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): start no second run in it.", folder, error)
        return
    _held.append(lock)
    holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    # A log is named by the second it was begun in: one of the same second would be written over.
    while any(folder.glob(f"*_{time.strftime('%Y%m%d_%H%M%S')}.log")):
        time.sleep(0.1)


def release() -> None:
    """Give back what this process holds."""
    while _held:
        _held.pop().release()
