"""Logging that ends up in BasicSR's log file where BasicSR runs, and works without it."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

# A child of BasicSR's logger "basicsr": same handlers, same level on each rank.
logger = logging.getLogger("basicsr.esc")


_logged: set[str] = set()


def report_log_errors_once() -> None:
    """Have a log that cannot be written, as on a full disk, say so once, and without a traceback."""
    reported: list[object] = []

    def report(self: logging.Handler, record: logging.LogRecord) -> None:
        if self not in reported:
            reported.append(self)
            name = getattr(self, "baseFilename", "the log")
            print(f"{name} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)

    logging.Handler.handleError = report  # type: ignore[method-assign]


@contextlib.contextmanager
def warnings_of_this_thread() -> Iterator[list[str]]:
    """Collect what this thread warns of within the block, which then is not printed."""
    messages: list[str] = []
    thread = threading.get_ident()

    def is_printed(record: logging.LogRecord) -> bool:
        if record.thread != thread or record.levelno < logging.WARNING:
            return True
        messages.append(record.getMessage())
        return False

    logger.addFilter(is_printed)
    try:
        yield messages
    finally:
        logger.removeFilter(is_printed)


def info_once(message: str) -> None:
    """Log ``message`` at level INFO the first time it is logged in this process."""
    _once(logging.INFO, message)


def warn_once(message: str) -> None:
    """Log ``message`` at level WARNING the first time it is logged in this process."""
    _once(logging.WARNING, message)


def _once(level: int, message: str) -> None:
    import torch  # here, so that importing this module is light

    # torch.compile would cut its graph in two at a message.
    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        logger.log(level, message)
