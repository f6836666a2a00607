"""Train one network under each of ESCModel's options for speed, from one start, on the same batches.

    python docs/studies/compare_training.py -o docs
    python docs/studies/compare_training.py --device cuda --network ESC-light --batch 64 -o OUT

Each iteration takes one batch through every training in turn, so that a slow minute of the machine slows all
of them. Writes training-speed.json and training-speed.png, and prints a Markdown table.
"""

import argparse
import copy
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mmengine
import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
import yaml
from compare_losses import NETWORK
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from esc_basicsr.archs.variants import SCALES, VARIANTS
from esc_basicsr.commands.demo import TRAINING_PHOTOGRAPHS
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table, mebibytes, scientific
from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets
from esc_basicsr.data.dflip_dataset import DFLIPDataset
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.lab.measure.results import describe_machine
from esc_basicsr.lab.networks.release import attend_as_released
from esc_basicsr.options.recipes import Recipe, training_text
from esc_basicsr.training.esc_model import ESCModel

Curve = npt.NDArray[np.float64]

RELEASE = "release"
CPU_KERNELS = "cpu_kernels"
ON_CPU = (CPU_KERNELS, "cpu_kernels+bf16")
# name -> what it adds to the options of the first, which the others are compared with
RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"train": {"amp": "bf16"}},
    "fp16": {"train": {"amp": "fp16"}},
    "accumulate-4": {"train": {"accumulate": 4}},
    "channels_last": {"channels_last": True},
    "compile": {"train": {"compile": True}},
    CPU_KERNELS: {"cpu_kernels": True},
    "cpu_kernels+bf16": {"cpu_kernels": True, "train": {"amp": "bf16"}},
    "bf16+channels_last+compile": {"train": {"amp": "bf16", "compile": True}, "channels_last": True},
    RELEASE: {},
    # the measure of differences: how far two sound trainings differ
    "other-start": {"manual_seed": 1},
}
LEARNING_RATE = 1e-3
UNTIMED = 5  # iterations, in which things compile and memory is found
SMOOTHED = 25  # iterations of a moving average


class Row(NamedTuple):
    """One training's figures."""

    run: str  # a key of `RUNS`
    seconds: float  # median of an iteration
    # bytes, peak of an iteration, weights and optimizer of all trainings included; None on a CPU
    memory: int | None
    loss: float  # mean of the last `SMOOTHED` losses
    largest: float  # largest relative difference of its smoothed losses from the first row's
    mean: float  # of those differences


def release_form(network: dict[str, Any], compile_flex: bool) -> nn.Module:
    """Build what ``network``, a ``network_g``, says as the authors released it; for BasicSR's registry."""
    from basicsr.archs import build_network

    return attend_as_released(build_network(network), compile_flex)


def options_of(
    run: str, network: Mapping[str, Any], scale: int, iterations: int, device: torch.device
) -> dict[str, Any]:
    """Make the options to train ``network`` with: the shipped recipe in short, and what `RUNS` adds."""
    from basicsr.utils.registry import ARCH_REGISTRY

    opt: dict[str, Any] = yaml.safe_load(training_text(Recipe("ESC", 2, "DIV2K", VARIANTS["ESC"])))
    opt |= {"is_train": True, "dist": False, "rank": 0, "world_size": 1}
    opt["num_gpu"] = int(device.type == "cuda")
    del opt["datasets"]["train"]["global_batch_size"]  # it would choose what `RUNS` says of accumulation
    opt["network_g"] = {**network, "upscaling_factor": scale}
    if run == RELEASE:
        if "release_form" not in ARCH_REGISTRY:
            ARCH_REGISTRY.register(release_form)
        form = {"type": "release_form", "network": opt["network_g"], "compile_flex": device.type == "cuda"}
        opt["network_g"] = form
    opt["train"]["total_iter"] = iterations
    opt["train"]["warmup_iter"] = iterations // 20
    opt["train"]["optim_g"]["lr"] = LEARNING_RATE
    opt["train"]["scheduler"] = {
        "type": "CosineAnnealingRestartLR",
        "periods": [iterations],
        "restart_weights": [1],
        "eta_min": LEARNING_RATE / 100,
    }
    changes = copy.deepcopy(RUNS[run])
    opt["train"] |= changes.pop("train", {})
    return opt | changes


def build(opt: dict[str, Any]) -> ESCModel:
    """Build a model from the weights that ``manual_seed`` gives."""
    torch.manual_seed(opt["manual_seed"])
    return ESCModel(opt)


def training_sources(given: Sequence[Path] | None, folder: Path) -> list[Path]:
    """Find HR LMDBs to train on: those given, or one of scikit-image's photographs, made in ``folder``."""
    if given is not None:
        return [*given]
    photos = {name: load_sample_image(name) for name in TRAINING_PHOTOGRAPHS}
    return [*build_lmdb_sets(photos, folder, "photographs", crop_size=0).values()]


def batches(sources: Sequence[Path], scale: int, patch: int, batch: int, iterations: int) -> DataLoader[Any]:
    """Load random crops of HR LMDBs and their reductions, ``patch`` LR pixels wide, the same each time."""
    roots = [{"dataroot_gt": str(source)} for source in sources]
    opt = {"name": "training", "phase": "train", "scale": scale, "sources": roots, "gt_size": patch * scale}
    dataset = DFLIPDataset({**opt, "use_hflip": True, "use_rot": True})
    random.seed(0)
    order = RandomSampler(dataset, True, iterations * batch, torch.Generator().manual_seed(0))
    return DataLoader(dataset, batch, sampler=order)


