"""Ranks that watch one another: when one dies, the others end soon after, and say which one and why.

torch.distributed by itself leaves them waiting: gloo for half an hour, NCCL for ten minutes; and torchrun
neither notices a rank that hangs nor says, on the others, which one ended first and why. Here each rank has a
thread with a connection to rank 0, which passes on to all, in one order, how a rank ends. The system closes
the connection of a process that dies, and one that hangs sends nothing any more. A thread sends, so a rank
may compute, load or save for as long as it likes; collectives are still under torch's own time limits.
"""

import atexit
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from esc_basicsr.common.errors import UserError
from esc_basicsr.training.meeting import loopback_server

__all__ = ["DEFAULT_LIMIT", "agree_to_end", "start", "watched"]

DEFAULT_LIMIT = 60.0  # seconds
_GRACE = 3.0  # seconds that a main thread has to end by itself, or a message to arrive
_USER_ERROR = 2  # exit code
_TERMINATED = 128 + signal.SIGTERM
_GONE = "is gone without a word: it was killed (out of memory?) or crashed"


class _End(NamedTuple):
    """How a rank ends, and the rank whose end it is about: itself, or the one that took it along."""

    code: int  # 0: the others go on
    rank: int
    why: str  # goes on after the rank's name


def start(limit: float = DEFAULT_LIMIT) -> None:
    """Begin to watch the other ranks; called on every rank, once the process group exists.

    Args:
        limit: Seconds without a sign of life after which a rank is taken for dead. A death that can be seen
            at once (a process gone, an exception) ends the others within seconds, whatever it is.

    Raises:
        UserError: The ranks cannot connect to rank 0.
    """
    global _watch
    if dist.get_world_size() < 2:
        return
    _watch = _Watch(limit)
    atexit.register(_end_unwatched)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # torchrun sends it as soon as a rank has died: the others are to say so first.
        _on_sigterm(lambda number, frame: sys.exit(_TERMINATED))


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Report to the other ranks how the block ends, and end here if another rank's end is why.

    Then the process ends with exit code 1, or 2 where that rank's end was a `UserError`, after a message
    that one of the ranks prints. Of several ranks that raise a `UserError` one raises it; the others end with
    exit code 2. Without other ranks it does nothing.
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


