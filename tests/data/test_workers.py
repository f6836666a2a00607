"""Data workers that do not start by forking are light, read the same, and end with the main process."""

import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esc_basicsr.data.dflip_dataset import DFLIPDataset
from esc_basicsr.data.reproducible import Draw, ReproducibleDataset, ReproducibleSampler, TrainingLoader

_WORKER = """
import pickle, sys
data_set, collate, start, draw = pickle.loads(sys.stdin.buffer.read())
start(0)
assert collate([data_set[draw]])["lq"].shape == (1, 3, 12, 12)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
_LOADER = """
import json, multiprocessing, re, sys
from pathlib import Path
from esc_basicsr.data.dflip_dataset import DFLIPDataset
from esc_basicsr.data.reproducible import ReproducibleDataset, ReproducibleSampler, TrainingLoader

multiprocessing.set_start_method(sys.argv[1])
sampler = ReproducibleSampler(3, 8, 4)
data_set = ReproducibleDataset(DFLIPDataset(json.loads(sys.argv[2])), 0)
loader = TrainingLoader(data_set, sampler, 4, num_workers=2)
sampler.set_epoch(0)
batches = iter(loader)
batch = next(batches)
pids = [worker.pid for worker in multiprocessing.active_children()]
memory = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
batches.close()
print(json.dumps({
    "sum": batch["lq"].double().sum().item(),
    "paths": batch["gt_path"],
    "pss": [int(re.search(r"Pss: +([0-9]+) kB", text)[1]) / 1024 for text in memory],
}))
"""

_KILLED = """
import multiprocessing, os, signal
import torch
from esc_basicsr.data.reproducible import ReproducibleDataset, ReproducibleSampler, TrainingLoader

multiprocessing.set_start_method("spawn")
sampler = ReproducibleSampler(40, 1, 4)
data_set = ReproducibleDataset([{"image": torch.zeros(1)}] * 40, 0)
loader = TrainingLoader(data_set, sampler, 4, num_workers=2)
sampler.set_epoch(0)
batches = iter(loader)
next(batches)
os.kill(os.getpid(), signal.SIGKILL)
"""

_KILLED_AT_WORK = """
import ctypes, multiprocessing, os, signal, sys, threading
from esc_basicsr.data.reproducible import ReproducibleDataset, ReproducibleSampler, TrainingLoader

class Busy:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        os.write(1, b"at work")
        ctypes.PyDLL(None).sleep(50)  # keeps Python's lock

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    sampler = ReproducibleSampler(40, 1, 4)
    loader = TrainingLoader(ReproducibleDataset(Busy(), 0), sampler, 4, num_workers=2)
    sampler.set_epoch(0)
    next(iter(loader))
"""


@pytest.fixture
def options(hr_lmdb: Path) -> dict[str, Any]:
    return {
        **{"sources": [{"dataroot_gt": str(hr_lmdb)}], "gt_size": 48, "scale": 4, "phase": "train"},
        **{"use_hflip": True, "use_rot": True},
    }


def test_what_is_sent_to_a_worker_imports_no_host(options: dict[str, Any]) -> None:
    data_set = ReproducibleDataset(DFLIPDataset(options), 0)
    loader = TrainingLoader(data_set, ReproducibleSampler(3, 1, 1), 1)
    sent = pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn, Draw(0, 0)))
    worker = subprocess.run([sys.executable, "-c", _WORKER], input=sent, capture_output=True, check=True)
    loaded = set(worker.stdout.decode().split())
    assert {"torch", "cv2", "lmdb", "esc_basicsr"} <= loaded
    assert not loaded & {"basicsr", "torchvision", "mmengine", "matplotlib", "PIL", "scipy", "psutil", "yaml"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_that_would_be_spawned_share_what_they_import(options: dict[str, Any]) -> None:
    seen = {}
    for method in ("spawn", "fork"):
        command = [sys.executable, "-c", _LOADER, method, json.dumps(options)]
        seen[method] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert len(seen["spawn"]["pss"]) == 2
    assert max(seen["spawn"]["pss"]) < 250  # MB; a spawned one has 400, most of it torch's import
    for key in ("sum", "paths"):
        assert seen["spawn"][key] == seen["fork"][key]


@pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL")
def test_killed_main_process_leaves_no_worker_and_no_server() -> None:
    # the pipe ends when the last process that holds it has ended
    ended = subprocess.run([sys.executable, "-c", _KILLED], capture_output=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
@pytest.mark.parametrize("method", ["fork", "spawn"])  # the latter by a server
def test_killed_main_process_leaves_no_worker_that_is_within_c_code(tmp_path: Path, method: str) -> None:
    script = tmp_path / "busy.py"
    script.write_text(_KILLED_AT_WORK)
    with subprocess.Popen([sys.executable, script, method], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(7) == b"at work"
        process.kill()
        process.communicate(timeout=30)  # ends when the last process that holds the pipe has ended
