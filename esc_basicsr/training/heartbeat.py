"""Ranks that watch one another: when one dies, the others end soon after, and say which one and why.

torch.distributed by itself leaves them waiting: gloo for half an hour, NCCL for ten minutes; and torchrun
neither notices a rank that hangs nor says, on the others, which one ended first and why. Here a thread of
each rank writes signs of life, and how the rank ends, into torch's store, and reads the others'. So a rank
may compute, load or save for as long as it likes; collectives are still under torch's own time limits.
"""

import atexit
import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

import psutil
import torch.distributed as dist

from esc_basicsr.common.errors import UserError
from esc_basicsr.training import meeting, ranks

__all__ = ["DEFAULT_LIMIT", "agree_to_end", "start", "watched"]

DEFAULT_LIMIT = 60.0  # seconds
_GRACE = 3.0  # seconds that a message has to arrive
_USER_ERROR = 2  # exit code
_TERMINATED = 128 + signal.SIGTERM
_GONE = "is gone without a word: it was killed (out of memory?) or crashed"
_DEAD = (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE)
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def start(limit: float = DEFAULT_LIMIT) -> None:
    """Begin to watch the other ranks; called on every rank, once the process group exists.

    Args:
        limit: Seconds without a sign of life after which a rank is taken for dead. A death that another
            rank's machine can see (a process gone, an exception) ends the others within seconds.
    """
    global _watch
    if dist.get_world_size() < 2:
        return
    _watch = _Watch(limit)
    atexit.register(_end_unwatched)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # torchrun sends it as soon as a rank has died: the others are to say so first.
        with contextlib.suppress(ValueError):  # signals arrive in the main thread, and this is another
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_TERMINATED))


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Report to the other ranks how the block ends, and end here if another rank's end is why.

    Then the process ends at once, after a message that one of the ranks prints: with exit code 1, or 2 where
    that rank's end was a `UserError`. Of several ranks that raise a `UserError` one raises it. Without other
    ranks it does nothing.
    """
    try:
        yield
    except BaseException as error:
        _end(error)
        raise
    _end(None)


def agree_to_end() -> None:
    """Say, on every rank, that all are about to end, whatever their exit codes: none is taken for dead."""
    if _watch is not None:
        _watch.has_agreed = True


_watch: "_Watch | None" = None


def _end(error: BaseException | None) -> None:
    global _watch
    watch, _watch = _watch, None
    if watch is not None:
        watch.end(error)


def _end_unwatched() -> None:
    """For a script that calls BasicSR's pipeline itself: how it ended is known when Python exits."""
    _end(getattr(sys, "last_value", None))


class _End(NamedTuple):
    """The end of a rank."""

    code: int  # 0: the others go on
    rank: int
    why: str  # goes on after the rank's name


