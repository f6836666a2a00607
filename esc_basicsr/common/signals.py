"""Ctrl-C and SIGTERM as a wish to stop, which training fulfils after it has saved its state.

A cluster that preempts a job sends SIGTERM, and kills some seconds later.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Sooner than that a second Ctrl-C is no second wish: torchrun passes on the one that the terminal sent.
_PATIENCE = 2.0  # seconds
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

_wish: signal.Signals | None = None
_wished_at = 0.0
_is_heeded = False


def requested() -> signal.Signals | None:
    """Give the signal that asked this process to stop; None if none did."""
    return _wish


def exit_code() -> int:
    """Give the code to end with, by which a shell knows the signal; SIGTERM's if another rank was asked."""
    return 128 + (_wish or signal.SIGTERM)


def heed() -> None:
    """Promise to look at `requested` at every iteration. Until then a signal ends the process as usual."""
    global _is_heeded
    _is_heeded = True


@contextlib.contextmanager
def watched_for() -> Iterator[None]:
    """Note a signal to stop within the block, if somebody heeds it, instead of obeying; obey a second Ctrl-C.

    If nobody does, SIGTERM raises SystemExit, so that what cleans up runs.

    Only in the main thread, where signals arrive; elsewhere it does nothing.
    """
    global _wish, _is_heeded
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _wish, _is_heeded = None, False


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Have such signals wait, here and, unless they unblock them, in processes that are started here.

    A worker that is being started would else be ended by them before it can leave them to the main process.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def sent_with_parent(number: signal.Signals) -> None:
    """Have the system send this process a signal when its parent ends, however that ended; on Linux alone."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it has ended meanwhile
        os.kill(os.getpid(), number)


def ignored() -> None:
    """Leave stopping to the main process, from within one of its workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    global _wish, _wished_at
    now = time.monotonic()
    is_impatient = number == signal.SIGINT and _wish is not None and now - _wished_at > _PATIENCE
    if not _is_heeded or is_impatient:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the cleaning up
        raise SystemExit(128 + number)
    if _wish is None:
        _wish, _wished_at = signal.Signals(number), now
        print(
            f"{_wish.name}: training stops after this iteration and saves its state (Ctrl-C again: at once).",
            file=sys.stderr,
            flush=True,
        )