def _on_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # in which signals arrive
        signal.signal(signal.SIGTERM, handler)


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
    """The state of the other ranks, as one rank knows it; one thread talks to them and judges."""

    def __init__(self, limit: float) -> None:
        self.limit, self.interval = limit, min(limit / 10, 0.5)
        self.rank, world = dist.get_rank(), dist.get_world_size()
        server, port = _listen() if self.rank == 0 else (None, 0)
        told: list[Any] = [None] * world
        dist.all_gather_object(told, (socket.gethostname(), os.getpid(), port, uuid.uuid4().hex))
        self.processes = [(host, pid) for host, pid, *_ in told]
        self.ends: dict[int, _End] = {}  # in one order on all ranks
        self.cause: _End | None = None  # the end of another rank because of which this one ends
        self.own_end: _End | None = None
        self.has_agreed = False  # to end
        self.has_cause, self.is_heard, self.is_over = (threading.Event() for _ in range(3))
        self.is_quitting = threading.Lock()
        *_, port, password = told[0]
        try:
            self.peers = _meet(server, world, password) if server else _reach(port, self.rank, password)
        except OSError as error:
            raise UserError(
                f"the connections of rank 0, port {port}, to the other ranks cannot be made ({error}). Have "
                "firewalls let the machines of a training connect to one another."
            ) from error
        self.silences = dict.fromkeys(self.peers, 0.0)  # seconds in which this rank was listening
        os.register_at_fork(after_in_child=self._close)  # in a worker they would outlive this rank
        self.thread = threading.Thread(target=self._talk, daemon=True)
        self.thread.start()

    def _close(self) -> None:
        for peer in self.peers.values():
            peer.close()

    # The main thread's

    def end(self, error: BaseException | None) -> None:
        """Report how this rank ends; does not return if another's end is the reason."""
        if error is not None:
            _on_sigterm(signal.SIG_IGN)  # it ends anyway, and is not to be kept from saying why
        code, is_collective = _code_of(error), _is_of_a_collective(error)
        if is_collective or (code == _TERMINATED and not self.has_agreed):
            self.has_cause.wait(_GRACE)  # the rank that left the collective, or that torchrun has seen die
        if is_collective and self.cause is None and self.ends:
            rank, end = next(iter(self.ends.items()))
            self.cause = _End(1, rank, f"{end.why} before the others were done")
        if self.cause is not None and not isinstance(error, UserError | None):
            self._quit()
        why = f"ended with exit code {code}" if isinstance(error, SystemExit | None) else _described(error)
        self._leave(_End(0 if self.has_agreed else code, self.rank, why))
        self.is_over.set()
        self.thread.join(_GRACE)
        self._close()
        if isinstance(error, UserError) and self.cause is not None and self.cause.code == _USER_ERROR:
            raise SystemExit(_USER_ERROR)  # another rank was first, and reports it

    def _leave(self, end: _End) -> None:
        """Say ``end`` to the others; rank 0, by which they hear of it, stays until they have ended too."""
        self.own_end = end
        self.is_heard.wait(_GRACE)
        deadline = time.monotonic() + 2 * _GRACE  # so long they take to end because of this rank
        while self.rank == 0 and self.peers and (end.code == 0 or time.monotonic() < deadline):
            time.sleep(self.interval)

    def _quit(self) -> None:
        """End the process now because of another: Python's own way out may wait for a collective."""
        self.is_quitting.acquire()  # never released: one thread does it
        cause = self.cause
        if cause is None or self.is_over.is_set():
            return
        others = {*range(len(self.processes))} - self.ends.keys() - {cause.rank}
        is_connected = self.rank == 0 or bool(self.peers)
        if cause.code != _USER_ERROR and (not is_connected or self.rank == min(others, default=self.rank)):
            host, pid = self.processes[cause.rank]
            print(
                f"error: rank {cause.rank} (process {pid} on {host}) {cause.why}. The other ranks cannot "
                "go on without it, and end. A training goes on from its newest checkpoint when it is started "
                "again with --auto_resume.",
                file=sys.stderr,
                flush=True,
            )
        code = _USER_ERROR if cause.code == _USER_ERROR else 1
        self._leave(cause._replace(code=code))
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    # The other thread's

    def _talk(self) -> None:
        has_said, last, beat_at = False, time.monotonic(), 0.0
        while not self.is_over.is_set():
            ready = wait([*self.peers.values()], self.interval)
            now = time.monotonic()
            # a stopped process that goes on has heard nothing for long, but not listened either
            passed, last = min(now - last, 2 * self.interval), now
            for rank, peer in [*self.peers.items()]:
                self.silences[rank] += passed
                try:
                    if peer in ready:
                        self.silences[rank] = 0.0
                        message = peer.recv_bytes()
                        if message:
                            sender, *end = json.loads(message)
                            self._hear(sender, _End(*end))
                except (EOFError, OSError):
                    self._lose(rank, _GONE)
                    continue
                if self.silences[rank] > self.limit:
                    self._lose(rank, f"stopped answering for {self.limit:g} s{self._stopped(rank)}")
            if self.own_end is not None and not has_said:
                has_said = True
                if self.rank == 0:
                    self._hear(0, self.own_end)
                else:
                    self._send(self.rank, self.own_end)
            if now - beat_at >= self.interval:
                beat_at = now
                self._send()

    def _send(self, sender: int | None = None, end: _End | None = None) -> None:
        """Send how a rank ends, or a sign of life, to all that this rank is connected to."""
        message = json.dumps([sender, *end]).encode() if end else b""
        for peer in self.peers.values():
            with contextlib.suppress(OSError):  # receiving will show it
                peer.send_bytes(message)

    def _hear(self, sender: int, end: _End) -> None:
        """Take note of how a rank ends; rank 0 passes it on, to that rank too."""
        if self.rank == 0:
            self._send(sender, end)
        is_first = not any(known.code for known in self.ends.values())
        self.ends.setdefault(sender, end)
        if end.code and is_first and not (sender == self.rank and self.own_end is not None):
            self.cause = end
            self.has_cause.set()
            timer = threading.Timer(_GRACE, self._quit)  # unless the main thread ends first
            timer.daemon = True
            timer.start()
        if sender == self.rank:
            self.is_heard.set()

    def _lose(self, rank: int, why: str) -> None:
        """Have no connection to a rank any more."""
        if rank not in self.ends:
            self._hear(rank, _End(1, rank, why))
        self.peers.pop(rank).close()
        if rank == 0:
            self.is_heard.set()  # there is no one to hear it

    def _stopped(self, rank: int) -> str:
        host, pid = self.processes[rank]
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            if host == socket.gethostname() and fields[0] in "Tt":
                return " (its process is stopped)"
        return ""


def _listen() -> tuple[socket.socket, int]:
    server = loopback_server(0)
    if server is None:
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=is_dual)
    server.settimeout(DEFAULT_LIMIT)
    return server, server.getsockname()[1]


def _meet(server: socket.socket, world: int, password: str) -> dict[int, Connection]:
    """Await the connections of all other ranks on rank 0."""
    peers: dict[int, Connection] = {}
    with server:
        while len(peers) < world - 1:
            connection, _ = server.accept()
            connection.settimeout(None)
            peer = Connection(connection.detach())
            with contextlib.suppress(EOFError, OSError, ValueError):  # somebody else
                rank, word = peer.recv_bytes(100).decode().split() if peer.poll(_GRACE) else ("", "")
                if word == password:
                    peers[int(rank)] = peer
    return peers


def _reach(port: int, rank: int, password: str) -> dict[int, Connection]:
    """Connect to rank 0."""
    connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=DEFAULT_LIMIT)
    connection.settimeout(None)
    peer = Connection(connection.detach())
    peer.send_bytes(f"{rank} {password}".encode())
    return {0: peer}


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
