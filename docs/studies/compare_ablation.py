r"""Train the rows of the paper's ablation alike for a short while, and draw how their quality grows.

    python docs/studies/compare_ablation.py --small -o OUT
    python docs/studies/compare_ablation.py --device cuda --iterations 20000 --train DIV2K.lmdb \
        --data datasets --val Set5 Urban100 -o OUT

All rows, at ×2 as their option files have them, start from one seed and take the same batches in turn under
one cosine learning rate; after every tenth of the iterations they are measured. Batches and test images are
photographs that come with scikit-image unless others are named. Of full size the rows want a GPU; --small
trains narrower and shallower ones, of which each keeps what makes it a row.

Writes ablation-training.json, .md and .png. Short trainings do not rank networks as 500,000 iterations do.
"""

import argparse
import contextlib
import functools
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from compare_training import (
    CPU_KERNELS,
    UNTIMED,
    batches,
    build,
    options_of,
    train,
    training_sources,
)
from matplotlib.figure import Figure

from esc_basicsr.commands.demo import TRAINING_PHOTOGRAPHS, lay_out_held_out
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.fast import kernels
from esc_basicsr.lab.measure.comparison_table import BASELINE
from esc_basicsr.lab.measure.results import make_folder, publish
from esc_basicsr.metrics.published import ABLATION_FIGURES
from esc_basicsr.metrics.quality import measure_quality, pairs_of_set
from esc_basicsr.options.recipes import ABLATION, BENCHMARKS, ablation_rows

SCALE = 2
PHOTOGRAPHS = "photographs"
# what --small makes of each row: about a tenth of its multiply-adds
SMALL = {"dim": 32, "pdim": 8, "n_blocks": 2, "num_heads": 2}
POINTS = 10  # of a curve


class Row(NamedTuple):
    """One row's training."""

    name: str  # of `ABLATION`, or "ESC"
    params: int
    seconds: float  # median of an iteration
    psnr: dict[str, list[float]]  # test set -> PSNR on Y in dB after each tenth of the iterations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--small", action="store_true", help="smaller networks, for a processor")
    parser.add_argument("--iterations", type=int, default=2000, help="of each row (default: 2000)")
    parser.add_argument("--patch", type=int, default=64, help="side of an LR patch (default: 64)")
    parser.add_argument("--batch", type=int, default=16, help="patches in a batch (default: 16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    rows = [BASELINE, *ABLATION]
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, metavar="ROW", help="default: all")
    parser.add_argument("--train", type=Path, nargs="+", metavar="LMDB", help="HR LMDBs to train on")
    parser.add_argument("--data", type=Path, help="folder of test sets, as datasets/README.md says")
    parser.add_argument("--val", nargs="+", metavar="SET", help="of --data (default: Set5)")


def networks(names: Sequence[str], small: bool) -> dict[str, dict[str, Any]]:
    """Give ``network_g`` of rows, as their option files have it."""
    rows = ablation_rows()
    return {name: {**rows[name].network, **(SMALL if small else {})} for name in names}


