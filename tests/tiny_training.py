"""A training that takes seconds: its images, its options, and lives of it that end as a test wants."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import cv2
import lmdb
import numpy as np
import torch
import yaml

SCALE = 2


def write_images(folder: Path, count: int, height: int, width: int) -> None:
    """Write HR and LR images, as PNG folders and as LMDBs, whose LR is the mean of SCALE×SCALE pixels."""
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
    """Give a section for `write_images`'s images: its LMDBs with the suffix ``.lmdb``, else its PNGs."""
    roots = {f"dataroot_{key}": f"{folder}/{kind}{suffix}" for key, kind in (("gt", "hr"), ("lq", "lr"))}
    backend = {"type": "lmdb" if suffix else "disk"}
    return {"name": name, "type": "PairedImageDataset", **roots, "io_backend": backend, **more}


def training_options(train: dict[str, Any], val: dict[str, Any]) -> dict[str, Any]:
    """Give complete options for these data sets: four iterations, a checkpoint and a validation every two.

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


def start_python(*arguments: object, cwd: Path, gpus: str = "") -> "subprocess.Popen[str]":
    """Start this Python on a CPU, or on ``gpus``, on one thread, with this package at hand."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "CUDA_VISIBLE_DEVICES": gpus,
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
    """Train in ``cwd`` in several lives, one after another, each of which may meet with something.

    Args:
        cwd: Where ``train.yml`` lies.
        lives: For each ``arguments`` of the command train; ``ranks``, if it has several processes; and what
            befalls one, ``rank`` (0 if left out): ``at`` ("weights", "state", "test" or "step") the
            ``count``th time that it gets there ``signal`` is sent to it, or at each ``count`` in a list of
            losses one is not a number (``at``: "loss"); ``model``, if the model is not ESCModel.

    Returns:
        Of each life the ``codes`` that its ranks ended with, negative for a signal, and all its ``output``.
    """
    process = start_python(__file__, json.dumps(lives), cwd=cwd)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return [json.loads(line) for line in (cwd / "lives.jsonl").read_text().splitlines()]


def checkpoint(folder: Path, iteration: int) -> dict[str, Any]:
    """Read weights and state of an iteration in an experiment's folder."""
    return {
        "weights": torch.load(folder / "models" / f"net_g_{iteration}.pth", weights_only=True),
        "state": torch.load(folder / "training_states" / f"{iteration}.state", weights_only=True),
    }


def same(one: Any, other: Any) -> bool:
    """Tell whether two checkpoints' contents are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _befall(at: str, count: Any, number: int | None, model: str) -> None:
    """Have something happen to this process the ``count``th time that it gets somewhere."""
    from basicsr.losses.basic_loss import MSELoss
    from basicsr.models import MODEL_REGISTRY

    from esc_basicsr.common import files
    from esc_basicsr.training import checkpoints

    cls = MODEL_REGISTRY.get(model)
    place: tuple[Any, str] = {
        "weights": (files.os, "fsync"),  # written, and not yet in place
        "state": (checkpoints, "write_state"),
        "test": (cls, "test"),
        "step": (cls, "optimize_parameters"),
        "loss": (MSELoss, "forward"),
    }[at]
    stock, calls = getattr(*place), 0

    @functools.wraps(stock)  # by which a method of ours is told
    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if number is not None and calls == count:
            os.kill(os.getpid(), number)
        result = stock(*arguments, **options)
        spoilt = number is None and calls in count
        return result * float("nan") if spoilt else result

    setattr(*place, counted)


def _run_rank(life: dict[str, Any], rank: int, log: Path, port: int) -> NoReturn:
    from esc_basicsr.__main__ import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    arguments = ["train", "-opt", "train.yml", *life["arguments"]]
    if "ranks" in life:
        arguments += ["--launcher", "pytorch"]
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(life["ranks"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if "at" in life and rank == life.get("rank", 0):
        number = life.get("signal")
        _befall(
            *(life["at"], life["count"], number and signal.Signals[number]), life.get("model", "ESCModel")
        )
    code: Any = 1
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _run_lives(lives: list[dict[str, Any]]) -> None:
    import esc_basicsr.training.esc_model  # noqa: F401 - imported once for all lives

    with Path("lives.jsonl").open("w") as said:
        for index, life in enumerate(lives):
            log = Path(f"life{index}.txt")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            ranks = []
            for rank in range(life.get("ranks", 1)):
                process = os.fork()
                if not process:
                    _run_rank(life, rank, log, port)
                ranks.append(process)
            codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
            said.write(json.dumps({"codes": codes, "output": log.read_text()}) + "\n")


if __name__ == "__main__":
    _run_lives(json.loads(sys.argv[1]))
