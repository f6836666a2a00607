"""One layer of window attention at several windows: scores written out, against fused attention.

    python docs/studies/windows.py -o DIR

The layer is ESC's: 64 channels, 4 heads, on the map of a ×4 network for 1280×720 output, padded to the
window. Its methods share weights and input: naive (scores written out), fused (PyTorch's
scaled_dot_product_attention), the same by row chunks as the networks run it, and by the C++ kernels.
The paper's ratios at a window of 32, on its GPU, stand beside ours. Writes windows.json, windows.md and
windows.png.
"""

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from matplotlib.figure import Figure
from memory_limit import add_memory_limit_argument, memory_limit
from torch import Tensor
from tqdm import tqdm

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table, mebibytes, milliseconds, scientific
from esc_basicsr.fast import kernels
from esc_basicsr.fast.attention import add_attention
from esc_basicsr.lab.measure.measure import (
    add_measuring_arguments,
    check_measuring_arguments,
    largest_difference,
    peak_memory_growth,
    time_networks,
)
from esc_basicsr.lab.measure.results import make_folder, publish

NAIVE, KERNELS = "naive", "kernels"
METHODS = (NAIVE, "fused", "by row chunks", KERNELS)
DIM, HEADS = 64, 4
# arXiv:2503.06671: how many times less fused attention takes than naive at a window of 32
PAPER_WINDOW, PAPER_LATENCY, PAPER_MEMORY = 32, 16.0, 12.2
# maps of scores that the naive one holds at once: products, with the bias added, and their softmax
_MAPS_OF_SCORES = 3


class Row(NamedTuple):
    """One method's figures at one window."""

    method: str  # one of `METHODS`
    window: int  # its side
    seconds: list[float]  # each latency measured
    memory: int  # bytes of peak memory growth
    difference: float | None  # largest absolute, of the output from that of the first method

    @property
    def latency(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


class Layer(nn.Module):
    """Window attention in one of `METHODS`.

    Shape:
        Input, output: (B, 64, H, W).

    Raises:
        UserError: The C++ kernels are asked for, and cannot be compiled.
    """

    def __init__(self, method: str, window: int) -> None:
        super().__init__()
        self.method = method
        torch.manual_seed(0)
        self.attn = WindowAttention(DIM, window, HEADS, "Naive" if method == NAIVE else "SDPA")
        nn.init.normal_(self.attn.relative_position_bias)  # so that a difference would notice it
        if method == KERNELS:
            kernels.load()

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window."""
        if self.method in (NAIVE, "fused"):
            return self.attn(x)
        return add_attention(torch.zeros_like(x), nn.Identity(), self.attn, x, self.method == KERNELS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--window",
        type=int,
        nargs="+",
        default=[8, 16, 32, 64],
        help="sides of a window (default: 8 16 32 64)",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="(default: all; the first is compared with)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        default=(180, 320),
        help="of the map (default: 180 320)",
    )
    add_measuring_arguments(parser)
    add_memory_limit_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write it down where asked."""
    device = check_measuring_arguments(args)
    limit = memory_limit(args, device)
    for option in ("window", "size"):
        if min(getattr(args, option)) < 1:
            raise UserError(f"--{option} must be at least 1, got {min(getattr(args, option))}.")
    methods = list(dict.fromkeys(args.method))
    if device.type != "cpu" and KERNELS in methods:
        raise UserError("--method kernels: the C++ kernels are for a CPU; name the other methods.")
    make_folder(args.output)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, DIM, *args.size, generator=generator).to(device)
    rows: list[Row] = []
    skipped: list[str] = []
    for window in tqdm(sorted(set(args.window)), unit="window"):
        taken = naive_memory(window, args.size)
        present = [method for method in methods if method != NAIVE or taken <= limit]
        if len(present) < len(methods):
            skipped.append(
                f"The naive one is left out at {window}: it would take about {mebibytes(taken)}, "
                f"and the limit is {mebibytes(limit)}."
            )
        rows += measure(present, window, x, args.repeats, args.warmup)
    text = "\n\n".join([markdown(rows), *skipped])
    settings = {"size": list(args.size), "dim": DIM, "heads": HEADS, "precision": "fp32"}
    settings |= {"repeats": args.repeats, "warmup": args.warmup}
    publish(args.output, "windows", text, settings, rows, device, lambda: draw(rows), skipped=skipped)
    return 0


def naive_memory(window: int, size: Sequence[int]) -> int:
    """Return the bytes of the scores that the naive one writes out for a map of ``size``, and its bias."""
    windows = math.prod(math.ceil(side / window) for side in size)
    return (_MAPS_OF_SCORES * windows + 1) * HEADS * window**4 * 4


def measure(methods: Sequence[str], window: int, x: Tensor, repeats: int, warmup: int) -> list[Row]:
    """Measure methods at one window in turn, on a map (1, 64, H, W)."""
    layers = {method: Layer(method, window).to(x.device).eval() for method in methods}
    memory = {method: peak_memory_growth(functools.partial(Layer, method, window), x) for method in methods}
    times, outputs = time_networks(layers, x, repeats, warmup)
    first = outputs[methods[0]] if methods else None
    return [
        Row(
            method,
            window,
            times[method],
            memory[method],
            largest_difference(outputs[method], first),
        )
        for method in methods
    ]


def _ratios(row: Row, rows: Sequence[Row]) -> tuple[float, float] | None:
    """Return how many times less ``row`` takes than the naive one at its window: time, memory."""
    for naive in rows:
        if naive.method == NAIVE and naive.window == row.window and naive is not row:
            return naive.latency / row.latency, naive.memory / max(row.memory, 1)
    return None


def markdown(rows: Sequence[Row]) -> str:
    """Write a table; ratios are to the naive one at the same window."""
    head = ["window", "method", "latency", "÷", "peak memory growth", "÷", "difference"]
    lines = []
    for row in rows:
        ratios = _ratios(row, rows)
        lines.append(
            [
                str(row.window),
                row.method,
                milliseconds(row.latency),
                "" if ratios is None else f"{ratios[0]:.1f}",
                mebibytes(row.memory),
                "" if ratios is None else f"{ratios[1]:.1f}",
                scientific(row.difference),
            ]
        )
    last = max((i for i, row in enumerate(rows) if row.window == PAPER_WINDOW), default=None)
    if last is not None:
        papers = ["", f"{PAPER_LATENCY:g}", "", f"{PAPER_MEMORY:g}", ""]
        lines.insert(last + 1, [str(PAPER_WINDOW), "the paper's, on its GPU", *papers])
    return markdown_table(head, lines)


def draw(rows: Sequence[Row]) -> Figure:
    """Draw time and memory against the window, in logarithms."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        measured = [row for row in rows if row.method == method]
        windows = [row.window for row in measured]
        style = {"marker": "os^D"[number], "color": f"C{number}", "label": method}
        left.plot(windows, [row.latency * 1e3 for row in measured], **style)
        right.plot(windows, [row.memory / 2**20 for row in measured], **style)
    left.set_ylabel("latency (ms)")
    right.set_ylabel("peak memory growth (MiB)")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = sorted({row.window for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel("side of a window")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    return figure


if __name__ == "__main__":
    sys.exit(run_command("windows", sys.argv[1:], prog="python docs/studies/windows.py"))
