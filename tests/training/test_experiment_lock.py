"""One run at a time in an experiment, and folders that cannot be written: one message, before the work."""

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import paired, training_options, write, write_images

from esc_basicsr.common.errors import UserError
from esc_basicsr.training import experiment_lock

HOLD = (
    "import sys, time; from pathlib import Path; from esc_basicsr.training import experiment_lock;"
    "experiment_lock.hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
)


def test_a_second_run_is_refused_until_the_first_is_gone_however_it_ended(tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "mine"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on {socket.gethostname()}"):
            experiment_lock.hold(folder)
        experiment_lock.hold(folder.with_name("other"))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    experiment_lock.hold(folder)
    experiment_lock.release()
    experiment_lock.hold(folder)
    experiment_lock.release()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "train", count=4, height=32, width=32)
    write_images(folder / "val", count=1, height=32, width=32)
    return folder


def train(work: Path, data: Path, limit: int | None = None) -> "subprocess.CompletedProcess[str]":
    options = training_options(paired("T", data / "train", gt_size=16), paired("V", data / "val"))
    options["datasets"]["train"] |= {"num_worker_per_gpu": 0, "persistent_workers": False}
    options["datasets"]["train"] |= {"use_hflip": True, "use_rot": True}
    write(work / "train.yml", options)

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "esc_basicsr", "train", "-opt", "train.yml"],
        cwd=work,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limited,
    )


@pytest.mark.parametrize("name", ["experiments", "tb_logger"])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_folder_that_cannot_be_made_is_one_message(tmp_path: Path, data: Path, name: str, kind: str) -> None:
    if kind == "file":
        (tmp_path / name).write_text("not a folder")
    else:
        (tmp_path / name).symlink_to(tmp_path / "nowhere" / "at all")
    ended = train(tmp_path, data)
    assert ended.returncode == 2
    assert f"{name} cannot be made" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_limit_reached_while_logs_are_written_is_one_message(tmp_path: Path, data: Path) -> None:
    ended = train(tmp_path, data, limit=2048)
    assert ended.returncode == 2
    assert "cannot be written" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