def run(args: argparse.Namespace) -> int:
    """Train, measure, draw."""
    from basicsr.utils import get_root_logger

    device = _check(args)
    get_root_logger(log_level=logging.WARNING)  # else each model's layers are listed
    with tempfile.TemporaryDirectory() as folder:
        sets = _test_sets(args, Path(folder))
        try:
            sources = training_sources(args.train, Path(folder))
            source = batches(sources, SCALE, args.patch, args.batch, args.iterations)
        except UserError as error:
            raise UserError(f"--patch {args.patch}, on what is trained on: {error}") from error
        make_folder(args.output)
        implementation = _implementation(device)
        models = {
            name: build(options_of(implementation, network, SCALE, args.iterations, device))
            for name, network in networks(args.rows, args.small).items()
        }
        moments = [args.iterations * (point + 1) // POINTS for point in range(POINTS)]
        psnr: dict[str, dict[str, list[float]]] = {name: {test: [] for test in sets} for name in models}

        def measure(iteration: int) -> None:
            if iteration not in moments:
                return
            for name, model in models.items():
                net = model.get_bare_model(model.net_g).eval()
                for test, pairs in sets.items():
                    figures = measure_quality(net, pairs, SCALE, device, f"{name}, {test}")
                    psnr[name][test].append(figures["psnr"])
                net.train()

        _, seconds, _ = train(models, source, device, measure)
        params = {name: sum(p.numel() for p in model.net_g.parameters()) for name, model in models.items()}
    rows = [
        Row(name, params[name], float(np.median(seconds[name][UNTIMED:])), psnr[name]) for name in args.rows
    ]
    settings = {"small": SMALL if args.small else None, "patch": args.patch, "batch": args.batch}
    settings |= {"iterations": args.iterations, "implementation": implementation}
    settings["train"] = [str(path.name) for path in args.train or ()] or list(TRAINING_PHOTOGRAPHS)
    draw_rows = functools.partial(draw, rows, moments)
    stem = "ablation-training"
    publish(args.output, stem, markdown(rows), settings, rows, device, draw_rows, moments=moments)
    return 0


def _check(args: argparse.Namespace) -> torch.device:
    for name in ("patch", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.iterations < POINTS:
        raise UserError(f"--iterations must be at least {POINTS}, got {args.iterations}.")
    if args.val and args.data is None:
        raise UserError("--val names test sets of a folder: give it by --data.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that PyTorch can use.")
    return torch.device(args.device)


def _implementation(device: torch.device) -> str:
    """Choose of `RUNS`: on a CPU the C++ kernels where they can be compiled: the same in less time."""
    if device.type == "cpu":
        with contextlib.suppress(UserError):
            kernels.load()
            return CPU_KERNELS
    return "float32"


def _test_sets(args: argparse.Namespace, folder: Path) -> dict[str, list[tuple[Path, Path]]]:
    """Find HR and LR files by test set; those that come with scikit-image are made in ``folder``."""
    if args.data is None:
        lay_out_held_out(folder)
        return {PHOTOGRAPHS: pairs_of_set(folder, PHOTOGRAPHS, SCALE)}
    sets = {name: pairs_of_set(args.data, name, SCALE) for name in args.val or ["Set5"]}
    for name, pairs in sets.items():
        if not pairs:
            raise UserError(
                f"--data {args.data}: {name} does not exist as HR/X{SCALE} and LR_bicubic/X{SCALE}; "
                f"'benchmark-set' makes {', '.join(BENCHMARKS)} of their HR images."
            )
    return sets


def markdown(rows: Sequence[Row]) -> str:
    """Write a table of where the trainings ended; differences are to ESC's, the paper's in brackets."""
    sets = list(rows[0].psnr)
    head = ["row", "parameters", "seconds an iteration"]
    head += [cell for test in sets for cell in (f"PSNR on {test}", "to ESC")]
    esc = next((row for row in rows if row.name == BASELINE), None)
    lines = []
    for row in rows:
        cells = [row.name, f"{row.params:,}", f"{row.seconds:.2f}"]
        for test in sets:
            last = row.psnr[test][-1]
            apart = "" if esc in (None, row) else f"{last - esc.psnr[test][-1]:+.2f} dB"
            cells += [f"{last:.2f} dB", " ".join(filter(None, (apart, _published(row.name, test))))]
        lines.append(cells)
    return markdown_table(head, lines)


def _published(name: str, test: str) -> str:
    """Give in brackets what the paper has a row lose against ESC on a test set, if it has that."""
    key = test.lower()
    own, esc = ABLATION_FIGURES["" if name == BASELINE else name], ABLATION_FIGURES[""]
    if name == BASELINE or key not in ("set5", "urban100"):
        return ""
    return f"({getattr(own, key) - getattr(esc, key):+.2f})"


def draw(rows: Sequence[Row], moments: Sequence[int]) -> Figure:
    """Draw PSNR against iterations, and, in the second half, how far each row is from ESC."""
    sets = list(rows[0].psnr)
    figure = Figure(figsize=(12, 4.5 * len(sets)), layout="constrained")
    grid = figure.subplots(len(sets), 2, squeeze=False)
    curves: Mapping[str, Row] = {row.name: row for row in rows}
    late = slice(len(moments) // 2, None)  # before, differences are of how fast rows start
    for (left, right), test in zip(grid, sets, strict=True):
        for number, (name, row) in enumerate(curves.items()):
            style = {"color": f"C{number}", "marker": ".", "label": name}
            left.plot(moments, row.psnr[test], **style)
            if BASELINE in curves:
                apart = np.subtract(row.psnr[test], curves[BASELINE].psnr[test])
                right.plot(moments[late], apart[late], **style)
        left.set_ylabel(f"PSNR on Y, {test} (dB)")
        right.set_ylabel("above ESC (dB)")
        for axis in (left, right):
            axis.set_xlabel("iteration")
            axis.grid(alpha=0.3)
        left.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(
        run_command(
            "compare_ablation",
            sys.argv[1:],
            prog="python docs/studies/compare_ablation.py",
        )
    )
