"""Ranks that watch one another: when one dies, the others end soon after, and say which one and why.

torch.distributed by itself leaves them waiting: gloo for half an hour, NCCL for ten minutes, and what they
raise then is that a connection was closed, not by whom. Here each rank has a thread that tells the others it
is there, by a number that grows, in the store that the ranks met at, and its last words when it ends. The
number comes from a thread, so a rank may compute, load or save for as long as it likes; what the ranks do to
one another in collectives is still under torch's own time limits.

Nothing is compared but changes, seen by the reader's own clock; clocks of different machines may differ.
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from esc_basicsr.common.errors import UserError

__all__ = ["DEFAULT_LIMIT", "agree_to_end", "start", "watched"]

DEFAULT_LIMIT = 60.0  # seconds

# Seconds from learning of a death until this rank ends: so long its main thread has to end by itself.
_GRACE = 3.0
# After a collective failed, a rank that is silent for so many seconds, and questions, is why.
_SUSPICIOUS_SILENCE = 5.0
_SUSPICIOUS_QUESTIONS = 4

# Exit code of ranks that do not take the others with them.
_PEACEFUL = 0
_USER_ERROR = 2


class _Rank(NamedTuple):
    """Where a rank runs."""

    host: str
    pid: int
    place: str | None  # equal for processes that see each other in /proc; None if there is none
    birth: str | None  # tells a process from a later one of the same pid


class _End(NamedTuple):
    """How a rank ends, and the rank whose end it is about: itself, or the one that took it along."""

    code: int
    rank: int | None  # None: none, but what they meet at
    why: str  # goes on after the rank's name


def start(limit: float = DEFAULT_LIMIT) -> None:
    """Begin to watch the other ranks; called on every rank, once the process group is there.

    Args:
        limit: Seconds without a sign of life after which a rank is taken for dead. A death that can be seen
            at once (a process gone, an exception) ends the others within seconds, whatever it is.
    """
    global _watch
    if dist.get_world_size() < 2:
        return
    _watch = _Watch(limit)
    atexit.register(_end_unwatched)
    if _is_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # torchrun sends it as soon as a rank has died: the others are to say so first.
        signal.signal(signal.SIGTERM, _exit)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Tell the other ranks how what is done within it ends, and end here if another rank's end is why.

    Then the process ends with exit code 1, or 2 where that rank's end was a `UserError`, after a message
    that one of the ranks prints. A `UserError` that several ranks raise alike is raised on one of them; the
    others end with exit code 2. Without other ranks it does nothing.
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


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _end(error: BaseException | None) -> None:
    global _watch
    watch, _watch = _watch, None
    if watch is not None:
        watch.end(error)


def _end_unwatched() -> None:
    """For a script that calls BasicSR's pipeline itself: how it ended is known when Python exits."""
    with contextlib.suppress(SystemExit):  # too late for another exit code
        _end(getattr(sys, "last_value", None))


