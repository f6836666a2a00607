"""Ranks that never come, or die on their way: the others end within the limit, and say whom they miss."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import rank_roles

from esc_basicsr.common.errors import UserError
from esc_basicsr.training import meeting

LIMIT = 4


class Ranks:
    """Ranks of a world, some of which die at a place, and some of which are never started."""

    def __init__(
        self,
        folder: Path,
        world: int,
        started: list[int],
        dies: dict[int, str],
        limit: float = LIMIT,
        **environ: str,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)} | environ
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["esc_basicsr.training.heartbeat"])  # imports PyTorch once
        self.outputs = {rank: folder / f"{rank}.txt" for rank in started}
        self.processes = {
            rank: server.Process(
                target=rank_roles.meet,
                args=(dies.get(rank, ""), limit, str(output), shared | {"RANK": str(rank)}),
            )
            for rank, output in self.outputs.items()
        }
        for process in self.processes.values():
            process.start()

    def ends(self) -> dict[int, tuple[int | None, str]]:
        """Exit code and output of each rank; none takes longer than some seconds beyond the limit."""
        for process in self.processes.values():
            process.join(LIMIT + 60)
            process.kill()
        return {
            rank: (process.exitcode, self.outputs[rank].read_text())
            for rank, process in self.processes.items()
        }


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


def test_a_mistake_of_all_ends_each_by_its_code_however_soon_rank_0_is_through(tmp_path: Path) -> None:
    ends = Ranks(tmp_path, 2, [0, 1], dict.fromkeys((0, 1), "by a mistake of all")).ends()
    for code, output in ends.values():
        assert code == 2 and "error:" not in output, output


def test_ranks_whose_torchrun_was_killed_as_they_began_end_at_once(tmp_path: Path) -> None:
    limit = 600  # longer than `ends` waits
    ends = Ranks(tmp_path, 2, [0, 1], {}, limit, TORCHELASTIC_USE_AGENT_STORE="True").ends()
    for code, output in ends.values():
        assert code == 2 and "torchrun, which started this rank, is gone" in output, output


@pytest.mark.parametrize(("number", "waiting"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_signals_end_a_rank_that_waits(tmp_path: Path, number: signal.Signals, waiting: int) -> None:
    ranks = Ranks(tmp_path, 2, [waiting], {}, limit=50)
    process = ranks.processes[waiting]
    deadline = time.monotonic() + 60
    while not (ranks.outputs[waiting].exists() and "waits" in ranks.outputs[waiting].read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1)
    assert process.pid is not None
    os.kill(process.pid, number)
    began = time.monotonic()
    ((code, _),) = ranks.ends().values()
    assert code == -number
    assert time.monotonic() - began < 40


def test_one_machine_listens_to_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert meeting.loopback_of_master() in ("127.0.0.1", "::1")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.7")
    assert meeting.loopback_of_master() is None


@pytest.mark.parametrize("address", ["127.0.0.1", "192.0.2.7"])
def test_a_taken_port_of_rank_0_is_told_as_such(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=rf"rank 0 cannot listen on {address}, port {port} \(Address"):
            meeting._meet(0, 2, LIMIT)