class _Watch:
    """The state of the other ranks, as one rank knows it."""

    def __init__(self, limit: float) -> None:
        self.limit, self.interval = limit, min(limit / 10, 0.5)
        self.rank = dist.get_rank()
        self.keeps_store = self.rank == 0 and meeting.is_store_of_rank_0()
        self.store = meeting.connect("watch")
        self.store.set(str(self.rank), "0")
        self.store.set("cause", "")
        places = ranks.gather((socket.gethostname(), os.getpid()))
        self.names = [f"rank {rank} (process {pid} on {host})" for rank, (host, pid) in enumerate(places)]
        self.others = [rank for rank in range(len(places)) if rank != self.rank]
        self.neighbours: dict[int, psutil.Process] = {}  # ranks on this machine
        for rank in self.others:
            if places[rank][0] == places[self.rank][0]:
                with contextlib.suppress(psutil.NoSuchProcess):  # it is in another container
                    self.neighbours[rank] = psutil.Process(places[rank][1])
        self.ended: dict[int, str] = {}  # others, and why
        self.own_end: _End | None = None
        self.has_agreed = False  # to end
        self.beat = 0
        self.is_reported, self.is_over = threading.Event(), threading.Event()
        self.is_ending = threading.Lock()
        self.thread = threading.Thread(target=self._exchange, daemon=True)
        self.thread.start()
        if meeting.is_store_of_rank_0() and not self.keeps_store:
            threading.Thread(target=self._guard, daemon=True).start()

    def end(self, error: BaseException | None) -> None:
        """Report how this rank ends; does not return if another's end is the reason."""
        if error is not None:
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway, and is to say why
        code = _code_of(error)
        if _is_of_a_collective(error):  # a rank has left it: where it died, the thread ends this process
            _wait_for(lambda: bool(self.ended), self.limit + _GRACE)
            for rank, why in [*self.ended.items()]:
                self._blame(_End(1, rank, f"{why} before the others were done"))
        elif code == _TERMINATED and not self.has_agreed:
            time.sleep(_GRACE)  # torchrun has perhaps seen a rank die
        why = f"ended with exit code {code}" if isinstance(error, SystemExit | None) else _described(error)
        self.own_end = _End(0 if self.has_agreed else code, self.rank, why)
        if self.own_end.code:
            self._blame(self.own_end)
        self.is_reported.wait(_GRACE)
        if self.keeps_store:  # until the others, who need it, have ended, soon where this one is the reason
            seconds = 2 * _GRACE if self.own_end.code else math.inf
            _wait_for(lambda: len(self.ended) == len(self.others), seconds)
        self.is_over.set()
        self.thread.join(_GRACE)

    def _exchange(self) -> None:
        """Write signs of life, and how this rank ends; read the others'."""
        heard, silences = dict.fromkeys(self.others, b""), dict.fromkeys(self.others, 0.0)
        keys = [*map(str, self.others), "cause"]
        try:
            while not self.is_over.wait(self.interval):
                self.beat += 1
                own_end = self.own_end
                gone = [rank for rank in self.neighbours if self._status(rank) in _DEAD]
                self.store.set(str(self.rank), json.dumps(own_end or self.beat))
                *values, cause = self.store.multi_get(keys)  # after `gone`, who may have written before that
                if own_end is not None:
                    self.is_reported.set()
                    if not self.keeps_store:
                        return
                elif cause:
                    self._follow(_End(*json.loads(cause)))
                for rank, value in zip(self.others, values, strict=True):
                    # in rounds, not by the clock: a stopped process that goes on has not listened either
                    silences[rank] = silences[rank] + self.interval if value == heard[rank] else 0.0
                    heard[rank] = value
                    if value.startswith(b"["):
                        self.ended[rank] = _End(*json.loads(value)).why
                    elif rank in gone or silences[rank] > self.limit:
                        self.ended[rank] = _GONE if rank in gone else self._silent(rank)
                        if own_end is None:
                            self._blame(_End(1, rank, self.ended[rank]))
        except dist.DistError:  # the store is gone
            if meeting.is_store_of_rank_0() and self.own_end is None:
                self._follow(_End(1, 0, _GONE), has_store=False)
            self.is_reported.set()  # there is no one to hear it

    def _guard(self) -> None:
        """See that rank 0, which keeps the store, answers: without it `_exchange` waits for ever."""
        silence, beat = 0.0, 0
        while not self.is_over.wait(self.interval):
            silence, beat = silence + self.interval if beat == self.beat else 0.0, self.beat
            if silence > self.limit:
                self._follow(_End(1, 0, self._silent(0)), has_store=False)

    def _blame(self, end: _End) -> None:
        """Have a rank's end be the reason for all, unless there is one; another's ends this process."""
        with contextlib.suppress(dist.DistError):  # the store is gone
            end = _End(*json.loads(self.store.compare_set("cause", "", json.dumps(end))))
        if end.rank != self.rank:
            self._follow(end)

    def _follow(self, end: _End, has_store: bool = True) -> NoReturn:
        """End the process now, because of another rank: Python's own way out may wait for a collective."""
        self.is_ending.acquire()  # never released: one thread does it
        is_reporter = True
        with contextlib.suppress(dist.DistError):
            if has_store:
                is_reporter = self.store.add("reports", 1) == 1
                self.store.set(str(self.rank), json.dumps(end))
        if is_reporter and end.code != _USER_ERROR:  # which its own rank prints
            print(
                f"error: {self.names[end.rank]} {end.why}. The other ranks cannot go on without it, and end. "
                "A training goes on from its newest checkpoint when it is started again with --auto_resume.",
                file=sys.stderr,
            )
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if self.keeps_store:
            time.sleep(_GRACE)  # in which the others read why
        os._exit(_USER_ERROR if end.code == _USER_ERROR else 1)

    def _silent(self, rank: int) -> str:
        is_stopped = rank in self.neighbours and self._status(rank) in _STOPPED
        note = " (its process is stopped)" if is_stopped else ""
        return f"stopped answering for {self.limit:g} s{note}"

    def _status(self, rank: int) -> str:
        try:
            return self.neighbours[rank].status()
        except psutil.NoSuchProcess:
            return psutil.STATUS_DEAD


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def _code_of(error: BaseException | None) -> int:
    if isinstance(error, SystemExit):
        # as Python ends: a text is printed, and the code is 1
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, UserError | None):
        return 0 if error is None else _USER_ERROR
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return f"ended with {type(error).__name__}{text and f': {text}'}"


def _is_of_a_collective(error: BaseException | None) -> bool:
    """Tell whether it is what ranks raise when another has left them; gloo's have no type of their own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL", "by peer"))
    )