class _Watch:
    """What one rank knows of the others.

    One thread talks to the store, and waits as long as that does; another judges by what is known.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.rank = dist.get_rank()
        own = (_Rank(socket.gethostname(), os.getpid(), _place(), _birth(os.getpid())), uuid.uuid4().hex)
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, own)
        self.ranks = [rank for rank, _ in told]
        self.others = [number for number in range(len(told)) if number != self.rank]
        self.room = told[0][1]  # in the store: one that no earlier run, restarted by torchrun, has used
        # torchrun offers a store that outlives the ranks. Else rank 0 has it, and goes last.
        self.has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.is_host = self.rank == 0 and not self.has_agent
        self.address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        # one question a second does no harm to a store that serves 64 ranks
        self.interval = min(limit / 10, max(0.5, len(told) / 64))
        self.suspicion = min(limit, max(_SUSPICIOUS_SILENCE, _SUSPICIOUS_QUESTIONS * self.interval))

        self.ends: dict[int, _End] = {}
        self.silences = dict.fromkeys(self.others, 0.0)  # seconds in which this rank was listening
        self.unanswered = 0.0  # seconds since the store last answered
        self.rounds = 0  # how often every rank's word was read
        self.gone_since: dict[int, int] = {}  # rank -> the round in which its process was seen to be gone
        self.lost_at: float | None = None  # when the connection to the store broke
        self.own_end: _End | None = None
        self.has_agreed = False  # to end
        self.has_told_own_end = threading.Event()
        self.failed_at: float | None = None  # when a collective failed here
        self.cause: _End | None = None
        self.has_cause = threading.Event()
        self.has_left = threading.Event()
        self.is_quitting = threading.Lock()
        self.claims: queue.SimpleQueue[tuple[str, Future[bool]] | None] = queue.SimpleQueue()
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._talk, self._judge)]
        for thread in self.threads:
            thread.start()

    # The main thread's

    def end(self, error: BaseException | None) -> None:
        """Tell the others how this rank ends; does not return if another's end is the reason."""
        if error is not None and _is_main_thread():
            # It ends anyway, and is not to be kept from saying why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._is_due_to_another(error):
            assert self.cause is not None
            self._quit(self.cause)
        is_first = not isinstance(error, UserError) or self._claim(str(error))
        code = _code_of(error)
        why = f"ended with exit code {code}" if isinstance(error, SystemExit | None) else _say(error)
        self._leave(_End(_PEACEFUL if self.has_agreed else code, self.rank, why))
        self.claims.put(None)
        for thread in self.threads:  # Python aborts, should it end while one is in the store's own code
            thread.join(self._patience())
        if not is_first:
            raise SystemExit(_USER_ERROR)

    def _is_due_to_another(self, error: BaseException | None) -> bool:
        if isinstance(error, UserError | None):
            return False
        if isinstance(error, Exception):
            if _is_of_a_collective(error):
                self.failed_at = time.monotonic()
                self.has_cause.wait(2 * self.suspicion)
        elif any(self._is_process_gone(rank) for rank in self.others if rank not in self.ends):
            self.has_cause.wait(_GRACE)  # asked to stop by torchrun, which has seen that before this rank
        return self.cause is not None

    def _leave(self, end: _End) -> None:
        """Say ``end`` to the others; where the store is here, stay until they have ended too."""
        self.own_end = end
        self.claims.put(None)
        self.has_told_own_end.wait(self._patience())
        # If they do not end because of this rank, they may work on for long; the judging thread looks on.
        is_last = end.code == _PEACEFUL
        deadline = time.monotonic() + 2 * self.suspicion
        while self.is_host and (is_last or time.monotonic() < deadline):
            here = [rank for rank in self.others if rank not in self.ends]
            if not here or (not is_last and all(r == end.rank or self._is_process_gone(r) for r in here)):
                break
            time.sleep(self.interval)
        self.has_left.set()

    # Both threads'

    def _quit(self, cause: _End) -> NoReturn:
        """End the process now: Python's own way out may wait for a collective."""
        self.is_quitting.acquire()  # never released: one thread does it
        if cause.code != _USER_ERROR and self._claim(f"end of {cause.rank}"):
            print(f"error: {self._message(cause)}", file=sys.stderr, flush=True)
        self._leave(cause)
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(cause.code)

    def _message(self, cause: _End) -> str:
        if cause.rank is None:
            who = f"what the ranks meet at, {self.address[0]}:{self.address[1]},"
        else:
            rank = self.ranks[cause.rank]
            who = f"rank {cause.rank} (process {rank.pid} on {rank.host})"
        return (
            f"{who} {cause.why}. The other ranks cannot go on without it, and end. A training goes on from "
            "its newest checkpoint when it is started again with --auto_resume."
        )

    def _claim(self, what: str) -> bool:
        """Whether this rank is the first to say ``what``; yes, too, if the store does not answer."""
        answer: Future[bool] = Future()
        self.claims.put((what, answer))
        try:
            return answer.result(timeout=self._patience())
        except Exception:
            return True

    def _patience(self) -> float:
        """Seconds to wait for the store, which may be known not to answer."""
        return _GRACE if self.unanswered < self.suspicion else 0.0

    # The talking thread's

    def _talk(self) -> None:
        from torch.distributed.distributed_c10d import PrefixStore  # PyTorch may be built without it

        try:
            client = dist.TCPStore(  # type: ignore[attr-defined]
                *self.address,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=max(self.limit, 1)),
            )
            self._exchange(PrefixStore(f"esc_basicsr/{self.room}", client))
        except Exception:  # whatever it is, there is no talking to the others any more
            self.lost_at = time.monotonic()
            self.has_told_own_end.set()
            while not self.has_left.is_set():
                claim = self.claims.get()
                if claim is not None:
                    claim[1].set_result(True)

    def _exchange(self, store: Any) -> None:
        words: dict[int, bytes] = {}
        last = time.monotonic()
        while not self.has_left.is_set():
            end = self.own_end
            store.set(str(self.rank), json.dumps([self.rounds, end]))
            there = [rank for rank in self.others if rank in words or store.check([str(rank)])]
            answers = dict(zip(there, store.multi_get([*map(str, there)]), strict=True) if there else ())
            now = time.monotonic()
            for rank in self.others:
                if answers.get(rank) == words.get(rank):
                    # a stopped process that goes on has heard nothing for long, but not listened either
                    self.silences[rank] += min(now - last, 2 * self.interval)
                    continue
                self.silences[rank], words[rank] = 0.0, answers[rank]
                _, said = json.loads(answers[rank])
                if said is not None:
                    self.ends[rank] = _End(*said)
            last, self.unanswered = now, 0.0
            self.rounds += 1
            if end is not None:
                self.has_told_own_end.set()
            with contextlib.suppress(queue.Empty):
                claim = self.claims.get(timeout=self.interval)
                if claim is not None:
                    claim[1].set_result(store.add(f"said: {claim[0]}", 1) == 1)

    # The judging thread's

    def _judge(self) -> None:
        last = time.monotonic()
        while not self.has_left.wait(self.interval):
            now = time.monotonic()
            self.unanswered += min(now - last, 2 * self.interval)
            last = now
            if self.own_end is not None and self.own_end.code != _PEACEFUL:
                return  # others end because this one does
            self.cause = self._find_cause()
            if self.cause is not None:
                self.has_cause.set()
                if not self.has_left.wait(_GRACE):
                    self._quit(self.cause)
                return

    def _find_cause(self) -> _End | None:
        """The end of another rank because of which this one cannot go on; None if there is none."""
        ends = self.ends.copy()  # the talking thread adds to it
        here = [rank for rank in self.others if rank not in ends]
        for end in ends.values():
            if end.code != _PEACEFUL:
                return end._replace(code=_USER_ERROR if end.code == _USER_ERROR else 1)
        for rank in here:
            if self._is_process_gone(rank):
                # Its last words, if any, came before: another round will have read them.
                since = self.gone_since.setdefault(rank, self.rounds)
                if self.rounds >= since + 2 or self.lost_at is not None:
                    return _End(1, rank, "is gone without a word: it was killed (out of memory?) or crashed")
        host = None if self.has_agent else 0
        if self.lost_at is not None:
            if time.monotonic() - self.lost_at < 1:
                return None  # the process that it was in may be about to be seen gone
            return _End(1, host, "is gone" if host is None else "is gone, and with it what the ranks meet at")
        limit = self.limit if self.failed_at is None else self.suspicion
        if self.unanswered > limit:
            return _End(1, host, f"stopped answering for {limit:g} s{self._stopped(host)}")
        silent = max(here, key=self.silences.__getitem__, default=None)
        if silent is not None and self.silences[silent] > limit:
            return _End(1, silent, f"stopped answering for {limit:g} s{self._stopped(silent)}")
        if self.failed_at is not None and time.monotonic() - self.failed_at > 1.5 * self.suspicion:
            for rank, end in ends.items():
                return _End(1, rank, f"{end.why} before the others were done")
        return None

    def _stopped(self, rank: int | None) -> str:
        is_stopped = rank is not None and self._state_of(rank) in ("T", "t")
        return " (its process is stopped)" if is_stopped else ""

    def _is_process_gone(self, rank: int) -> bool:
        return self._state_of(rank) == "gone"

    def _state_of(self, number: int) -> str | None:
        """The state letter of a rank's process, or ``gone``; None if it cannot be seen from here."""
        rank = self.ranks[number]
        if rank.place is None or rank.place != self.ranks[self.rank].place:
            return None
        state, birth = _read_process(rank.pid)
        return "gone" if birth != rank.birth or state in ("Z", "X") else state


def _place() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}" if _birth(os.getpid()) else None
    except OSError:
        return None


def _birth(pid: int) -> str | None:
    return _read_process(pid)[1]


def _read_process(pid: int) -> tuple[str | None, str | None]:
    """State and start time of a process as /proc has them; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return None, None


def _code_of(error: BaseException | None) -> int:
    if isinstance(error, SystemExit):
        # as Python ends: a text is printed, and the code is 1
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 0 if error is None else _USER_ERROR if isinstance(error, UserError) else 1


def _say(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (
        f"ended with {type(error).__name__}: {text[:500]}" if text else f"ended with {type(error).__name__}"
    )


def _is_of_a_collective(error: Exception) -> bool:
    """Whether it is what ranks raise when another has left them; gloo's have no type of their own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL", "by peer"))
    )
