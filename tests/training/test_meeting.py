"""Ranks that never come, or die on their way: the others end within the limit, and say whom they miss."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIMIT = 6
RANK = """
import os, signal, sys
import torch.distributed as dist
from esc_basicsr.common import signals
from esc_basicsr.common.errors import UserError
from esc_basicsr.training import heartbeat, meeting

dies = os.environ.get("DIES")

def die_at(place):
    if dies == place:
        os.kill(os.getpid(), signal.SIGKILL)

die_at("before")
stock = meeting._meet
def meet(*arguments):
    store = stock(*arguments)
    die_at("when all are there")
    return store
meeting._meet = meet
print("waits", flush=True)
try:
    with signals.watched_for(), meeting.bounded(float(sys.argv[1])):
        dist.init_process_group(backend="gloo")
        die_at("after the process group")
        heartbeat.start(float(sys.argv[1]))
except UserError as error:
    print("error:", error, flush=True)
    sys.exit(2)
print("met", flush=True)
dist.barrier()
"""


class Ranks:
    """Ranks of a world, some of which die at a place, and some of which are never started."""

    def __init__(self, folder: Path, world: int, started: list[int], dies: dict[int, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        script = folder / "rank.py"
        script.write_text(RANK)
        self.began = time.monotonic()
        self.processes = {
            rank: subprocess.Popen(
                [sys.executable, str(script), str(LIMIT)],
                env={
                    **os.environ,
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)},
                    **{"RANK": str(rank), "OMP_NUM_THREADS": "1", "DIES": dies.get(rank, "")},
                },
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank in started
        }

    def ends(self) -> dict[int, tuple[int, str]]:
        """Exit code and output of each rank; none takes longer than some seconds beyond the limit."""
        try:
            outputs = {
                rank: process.communicate(timeout=LIMIT + 60)[0] for rank, process in self.processes.items()
            }
        finally:
            for process in self.processes.values():
                process.kill()
        return {rank: (self.processes[rank].returncode, output) for rank, output in outputs.items()}


def test_ranks_that_all_come_meet(tmp_path: Path) -> None:
    ends = Ranks(tmp_path, 3, [0, 1, 2], {}).ends()
    assert {rank: code for rank, (code, _) in ends.items()} == {0: 0, 1: 0, 2: 0}, ends


@pytest.mark.parametrize(("missing", "died"), [(0, False), (2, True)])
def test_a_rank_that_does_not_come_is_named_within_the_limit(
    tmp_path: Path, missing: int, died: bool
) -> None:
    others = [rank for rank in range(3) if rank != missing]
    started = [0, 1, 2] if died else others
    ends = Ranks(tmp_path, 3, started, {missing: "before"}).ends()
    for rank in others:
        code, output = ends[rank]
        assert code == 2, output
        assert f"no rank {missing}" in output or f"rank {missing} of 3 did not come" in output
        assert "Traceback" not in output


@pytest.mark.parametrize(
    ("place", "dying"),
    [("when all are there", 0), ("when all are there", 1), ("after the process group", 1)],
)
def test_a_rank_that_dies_while_they_meet_ends_the_others_within_the_limit(
    tmp_path: Path, place: str, dying: int
) -> None:
    ends = Ranks(tmp_path, 2, [0, 1], {dying: place}).ends()
    code, output = ends[1 - dying]
    assert code == 2, output
    assert "error: " in output and "Traceback" not in output


@pytest.mark.parametrize(("number", "waiting"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_signals_end_a_rank_that_waits(tmp_path: Path, number: signal.Signals, waiting: int) -> None:
    ranks = Ranks(tmp_path, 2, [waiting], {})
    process = ranks.processes[waiting]
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    time.sleep(0.5)
    process.send_signal(number)
    began = time.monotonic()
    ((code, _),) = ranks.ends().values()
    assert code == -number
    assert time.monotonic() - began < LIMIT - 1


def test_one_machine_listens_to_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from esc_basicsr.training import meeting

    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert meeting.loopback_of_master() in ("127.0.0.1", "::1")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.7")
    assert meeting.loopback_of_master() is None
