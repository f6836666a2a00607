"""A spawned data worker imports torch, NumPy, OpenCV and lmdb, and of this package what it needs."""

import pickle
import subprocess
import sys
from pathlib import Path

from esc_basicsr.data.dflip_dataset import DFLIPDataset
from esc_basicsr.data.reproducible import Draw, ReproducibleDataset, ReproducibleSampler, TrainingLoader

_WORKER = """
import pickle, sys
data_set, collate, start, draw = pickle.loads(sys.stdin.buffer.read())
start(0)
assert collate([data_set[draw]])["lq"].shape == (1, 3, 12, 12)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_worker_that_is_spawned_imports_no_host(hr_lmdb: Path) -> None:
    options = {"sources": [{"dataroot_gt": str(hr_lmdb)}], "gt_size": 48, "scale": 4, "phase": "train"}
    images = DFLIPDataset(options | {"use_hflip": True, "use_rot": True})
    loader = TrainingLoader(ReproducibleDataset(images, 0), ReproducibleSampler(3, 1, 1), 1)
    sent = pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn, Draw(0, 0)))
    worker = subprocess.run([sys.executable, "-c", _WORKER], input=sent, capture_output=True, check=True)
    loaded = set(worker.stdout.decode().split())
    assert {"torch", "cv2", "lmdb", "esc_basicsr"} <= loaded
    assert not loaded & {"basicsr", "torchvision", "mmengine", "matplotlib", "PIL", "scipy", "psutil", "yaml"}
