"""One layer of window attention in several methods: scores written out, against fused attention."""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.common.tables import markdown_table, mebibytes, milliseconds, scientific
from esc_basicsr.fast.attention import add_attention
from esc_basicsr.lab.measure.measure import largest_difference, peak_memory_growth, time_networks
from esc_basicsr.lab.networks.release import attend_as_released

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAIVE, KERNELS, FLEX = "naive", "kernels", "flex"
METHODS = (NAIVE, "fused", "by row chunks", KERNELS, FLEX)
_PLAIN = {NAIVE: "Naive", "fused": "SDPA"}  # `attn_type` by method
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
    """

    def __init__(self, method: str, window: int) -> None:
        super().__init__()
        self.method = method
        torch.manual_seed(0)
        self.attn = WindowAttention(DIM, window, HEADS, _PLAIN.get(method, "SDPA"))
        if method == FLEX:  # the release's: ours would go on by SDPA if it failed
            attend_as_released(self.attn, compile_flex=True)
        nn.init.normal_(self.attn.relative_position_bias)  # so that a difference would notice it

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window."""
        if self.method in (*_PLAIN, FLEX):
            return self.attn(x)
        return add_attention(torch.zeros_like(x), nn.Identity(), self.attn, x, self.method == KERNELS)


def naive_memory(window: int, size: Sequence[int]) -> int:
    """Return the bytes of the scores that the naive one writes out for a map of ``size``, and its bias."""
    windows = math.prod(math.ceil(side / window) for side in size)
    return (_MAPS_OF_SCORES * windows + 1) * HEADS * window**4 * 4


def measure(methods: Sequence[str], window: int, x: Tensor, repeats: int, warmup: int) -> list[Row]:
    """Measure methods at one window in turn, on a map (1, 64, H, W)."""
    layers = {method: Layer(method, window).to(x.device, x.dtype).eval() for method in methods}
    memory = {method: peak_memory_growth(functools.partial(Layer, method, window), x) for method in methods}
    times, outputs = time_networks(layers, x, repeats, warmup)
    return [
        Row(
            method,
            window,
            times[method],
            memory[method],
            largest_difference(outputs[method], outputs[methods[0]]),
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


def draw(rows: Sequence[Row]) -> "Figure":
    """Draw time and memory against the window, in logarithms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        measured = [row for row in rows if row.method == method]
        windows = [row.window for row in measured]
        style = {"marker": "os^Dv"[number], "color": f"C{number}", "label": method}
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
