"""A training that takes seconds: its images, its options, and lives of it that end as a test wants."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import torch
import yaml

SCALE = 2


def write_images(folder: Path, count: int, height: int, width: int) -> None:
    """HR and LR images, as PNG folders and as LMDBs, whose LR is the mean of SCALE×SCALE pixels."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, height // 4, width // 4, 3), dtype=np.uint8)
    hr = [cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC) for image in coarse]
    lr = [cv2.resize(image, (width // SCALE, height // SCALE), interpolation=cv2.INTER_AREA) for image in hr]
    for kind, images in (("hr", hr), ("lr", lr)):
        (folder / kind).mkdir(parents=True)
        path = folder / f"{kind}.lmdb"
        with (
            lmdb.open(str(path), map_size=1 << 22) as environment,
            environment.begin(write=True) as transaction,
        ):
            for number, image in enumerate(images):
                png = cv2.imencode(".png", image)[1].tobytes()
                (folder / kind / f"{number}.png").write_bytes(png)
                transaction.put(str(number).encode(), png)
        lines = [f"{n}.png ({','.join(map(str, image.shape))}) 1\n" for n, image in enumerate(images)]
        (path / "meta_info.txt").write_text("".join(lines))


def paired(name: str, folder: Path, suffix: str = "", **more: Any) -> dict[str, Any]:
    """A section for `write_images`'s images: its LMDBs with the suffix ``.lmdb``, else its PNGs."""
    roots = {f"dataroot_{key}": f"{folder}/{kind}{suffix}" for key, kind in (("gt", "hr"), ("lq", "lr"))}
    backend = {"type": "lmdb" if suffix else "disk"}
    return {"name": name, "type": "PairedImageDataset", **roots, "io_backend": backend, **more}


def training_options(train: dict[str, Any], val: dict[str, Any]) -> dict[str, Any]:
    """Complete options for these data sets: four iterations, a checkpoint and a validation every two.

    With betas of 0 and an eps that dwarfs the gradients a step of AdamW is one of plain gradient descent.
    """
    loader = {"num_worker_per_gpu": 1, "batch_size_per_gpu": 2, "persistent_workers": True}
    metrics = {
        name: {"type": f"calculate_{name}", "crop_border": SCALE, "test_y_channel": True}
        for name in ("psnr", "ssim")
    }
    return {
        "name": "single",
        "model_type": "ESCModel",
        "scale": SCALE,
        "num_gpu": "auto",
        "manual_seed": 0,
        "datasets": {"train": {**train, **loader}, "val": val},
        "network_g": {
            **{"type": "ESC", "upscaling_factor": SCALE, "dim": 16, "pdim": 4, "kernel_size": 5},
            **{"n_blocks": 1, "conv_blocks": 1, "window_size": 4, "num_heads": 2},
        },
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {
            "ema_decay": 0.5,
            "optim_g": {"type": "AdamW", "lr": 0.01, "weight_decay": 0, "betas": [0.0, 0.0], "eps": 1.0},
            "scheduler": {"type": "MultiStepLR", "milestones": [3], "gamma": 0.5},
            "total_iter": 4,
            "warmup_iter": -1,
            "pixel_opt": {"type": "MSELoss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "val": {"val_freq": 2, "save_img": False, "metrics": metrics},
        "logger": {"print_freq": 1, "save_checkpoint_freq": 2, "use_tb_logger": True},
        "dist_params": {"backend": "nccl", "port": 29500},
    }


def write(path: Path, options: dict[str, Any]) -> Path:
    """Write an option file."""
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return path


def start_python(*arguments: object, cwd: Path) -> "subprocess.Popen[str]":
    """Start this Python on a CPU, on one thread, with this package at hand."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


# Lives


def live(cwd: Path, lives: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train in ``cwd`` in several processes, one after another, each of which may be ended by a signal.

    Args:
        cwd: Where ``train.yml`` lies.
        lives: For each process ``arguments`` of the command train, and where it ends: ``at`` ("weights",
            "state", "test" or "step"), the ``count``th time it gets there, by ``signal``.

    Returns:
        Each life's exit ``code``, negative for a signal, and its ``output``.
    """
    process = start_python(__file__, json.dumps(lives), cwd=cwd)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return [json.loads(line) for line in (cwd / "lives.jsonl").read_text().splitlines()]


def checkpoint(folder: Path, iteration: int) -> dict[str, Any]:
    """Weights and state of an iteration in an experiment's folder."""
    return {
        "weights": torch.load(folder / "models" / f"net_g_{iteration}.pth", weights_only=True),
        "state": torch.load(folder / "training_states" / f"{iteration}.state", weights_only=True),
    }


def _end_at(at: str, count: int, number: int) -> None:
    """Have this process signalled the ``count``th time that it gets somewhere."""
    from esc_basicsr import checkpoints, files
    from esc_basicsr.models.esc_model import ESCModel

    place: tuple[Any, str] = {
        "weights": (files.os, "fsync"),  # written, and not yet in place
        "state": (checkpoints, "write_state"),
        "test": (ESCModel, "test"),
        "step": (ESCModel, "optimize_parameters"),
    }[at]
    stock, calls = getattr(*place), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
        return stock(*arguments, **options)

    setattr(*place, counted)


def _run_lives(lives: list[dict[str, Any]]) -> None:
    import esc_basicsr.models.esc_model  # noqa: F401 - imported once for all lives
    from esc_basicsr.__main__ import main

    with Path("lives.jsonl").open("w") as said:
        for index, life in enumerate(lives):
            log = Path(f"life{index}.txt")
            process = os.fork()
            if not process:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                if "at" in life:
                    _end_at(life["at"], life["count"], signal.Signals[life["signal"]])
                code: Any = 1
                try:
                    code = main(["train", "-opt", "train.yml", *life["arguments"]])
                except SystemExit as ended:
                    code = ended.code
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            said.write(json.dumps({"code": code, "output": log.read_text()}) + "\n")


if __name__ == "__main__":
    _run_lives(json.loads(sys.argv[1]))
