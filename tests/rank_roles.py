"""The work of a process in tests of ranks that die; a module of its own, for processes to import."""

import datetime
import os
import signal
import sys
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from esc_basicsr.common import signals
from esc_basicsr.common.errors import UserError
from esc_basicsr.training import heartbeat, meeting


def run(role: str, limit: float, output: str, environ: dict[str, str]) -> None:
    """Be a rank that works by collectives for ever, unless its role is another.

    Its output goes to the file ``output``.
    """
    _begin(output, environ)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=600))
    heartbeat.start(limit)
    try:
        with heartbeat.watched():
            _play(role)
    except UserError as error:  # as `esc_basicsr.__main__` does
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def meet(dies: str, limit: float, output: str, environ: dict[str, str]) -> None:
    """Be a rank that meets the others, and kills itself on its way, at the place ``dies`` if that is any."""
    _begin(output, environ)

    def die_at(place: str) -> None:
        if dies == place:
            os.kill(os.getpid(), signal.SIGKILL)

    stock = meeting._meet  # between it and the process group nothing public is called

    def meet_then_die(rank: int, world: int, limit: float) -> Any:
        store = stock(rank, world, limit)
        die_at("when all are there")
        return store

    die_at("before")
    print("waits", flush=True)
    try:
        with (
            mock.patch.object(meeting, "_meet", meet_then_die),
            signals.watched_for(),
            meeting.bounded(limit),
        ):
            dist.init_process_group(backend="gloo")
            die_at("after the process group")
            heartbeat.start(limit)
    except UserError as error:
        print("error:", error, flush=True)
        sys.exit(2)
    dist.barrier()
    if dies == "by a mistake of all":  # as options are refused, on which all ranks agree
        with heartbeat.watched():
            dist.destroy_process_group()
            time.sleep(2 * int(environ["RANK"]))
            sys.exit(2)


def _begin(output: str, environ: dict[str, str]) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(environ)
    # Where data workers came before, the server was started while signals were held.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
    torch.set_num_threads(1)


def _play(role: str) -> None:
    dist.barrier()
    print("ready", flush=True)
    what, _, seconds = role.partition(" ")
    if what == "raise":
        raise ValueError("numbers\ngone bad")
    if what == "mistake":
        raise UserError("the disk is full")
    if what == "exit":
        sys.exit(int(seconds))
    if what == "agree":
        heartbeat.agree_to_end()
        sys.exit(int(seconds))
    if what == "vanish":
        os._exit(0)
    if what == "orphan":  # a forked loader's worker notices seconds later that its process is gone
        if os.fork() == 0:
            time.sleep(20)
        os._exit(0)
    if what == "sleep":  # as in a collective of NCCL, which does not notice that a rank is gone
        time.sleep(float(seconds))
        return
    while True:
        dist.all_reduce(torch.ones(1))
        time.sleep(0.01)