def train(
    models: Mapping[str, ESCModel],
    source: DataLoader[Any],
    device: torch.device,
    after: Callable[[int], None] = lambda iteration: None,
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, int | None]]:
    """Train all models in turn.

    Args:
        models: By run.
        source: Batches, one an iteration.
        device: Where the models are.
        after: Called with the iteration's number when all have gone through it.

    Returns:
        By run: the loss and the seconds of each iteration, and the peak of memory in use, as in `Row`.
    """
    losses: dict[str, list[float]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    peaks: dict[str, int | None] = dict.fromkeys(models)
    for iteration, data in enumerate(tqdm(source, unit="iteration"), 1):
        for name, model in models.items():
            model.update_learning_rate(iteration, model.opt["train"]["warmup_iter"])
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            # by the clock: what the processor does between a GPU's kernels counts
            start = time.perf_counter()
            model.feed_data(data)
            model.optimize_parameters(iteration)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            if device.type == "cuda" and iteration > UNTIMED:
                peaks[name] = max(peaks[name] or 0, torch.cuda.max_memory_allocated())
            losses[name].append(model.get_current_log()["l_pix"])
        after(iteration)
    return losses, seconds, peaks


def smooth(losses: Sequence[float]) -> Curve:
    """Take the moving average over `SMOOTHED` iterations, or all if there are fewer."""
    width = min(SMOOTHED, len(losses))
    return np.convolve(losses, np.full(width, 1 / width), mode="valid")


def draw(curves: Mapping[str, Curve], path: Path) -> None:
    """Draw the smoothed losses, and below them their differences from the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8))
    top, bottom = figure.subplots(2, 1, sharex=True)
    (_, first), *_ = curves.items()
    iterations = np.arange(len(first)) + SMOOTHED
    for number, (name, curve) in enumerate(curves.items()):
        style = {"color": f"C{number}", "linestyle": ("-", "--", ":")[number % 3]}
        top.plot(iterations, curve, label=name, **style)
        if number:
            difference = np.abs(curve / first - 1)
            bottom.plot(iterations, np.maximum(difference, 1e-9), label=name, **style)
    top.set_ylabel(f"loss, mean of {SMOOTHED} iterations")
    bottom.set_ylabel(f"relative difference from {next(iter(curves))}")
    bottom.set_xlabel("iteration")
    for axis in (top, bottom):
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    top.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def markdown(rows: Sequence[Row]) -> str:
    """Write a table; ratios are to the first row."""
    head = ["training", "iterations/s", "times as fast", "peak memory", "final loss"]
    head += ["largest difference", "mean difference"]
    lines = []
    for row in rows:
        is_first = row is rows[0]
        cells = [
            row.run,
            f"{1 / row.seconds:.2f}",
            f"{rows[0].seconds / row.seconds:.2f}",
            "" if row.memory is None else mebibytes(row.memory),
            f"{row.loss:.5f}",
            scientific(None if is_first else row.largest),
            scientific(None if is_first else row.mean),
        ]
        lines.append(cells)
    return markdown_table(head, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--network", choices=VARIANTS, help="published variant (default: a small ESC, for CPUs)"
    )
    parser.add_argument("--scale", type=int, choices=SCALES, default=2)
    parser.add_argument("--patch", type=int, default=64, help="side of an LR patch (default: 64)")
    parser.add_argument("--batch", type=int, default=16, help="patches in a batch (default: 16)")
    parser.add_argument("--iterations", type=int, default=300, help="(default: 300)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--runs",
        nargs="+",
        choices=RUNS,
        metavar="RUN",
        help=f"of {', '.join(RUNS)}; the first is what the others are compared with (default: all that the "
        f"device has, {' and '.join(ON_CPU)} on a CPU alone)",
    )
    parser.add_argument(
        "--train",
        type=Path,
        nargs="+",
        metavar="LMDB",
        help="HR LMDBs to train on (default: photographs that come with scikit-image)",
    )


def run(args: argparse.Namespace) -> int:
    """Train, compare, draw."""
    from basicsr.utils import get_root_logger

    for name in ("patch", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.iterations <= UNTIMED:
        raise UserError(f"--iterations must be above {UNTIMED}, which are not timed, got {args.iterations}.")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that PyTorch can use.")
    if device.type != "cpu" and (on_cpu := [run for run in ON_CPU if run in (args.runs or ())]):
        raise UserError(f"--runs {' '.join(on_cpu)}: the kernels are for a CPU; leave it out here.")
    if args.runs is None:
        args.runs = [run for run in RUNS if device.type == "cpu" or run not in ON_CPU]
    get_root_logger(log_level=logging.WARNING)  # else each model's layers are listed
    network = VARIANTS[args.network] if args.network else {"type": "ESC", **NETWORK}
    with tempfile.TemporaryDirectory() as folder:
        sources = training_sources(args.train, Path(folder))
        source = batches(sources, args.scale, args.patch, args.batch, args.iterations)
        models = {
            name: build(options_of(name, network, args.scale, args.iterations, device)) for name in args.runs
        }
        losses, seconds, peaks = train(models, source, device)
    curves = {name: smooth(values) for name, values in losses.items()}
    first = curves[args.runs[0]]
    rows = []
    for name, curve in curves.items():
        difference = np.abs(curve / first - 1)
        figures = (float(curve[-1]), float(difference.max()), float(difference.mean()))
        rows.append(Row(name, float(np.median(seconds[name][UNTIMED:])), peaks[name], *figures))
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {"network": network, "scale": args.scale, "patch": args.patch, "batch": args.batch}
    settings |= {"iterations": args.iterations, "machine": describe_machine(device)}
    results = {"settings": settings, "rows": [row._asdict() for row in rows], "losses": losses}
    mmengine.dump(results, args.output / "training-speed.json")
    draw(curves, args.output / "training-speed.png")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(
        run_command(
            "compare_training",
            sys.argv[1:],
            prog="python docs/studies/compare_training.py",
        )
    )
