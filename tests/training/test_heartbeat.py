"""A rank that dies ends the others within a bounded time, with a message that says which one and why."""

import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rank_roles
from tiny_training import paired, start_python, training_options, write, write_images

from esc_basicsr.training import heartbeat


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Job:
    """Processes that know one another as ranks."""

    def __init__(self, folder: Path, roles: list[str], limit: float) -> None:
        port = str(free_port())
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(roles))}
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["esc_basicsr.training.heartbeat"])  # imports PyTorch once
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
    jobs[1] = start("work", "work", "sleep 600")
    for victim, job in jobs.items():
        job.processes[victim].kill()
    jobs[1].processes[1].join(10)
    jobs[1].signal(2, signal.SIGTERM)  # by torchrun, which has seen it sooner
    for victim, job in jobs.items():
        others = [rank for rank in range(3) if rank != victim]
        assert job.codes(*others, within=20) == [1, 1]
        why = "is gone without a word: it was killed (out of memory?) or crashed"
        # Where the store is gone, too, they cannot agree on who says so.
        assert set(job.errors()) == {job.name(victim) + why + REMEDY}
        assert len(job.errors()) == 1 or victim == 0
        assert not any("Traceback" in job.said(rank) for rank in others)


def test_how_a_rank_ended_is_reported_by_the_others(start: Callable[..., Job]) -> None:
    ends = {
        "raise": "ended with ValueError: numbers gone bad",
        "exit 3": "ended with exit code 3",
        "exit 0": "ended with exit code 0 before the others were done",
        "vanish": "is gone without a word: it was killed (out of memory?) or crashed",
        "orphan": "is gone without a word: it was killed (out of memory?) or crashed",
    }
    jobs = {role: start("work", role) for role in ends}
    for role, why in ends.items():
        job = jobs[role]
        code = {"raise": 1, "exit 3": 3}.get(role, 0)
        assert job.codes(0, 1, within=30) == [1, code]
        assert job.errors() == [job.name(1) + why + REMEDY]
        # where it happened, and only there
        assert ["Traceback" in job.said(rank) for rank in range(2)] == [False, role == "raise"]


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
    """Nor does one that hung for as long as all the others together."""
    job = start("sleep 4", "sleep 4", limit=4)
    for rank in range(2):
        job.signal(rank, signal.SIGSTOP)
    time.sleep(4.2)
    for rank in range(2):
        job.signal(rank, signal.SIGCONT)
    assert job.codes(0, 1, within=20) == [0, 0]
    assert job.errors() == []


def test_ranks_may_end_at_different_times(start: Callable[..., Job]) -> None:
    """With a short limit, so that one taken for dead would show; rank 0 has the store, and goes last."""
    job = start("sleep 0", "sleep 5", "agree 143", limit=4)
    assert job.codes(2, within=4) == [143]
    assert job.codes(1, 0, within=20) == [0, 0]
    assert job.errors() == []


def test_a_rank_that_stops_by_itself_takes_the_others_along(start: Callable[..., Job]) -> None:
    """SIGTERM that reached one of them alone; those that wait in NCCL would not notice for minutes."""
    job = start("exit 143", "sleep 600")
    assert job.codes(0, 1, within=20) == [143, 1]
    assert job.errors() == [f"{job.name(0)}ended with exit code 143{REMEDY}"]


def test_a_users_mistake_is_reported_once_and_ends_every_rank_with_its_code(
    start: Callable[..., Job],
) -> None:
    """One that all ranks find, and one that one does."""
    for job in (start("mistake", "mistake", "mistake"), start("work", "mistake", "sleep 600")):
        assert job.codes(0, 1, 2, within=20) == [2, 2, 2]
        assert job.errors() == ["error: the disk is full"]
        assert not any("Traceback" in job.said(rank) for rank in range(3))


SCRIPT = """\
import torch, torch.distributed as dist
from esc_basicsr.training import heartbeat

dist.init_process_group("gloo")
heartbeat.start()
if dist.get_rank() == 1:
    raise ValueError("gone bad")
while True:
    dist.all_reduce(torch.ones(1))
"""


