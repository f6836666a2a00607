"""Ways to run the selective scan in PyTorch: time, memory and exactness of each, in one run.

    python docs/studies/selective_scan_speed.py -o DIR

The sizes are MambaIRv2-light's: 48 channels of 8 states, on the map of a ×4 network for 1280×720 output,
padded to the window. The designs: the recurrence step by step; in chunks, within which prefixes double in
length; in chunks, the steps of all of them taken together and every state written down; and `selective_scan`,
which writes none down. Differences are from the recurrence in float64, relative to its largest number, over
all gradients the largest. Writes selective_scan.json, selective_scan.md and selective_scan.png.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table, mebibytes, milliseconds, scientific
from esc_basicsr.common.timing import times_in_turn
from esc_basicsr.lab.measure.measure import (
    add_measuring_arguments,
    check_measuring_arguments,
    peak_memory_growth,
)
from esc_basicsr.lab.measure.results import make_folder, publish
from esc_basicsr.lab.networks.selective_scan import CHUNK, implementation, selective_scan

# ruff: noqa: N803 - A, B, C and D as in the paper

CHANNELS, STATES = 48, 8
OURS = "walked twice, no states written"
# a design that takes more seconds than this is run once
_SLOW = 10.0
_PIECE = 256


def step_by_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """Run the recurrence as it is written, see `selective_scan`."""
    dt = F.softplus(delta + delta_bias)
    h = u.new_zeros(len(u), *A.shape)
    y = []
    # In pieces: a backward pass over one list of all steps takes time in the square of their number.
    for piece in zip(*(value.split(_PIECE, 1) for value in (dt, dt * u, B, C)), strict=True):
        read = []
        for dt_l, x_l, B_l, C_l in zip(*(value.unbind(1) for value in piece), strict=True):
            h = torch.exp(dt_l[..., None] * A) * h + x_l[..., None] * B_l[:, None]
            read.append((h * C_l[:, None]).sum(-1))
        y.append(torch.stack(read, 1))
    return torch.cat(y, 1) + D * u


def _doubled(decay: Tensor, h: Tensor) -> Tensor:
    """Compute states of chunks that start from zero: each pass doubles the steps that a state has seen."""
    seen = 1
    while seen < len(h):
        h = torch.cat([h[:seen], torch.addcmul(h[seen:], decay[seen:], h[:-seen])])
        decay = torch.cat([decay[:seen], decay[seen:] * decay[:-seen]])
        seen *= 2
    return h


def _walked(decay: Tensor, h: Tensor) -> Tensor:
    """Compute states of chunks that start from zero: one step of all chunks at a time."""
    states = [h[0]]
    for decay_l, h_l in zip(decay[1:], h[1:], strict=True):
        states.append(torch.addcmul(h_l, decay_l, states[-1]))
    return torch.stack(states)


def in_chunks(
    within: Callable[[Tensor, Tensor], Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """Compute states of chunks by ``within``, as if from zero; then what enters a chunk is added."""

    def chunks(value: Tensor) -> Tensor:  # [batch, (chunks steps), rows] -> [steps, batch, chunks, rows]
        value = F.pad(value, (0, 0, 0, -value.shape[1] % CHUNK))
        return value.unflatten(1, (-1, CHUNK)).movedim(2, 0).contiguous()

    dt = F.softplus(delta + delta_bias)
    dt_l, x_l, B_l, C_l = (chunks(value) for value in (dt, dt * u, B, C))
    h = within(torch.exp(dt_l[..., None] * A), x_l[..., None] * B_l[..., None, :])
    since_start = torch.exp(dt_l.cumsum(0)[..., None] * A)
    entering = [torch.zeros_like(h[-1, :, 0])]
    for decay, made in zip(since_start[-1].unbind(1), h[-1].unbind(1), strict=True):
        entering.append(torch.addcmul(made, decay, entering[-1]))
    h = torch.addcmul(h, since_start, torch.stack(entering[:-1], 1))
    y = (h * C_l[..., None, :]).sum(-1)
    return y.movedim(0, 2).flatten(1, 2)[:, : u.shape[1]] + D * u


DESIGNS: dict[str, Callable[..., Tensor]] = {
    "step by step": step_by_step,
    "chunks, prefixes doubled": functools.partial(in_chunks, _doubled),
    "chunks, walked once, states written": functools.partial(in_chunks, _walked),
    OURS: selective_scan,
}


class Row(NamedTuple):
    """One design's figures; of each pair the first is the output's alone, the second with all gradients."""

    design: str  # one of `DESIGNS`
    seconds: tuple[list[float], list[float]]  # each time measured
    memory: tuple[int, int]  # bytes of peak growth, 12 for each number of the input with it
    differences: tuple[float, float]

    @property
    def latencies(self) -> tuple[float, float]:
        """Median seconds."""
        return statistics.median(self.seconds[0]), statistics.median(self.seconds[1])


def random_inputs(n: int, device: torch.device) -> list[Tensor]:
    """Make what `selective_scan` takes, as a new network has it: steps of 0.001 to 0.1, rates of 1 to N."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, n, CHANNELS), (1, n, CHANNELS), (1, n, STATES), (1, n, STATES))
    u, delta, B, C = (torch.randn(shape, generator=generator) for shape in shapes)
    A = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    inputs = (u, delta, A, B, C, torch.ones(CHANNELS), torch.linspace(-6.9, -2.3, CHANNELS))
    return [value.to(device) for value in inputs]


