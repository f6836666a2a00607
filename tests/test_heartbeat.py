"""A rank that dies ends the others within a bounded time, with a message that says which one and why."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rank_roles

from esc_basicsr import heartbeat


class Job:
    """Processes that know one another as ranks."""

    def __init__(self, folder: Path, roles: list[str], limit: float) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(roles))}
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["esc_basicsr.heartbeat"])  # imports PyTorch once
        self.outputs = [folder / f"{rank}.txt" for rank in range(len(roles))]
        self.processes = [
            server.Process(
                target=rank_roles.run, args=(role, limit, str(output), shared | {"RANK": str(rank)})
            )
            for rank, (role, output) in enumerate(zip(roles, self.outputs, strict=True))
        ]
        for process in self.processes:
            process.start()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 120
        while not all(output.exists() and "ready" in output.read_text() for output in self.outputs):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def said(self, rank: int) -> str:
        return self.outputs[rank].read_text()

    def codes(self, *ranks: int, within: float) -> list[int | None]:
        """Exit codes of ranks, None of those that have not ended within some seconds."""
        deadline = time.monotonic() + within
        for rank in ranks:
            self.processes[rank].join(max(0.1, deadline - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def signal(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def errors(self) -> list[str]:
        lines = [line for rank in range(len(self.processes)) for line in self.said(rank).splitlines()]
        return [line for line in lines if line.startswith("error: ")]

    def name(self, rank: int) -> str:
        return f"error: rank {rank} (process {self.processes[rank].pid} on {socket.gethostname()}) "


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs = []

    def start_job(*roles: str, limit: float = 60) -> Job:
        folder = tmp_path / str(len(jobs))
        folder.mkdir()
        jobs.append(Job(folder, [*roles], limit))
        jobs[-1].wait_until_ready()
        return jobs[-1]

    yield start_job
    for job in jobs:
        for process in job.processes:
            process.kill()
            process.join()


REMEDY = (
    ". The other ranks cannot go on without it, and end. A training goes on from its newest checkpoint when "
    "it is started again with --auto_resume."
)


def test_a_killed_rank_is_named_and_ends_the_others_in_seconds(start: Callable[..., Job]) -> None:
    """Rank 0, which the store goes with, or another; the others hear of it in a collective, or do not."""
    jobs = {0: start("work", "work", "sleep 600"), 2: start("work", "sleep 600", "work")}
    for victim, job in jobs.items():
        job.processes[victim].kill()
    for victim, job in jobs.items():
        others = [rank for rank in range(3) if rank != victim]
        assert job.codes(*others, within=20) == [1, 1]
        why = "is gone without a word: it was killed (out of memory?) or crashed"
        # Where the store is gone, too, they cannot agree on who says so.
        assert set(job.errors()) == {job.name(victim) + why + REMEDY}
        assert len(job.errors()) == 1 or victim == 0
        assert not any("Traceback" in job.said(rank) for rank in others)


def test_what_a_rank_raised_is_told_by_the_others_and_traced_back_there(start: Callable[..., Job]) -> None:
    job = start("work", "raise", "sleep 600")
    assert job.codes(0, 1, 2, within=20) == [1, 1, 1]
    assert job.errors() == [job.name(1) + "ended with ValueError: numbers gone bad" + REMEDY]
    assert ["Traceback" in job.said(rank) for rank in range(3)] == [False, True, False]


@pytest.mark.parametrize(
    ("role", "why"), [("exit 3", "ended with exit code 3"), ("vanish", "is gone without a word")]
)
def test_a_rank_that_exits_ends_the_others(start: Callable[..., Job], role: str, why: str) -> None:
    job = start("work", role) if role == "vanish" else start(role, "work")
    gone = int(role == "vanish")
    assert job.codes(1 - gone, within=20) == [1]
    (error,) = job.errors()
    assert error.startswith(job.name(gone) + why)


def test_a_rank_that_hangs_ends_the_others_at_the_limit(start: Callable[..., Job]) -> None:
    jobs = [start("work", "work", "sleep 600", limit=2) for _ in range(2)]
    for victim, job in enumerate(jobs):
        job.signal(victim, signal.SIGSTOP)
    begun = time.monotonic()
    for victim, job in enumerate(jobs):
        others = [rank for rank in range(3) if rank != victim]
        assert job.codes(*others, within=20) == [1, 1]
        assert time.monotonic() - begun > 1.5
        why = "stopped answering for 2 s (its process is stopped)"
        assert set(job.errors()) == {job.name(victim) + why + REMEDY}
    for victim, job in enumerate(jobs):  # should it go on, it learns that it is alone
        job.signal(victim, signal.SIGCONT)
        assert job.codes(victim, within=30) == [1]
        assert "Traceback" not in job.said(victim)


def test_a_rank_that_hangs_for_less_than_the_limit_harms_nobody(start: Callable[..., Job]) -> None:
    job = start("sleep 5", "sleep 5", limit=4)
    for rank in range(2):
        job.signal(rank, signal.SIGSTOP)
    time.sleep(1)
    job.signal(0, signal.SIGCONT)
    time.sleep(1.5)
    job.signal(1, signal.SIGCONT)
    assert job.codes(0, 1, within=20) == [0, 0]
    assert job.errors() == []


def test_ranks_may_end_at_different_times(start: Callable[..., Job]) -> None:
    """With a short limit, so that one taken for dead would show; rank 0 has the store, and goes last."""
    job = start("sleep 0", "sleep 6", "exit 143", limit=2)
    assert job.codes(2, within=5) == [143]
    assert job.codes(0, 1, within=20) == [0, 0]
    assert job.errors() == []


@pytest.mark.parametrize("roles", [["mistake"] * 3, ["work", "mistake", "sleep 600"]], ids=["all", "one"])
def test_a_users_mistake_is_told_once_and_ends_every_rank_with_its_code(
    start: Callable[..., Job], roles: list[str]
) -> None:
    job = start(*roles)
    assert job.codes(0, 1, 2, within=20) == [2, 2, 2]
    assert job.errors() == ["error: the disk is full"]
    assert not any("Traceback" in job.said(rank) for rank in range(3))


def test_one_process_alone_is_not_watched() -> None:
    with pytest.raises(ValueError, match="as it is"), heartbeat.watched():
        raise ValueError("as it is")
    with heartbeat.watched():
        pass
