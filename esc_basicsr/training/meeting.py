"""Ranks meet before anything else: within a limit, and naming whom they miss.

torch.distributed by itself waits up to half an hour for a rank that was never started, or died on its way.
"""

import contextlib
import datetime
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.signals import SIGNALS

__all__ = ["bounded", "connect", "is_store_of_rank_0", "loopback_of_master"]

_kept: list[TCPStore] = []  # to this process's end: others may still read how it ends

_INTERVAL = 0.1  # seconds
_INITIAL_LIMIT = 60.0  # seconds
_GRACE = 1.0  # seconds in which the others read who is missing, before who keeps it ends


@contextlib.contextmanager
def bounded(limit: float) -> Iterator[None]:
    """Bound by ``limit`` seconds what waits for other ranks in the block, which makes the process group.

    SIGTERM and Ctrl-C end a process that waits there, which has nothing to save.

    Where a rank goes while they meet, the others end here, with exit code 2.

    Raises:
        UserError: A rank is missing.
    """
    stock = dist.init_process_group

    def init_process_group(backend: str, **options: Any) -> None:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _meet(rank, world, limit)
        timeout = datetime.timedelta(seconds=limit)
        stock(backend=backend, store=store, rank=rank, world_size=world, timeout=timeout, **options)

    with _obeyed(), mock.patch.object(dist, "init_process_group", init_process_group):
        try:
            yield
        except (RuntimeError, TimeoutError) as error:
            reason = str(error).partition("\n")[0]
            print(
                f"error: the ranks have not met within {limit:g} s, or one of them ended meanwhile: see the "
                f"messages of all, and start again. ({reason})",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)  # threads of a process group that is half made would end Python by a signal
    # From here on a collective may take what torch allows.
    dist.distributed_c10d._set_pg_timeout(dist.default_pg_timeout)


@contextlib.contextmanager
def _obeyed() -> Iterator[None]:
    """Have signals end the process at once: Python does not hear of them while torch waits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def connect(purpose: str) -> Store:
    """Connect to the store through which ranks find one another, for keys of one's own."""
    return _own_part(purpose, _make_store(is_master=False, limit=_INITIAL_LIMIT))


def is_store_of_rank_0() -> bool:
    """Tell whether rank 0 keeps the store, which ends with it, and not torchrun."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _meet(rank: int, world: int, limit: float) -> Store:
    """Make the store through which ranks find one another, and see in it that all are there."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = _own_part("meeting", _make_store(rank == 0 and is_store_of_rank_0(), limit))
        store.set(str(rank), "here")
        deadline = time.monotonic() + limit
        while not store.check([str(other) for other in range(world)]):
            if store.check(["missing"]) or time.monotonic() > deadline:
                raise UserError(_missing(store, world, limit))
            time.sleep(_INTERVAL)
    except RuntimeError as error:
        raise UserError(
            f"rank {rank} of {world} finds no rank 0 at {where} within {limit:g} s, or it is gone: see its "
            f"own messages, and check MASTER_ADDR and MASTER_PORT. ({str(error).partition(chr(10))[0]})"
        ) from error
    return store


def _missing(store: Store, world: int, limit: float) -> str:
    """Say who is missing, and have the others say the same: whoever keeps the store is about to end."""
    if not store.check(["missing"]):
        absent = [str(other) for other in range(world) if not store.check([str(other)])]
        store.set("missing", ", ".join(absent))
        time.sleep(_GRACE)
    names = store.get("missing").decode()
    return (
        f"rank {names} of {world} did not come within {limit:g} s (dist_params.timeout): it was not started, "
        "or died on its way. See its own messages, and start all again."
    )


def _own_part(purpose: str, store: TCPStore) -> Store:
    # torchrun keeps a store for all of its attempts, in which there are addresses of dead ranks.
    return PrefixStore(f"{purpose} {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _make_store(is_master: bool, limit: float) -> TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not is_store_of_rank_0():
        _see_store_of_torchrun(address, port, limit)
    more: dict[str, Any] = {}
    loopback = loopback_of_master()
    if is_master and loopback is not None:  # torch would listen to all
        family = socket.AF_INET6 if ":" in loopback else socket.AF_INET
        try:
            more["master_listen_fd"] = socket.create_server((loopback, port), family=family).detach()
        except OSError as error:
            raise UserError(_port_is_taken(error.strerror)) from error
    timeout = datetime.timedelta(seconds=limit)
    try:
        store = TCPStore(address, port, None, is_master, timeout, wait_for_workers=False, **more)
    except RuntimeError as error:
        if is_master and "EADDRINUSE" in str(error):
            raise UserError(_port_is_taken("Address already in use")) from error
        raise
    if is_master:
        _kept.append(store)
    return store


def _see_store_of_torchrun(address: str, port: int, limit: float) -> None:
    """See that torchrun is still there: its store was, before it started this rank; torch would wait for it.

    A rank that was importing when torchrun was killed has not yet asked to end with it.
    """
    try:
        socket.create_connection((address, port), timeout=limit).close()
    except OSError as error:
        raise UserError(
            f"torchrun, which started this rank, is gone from {address}:{port} ({error.strerror or error}): "
            "see its own messages, and start again."
        ) from error


def _port_is_taken(reason: str | None) -> str:
    return (
        f"rank 0 cannot listen on {os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']} ({reason}): "
        "another training may use it. Set MASTER_PORT, or dist_params.port, to a free one."
    )


def loopback_of_master() -> str | None:
    """Return the address of rank 0 if all ranks are on this machine: a loopback's, written as such.

    A name proves nothing: on its own machine many a host's is that of a loopback.
    """
    address = os.environ["MASTER_ADDR"]
    with contextlib.suppress(OSError, ValueError):
        if address == "localhost":
            return str(socket.getaddrinfo(address, None)[0][4][0])
        if ipaddress.ip_address(address).is_loopback:
            return address
    return None