def with_gradients(design: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Compute the output, and the gradients of its sum of squares by every input."""
    inputs = [value.detach().requires_grad_() for value in inputs]
    y = design(*inputs)
    return (y.detach(), *torch.autograd.grad(y.square().sum(), inputs))


class Scan(nn.Module):
    """A design on random inputs, as many steps as the image that it is given has pixels.

    Args:
        design: One of `DESIGNS`.
        gradients: Whether gradients are computed.
    """

    def __init__(self, design: str, gradients: bool) -> None:
        super().__init__()
        self.design = DESIGNS[design]
        self.gradients = gradients

    def forward(self, image: Tensor) -> Tensor:
        """Run."""
        with torch.inference_mode(False), torch.set_grad_enabled(self.gradients):
            inputs = random_inputs(image[0, 0].numel(), image.device)
            return with_gradients(self.design, inputs)[0] if self.gradients else self.design(*inputs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), default=(192, 320), help="of the map"
    )
    parser.add_argument("--design", nargs="+", choices=DESIGNS, default=list(DESIGNS), help="(default: all)")
    add_measuring_arguments(parser, repeats=3)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write it down where asked."""
    device = check_measuring_arguments(args)
    if min(args.size) < 1:
        raise UserError(f"--size must be at least 1, got {min(args.size)}.")
    make_folder(args.output)
    rows = measure(list(dict.fromkeys(args.design)), args.size, device, args.repeats, args.warmup)
    settings = {"size": list(args.size), "channels": CHANNELS, "states": STATES, "chunk": CHUNK}
    settings |= {"ours": implementation(device), "repeats": args.repeats, "warmup": args.warmup}
    publish(args.output, "selective_scan", markdown(rows), settings, rows, device, lambda: draw(rows))
    return 0


def measure(
    designs: Sequence[str], size: Sequence[int], device: torch.device, repeats: int, warmup: int
) -> list[Row]:
    """Measure designs in turn, on a map of ``size``."""
    image = torch.zeros(1, 1, *size, device=device)
    inputs = random_inputs(image.numel(), device)
    exact = with_gradients(step_by_step, [value.double() for value in inputs])
    results: dict[str, tuple[Tensor, ...]] = {}

    def forward(design: str) -> None:
        with torch.no_grad():
            DESIGNS[design](*inputs)

    def forward_and_backward(design: str) -> None:
        results[design] = with_gradients(DESIGNS[design], inputs)

    times = [
        times_in_turn({d: functools.partial(call, d) for d in designs}, repeats, warmup, device, _SLOW)
        for call in (forward, forward_and_backward)
    ]
    rows = []
    for design in designs:
        forward_memory, both = (
            peak_memory_growth(functools.partial(Scan, design, g), image) for g in (False, True)
        )
        output, *gradients = (
            float((value - reference).abs().max() / reference.abs().max())
            for value, reference in zip(results[design], exact, strict=True)
        )
        seconds = (times[0][design], times[1][design])
        rows.append(Row(design, seconds, (forward_memory, both), (output, max(gradients))))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Write a table; ratios are to the first design."""
    head = ["design", "forward", "÷", "with gradients", "÷", "memory", "with gradients", "difference"]
    lines = []
    for row in rows:
        cells = [row.design]
        for latency, first in zip(row.latencies, rows[0].latencies, strict=True):
            cells += [milliseconds(latency), f"{first / latency:.1f}"]
        cells += [mebibytes(memory) for memory in row.memory]
        lines.append([*cells, *map(scientific, row.differences)])
    return markdown_table([*head, "of gradients"], lines)


def draw(rows: Sequence[Row]) -> Figure:
    """Draw time and memory of each design, in logarithms."""
    figure = Figure(figsize=(11, 1.5 + 0.6 * len(rows)), layout="constrained")
    names = [row.design for row in rows]
    panels = figure.subplots(1, 2, sharey=True)
    scaled = ((1e3, "latencies", "time (ms)"), (2**-20, "memory", "peak memory growth (MiB)"))
    for axis, (unit, figures, label) in zip(panels, scaled, strict=True):
        for i, (what, offset) in enumerate((("forward", -0.2), ("with gradients", 0.2))):
            places = [place + offset for place in range(len(rows))]
            values = [getattr(row, figures)[i] * unit for row in rows]
            axis.bar_label(axis.barh(places, values, 0.38, label=what), fmt="{:,.0f}", padding=2)
        axis.set_xscale("log")
        axis.margins(x=0.3)
        axis.set_xlabel(label)
    panels[0].set_yticks(range(len(rows)), names)
    panels[0].invert_yaxis()
    panels[1].legend()
    return figure


if __name__ == "__main__":
    name = "selective_scan_speed"
    sys.exit(run_command(name, sys.argv[1:], prog=f"python -m {name}"))