def test_a_script_that_calls_the_pipeline_itself_reports_its_end_when_python_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    processes = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        processes.append(start_python("script.py", cwd=tmp_path))
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert f"error: rank 1 (process {processes[1].pid}" in outputs[0]
    assert "ended with ValueError: gone bad" in outputs[0]


def test_one_process_alone_is_not_watched() -> None:
    with pytest.raises(ValueError, match="as it is"), heartbeat.watched():
        raise ValueError("as it is")
    with heartbeat.watched():
        pass


KILL_RANK_1 = """\
import os, signal, sys
from esc_basicsr.__main__ import main
from esc_basicsr.training.esc_model import ESCModel

stock = ESCModel.optimize_parameters

def optimize_parameters(self, current_iter):
    if current_iter == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    stock(self, current_iter)

if __name__ == "__main__":  # loader workers import this again
    ESCModel.optimize_parameters = optimize_parameters
    sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_torchrun_restarts_a_training_that_lost_a_rank_and_it_goes_on(tmp_path: Path) -> None:
    write_images(tmp_path / "train", count=4, height=32, width=32)
    write_images(tmp_path / "val", count=2, height=24, width=32)
    crops = {"gt_size": 32, "use_hflip": False, "use_rot": False}
    train = paired("Train", tmp_path / "train", ".lmdb", **crops)
    options = training_options(train, paired("Val", tmp_path / "val"))
    options["datasets"]["train"] |= {"batch_size_per_gpu": 1, "num_worker_per_gpu": 0}
    options["datasets"]["train"]["persistent_workers"] = False
    options["dist_params"]["timeout"] = 20
    (tmp_path / "killed.py").write_text(KILL_RANK_1)
    write(tmp_path / "train.yml", options)
    process = start_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"),
        *("killed.py", "-opt", "train.yml", "--launcher", "pytorch", "--auto_resume"),
        cwd=tmp_path,
    )
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert re.findall(r"error: (rank 1) \(process.*\) (.*?):", output) == [
        ("rank 1", "is gone without a word")
    ]
    assert "Traceback" not in output
    assert "Resuming training from epoch: 0, iter: 2." in output
    states = tmp_path / "experiments" / "single" / "training_states"
    assert {file.name for file in states.iterdir()} == {"2.state", "4.state"}


STEPS_FOR_EVER = """\
import os, sys, time
from esc_basicsr.__main__ import main
from esc_basicsr.training.esc_model import ESCModel

stock = ESCModel.optimize_parameters

def optimize_parameters(self, current_iter):
    if current_iter == 2:
        print(f"rank {os.getpid()} steps", flush=True)
    time.sleep(0.05)
    stock(self, current_iter)

if __name__ == "__main__":
    ESCModel.optimize_parameters = optimize_parameters
    sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_ranks_end_with_a_torchrun_that_is_killed_and_save_their_state(tmp_path: Path) -> None:
    write_images(tmp_path / "train", count=4, height=32, width=32)
    crops = {"gt_size": 32, "use_hflip": False, "use_rot": False}
    options = training_options(paired("Train", tmp_path / "train", ".lmdb", **crops), {})
    options["datasets"].pop("val")
    options["datasets"]["train"] |= {"num_worker_per_gpu": 0, "persistent_workers": False}
    options["train"]["total_iter"] = 10**6
    options["logger"]["save_checkpoint_freq"] = 10**6
    options.pop("val")
    (tmp_path / "steps.py").write_text(STEPS_FOR_EVER)
    write(tmp_path / "train.yml", options)
    agent = start_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "steps.py"),
        *("-opt", "train.yml", "--launcher", "pytorch"),
        cwd=tmp_path,
    )
    assert agent.stdout is not None
    ranks: list[int] = []
    lines = []
    while len(ranks) < 2:
        line = agent.stdout.readline()
        assert line, lines
        lines.append(line)
        ranks += [int(pid) for pid in re.findall(r"rank (\d+) steps", line)]
    agent.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    agent.stdout.close()
    agent.wait()
    assert list((tmp_path / "experiments" / "single" / "training_states").glob("*.state"))
