"""One layer of window attention at several windows: scores written out, against fused attention.

    python docs/studies/windows.py -o DIR

The layer is ESC's: 64 channels, 4 heads, on the map of a ×4 network for 1280×720 output, padded to the
window. Its forms share weights and input: naive (scores written out), fused (PyTorch's
scaled_dot_product_attention), the same by strips of windows as the networks run it, and by the C++ kernels.
The paper's ratios at a window of 32, on its GPU, stand beside ours. Writes windows.json, windows.md and
windows.png.
"""

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.fast import kernels
from esc_basicsr.fast.attention import add_attention
from esc_basicsr.lab.measure.measure import (
    add_measuring_arguments,
    add_memory_limit_argument,
    describe_machine,
    device_to_measure_on,
    largest_difference,
    memory_limit,
    peak_memory_growth,
    time_networks,
)
from esc_basicsr.lab.measure.report import (
    make_folder,
    markdown_table,
    mebibytes,
    milliseconds,
    write_report,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAIVE, KERNELS = "naive", "kernels"
FORMS = (NAIVE, "fused", "by strips", KERNELS)
DIM, HEADS = 64, 4
# arXiv:2503.06671: how many times less fused attention takes than naive at a window of 32
PAPER_WINDOW, PAPER_LATENCY, PAPER_MEMORY = 32, 16.0, 12.2
# maps of scores that the naive form holds at once: products, with the bias added, and their softmax
_MAPS_OF_SCORES = 3


class Row(NamedTuple):
    """One form's figures at one window.

    Attributes:
        form: One of `FORMS`.
        window: Side of a window.
        seconds: Each latency measured.
        memory: Bytes of peak memory growth.
        difference: Largest absolute difference of the output from that of the first form.
    """

    form: str
    window: int
    seconds: list[float]
    memory: int
    difference: float | None

    @property
    def latency(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


class Layer(nn.Module):
    """Window attention in one of `FORMS`.

    Shape:
        Input, output: (B, 64, H, W).

    Raises:
        UserError: The C++ kernels are asked for, and cannot be compiled.
    """

    def __init__(self, form: str, window: int) -> None:
        super().__init__()
        self.form = form
        torch.manual_seed(0)
        self.attn = WindowAttention(DIM, window, HEADS, "Naive" if form == NAIVE else "SDPA")
        nn.init.normal_(self.attn.relative_position_bias)  # so that a difference would notice it
        if form == KERNELS:
            kernels.load()

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window."""
        if self.form in (NAIVE, "fused"):
            return self.attn(x)
        return add_attention(torch.zeros_like(x), nn.Identity(), self.attn, x, self.form == KERNELS)


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
        "--form",
        nargs="+",
        choices=FORMS,
        default=list(FORMS),
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
    device = device_to_measure_on(args)
    limit = memory_limit(args, device)
    for option in ("window", "size"):
        if min(getattr(args, option)) < 1:
            raise UserError(f"--{option} must be at least 1, got {min(getattr(args, option))}.")
    forms = list(dict.fromkeys(args.form))
    if device.type != "cpu" and KERNELS in forms:
        raise UserError("--form kernels: the C++ kernels are for a CPU; name the other forms.")
    make_folder(args.output)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, DIM, *args.size, generator=generator).to(device)
    rows: list[Row] = []
    left_out: list[str] = []
    for window in tqdm(sorted(set(args.window)), unit="window"):
        taken = naive_memory(window, args.size)
        present = [form for form in forms if form != NAIVE or taken <= limit]
        if len(present) < len(forms):
            left_out.append(
                f"The naive form is left out at {window}: it would take about {mebibytes(taken)}, "
                f"and the limit is {mebibytes(limit)}."
            )
        rows += measure(present, window, x, args.repeats, args.warmup)
    text = "\n\n".join([markdown(rows), *left_out])
    print(text)
    if args.output is not None:
        settings = {"size": list(args.size), "dim": DIM, "heads": HEADS, "precision": "fp32"}
        settings |= {"repeats": args.repeats, "warmup": args.warmup, "machine": describe_machine(device)}
        results = {"settings": settings, "rows": [row._asdict() for row in rows], "left_out": left_out}
        write_report(args.output, "windows", results, text, draw(rows))
    return 0


def naive_memory(window: int, size: Sequence[int]) -> int:
    """Bytes of the float32 scores that the naive form writes out for a map of ``size``, and of its bias."""
    windows = math.prod(math.ceil(side / window) for side in size)
    return (_MAPS_OF_SCORES * windows + 1) * HEADS * window**4 * 4


def measure(forms: Sequence[str], window: int, x: Tensor, repeats: int, warmup: int) -> list[Row]:
    """Measure forms at one window in turn, on a map (1, 64, H, W)."""
    layers = {form: Layer(form, window).to(x.device).eval() for form in forms}
    memory = {form: peak_memory_growth(functools.partial(Layer, form, window), x) for form in forms}
    times, outputs = time_networks(layers, x, repeats, warmup)
    first = outputs[forms[0]] if forms else None
    return [
        Row(form, window, times[form], memory[form], largest_difference(outputs[form], first))
        for form in forms
    ]


def _ratios(row: Row, rows: Sequence[Row]) -> tuple[float, float] | None:
    """How many times less ``row`` takes than the naive form at its window: time, memory."""
    for naive in rows:
        if naive.form == NAIVE and naive.window == row.window and naive is not row:
            return naive.latency / row.latency, naive.memory / max(row.memory, 1)
    return None


def markdown(rows: Sequence[Row]) -> str:
    """A table; ratios are to the naive form at the same window."""
    head = ["window", "form", "latency", "÷", "peak memory growth", "÷", "difference"]
    lines = []
    for row in rows:
        ratios = _ratios(row, rows)
        lines.append(
            [
                str(row.window),
                row.form,
                milliseconds(row.latency),
                "" if ratios is None else f"{ratios[0]:.1f}",
                mebibytes(row.memory),
                "" if ratios is None else f"{ratios[1]:.1f}",
                "" if row.difference is None else f"{row.difference:.1e}",
            ]
        )
    last = max((i for i, row in enumerate(rows) if row.window == PAPER_WINDOW), default=None)
    if last is not None:
        papers = ["", f"{PAPER_LATENCY:g}", "", f"{PAPER_MEMORY:g}", ""]
        lines.insert(last + 1, [str(PAPER_WINDOW), "the paper's, on its GPU", *papers])
    return markdown_table(head, lines)


def draw(rows: Sequence[Row]) -> "Figure":
    """Time and memory against the window, in logarithms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, form in enumerate(dict.fromkeys(row.form for row in rows)):
        measured = [row for row in rows if row.form == form]
        windows = [row.window for row in measured]
        style = {"marker": "os^D"[number], "color": f"C{number}", "label": form}
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
