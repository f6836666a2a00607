"""Time a training step of ESC in its implementations, in turn, and compare their gradients.

    python docs/studies/training_step.py -o DIR
    python docs/studies/training_step.py --device cuda --network ESC:release-flex ESC --batch 64

A step is what BasicSR's train.py does with a batch: forward pass, RGB L1, backward pass, AdamW. The learning
rate is zero, so that each step of each form starts from the same weights. Gradients are compared with the
first form's of the same variant, parameter by parameter: norm of the difference against norm. Writes
training_step.json, training_step.md and training_step.png.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from matplotlib.figure import Figure
from torch import Tensor

from esc_basicsr.archs.variants import SCALES, VARIANTS
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table, milliseconds, scientific
from esc_basicsr.common.timing import times_in_turn
from esc_basicsr.lab.measure.measure import (
    add_measuring_arguments,
    check_measuring_arguments,
)
from esc_basicsr.lab.measure.results import make_folder, publish
from esc_basicsr.lab.networks.by_name import build_network, check_implementations, network_of

# autocast of the forward pass; weights stay float32
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


class Row(NamedTuple):
    """One implementation's figures."""

    network: str  # as it was named
    seconds: list[float]  # each step measured
    difference: float | None  # largest relative one of a parameter's gradient from the first implementation's
    bias_difference: float | None  # the same for the position biases alone

    @property
    def latency(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


class Step:
    """A training step of a network on one batch.

    Args:
        net: The network, where the batch is.
        lq: (B, 3, H, W) in [0, 1].
        gt: (B, 3, H·s, W·s) in [0, 1].
        dtype: What autocast computes in, or None.
    """

    def __init__(self, net: nn.Module, lq: Tensor, gt: Tensor, dtype: torch.dtype | None) -> None:
        self.net, self.lq, self.gt, self.dtype = net.train(), lq, gt, dtype
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0)

    def __call__(self) -> None:
        """Take it."""
        self.optimizer.zero_grad()
        with torch.autocast(self.lq.device.type, self.dtype, enabled=self.dtype is not None):
            sr = self.net(self.lq)
        (sr.float() - self.gt).abs().mean().backward()
        self.optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the last step by parameter, named alike in each implementation."""
        named = self.net.named_parameters()
        return {
            name.removeprefix("net."): grad
            for name, parameter in named
            if (grad := parameter.grad) is not None
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--network",
        nargs="+",
        default=["ESC-light:release", "ESC-light", "ESC-light:kernels"],
        help="variants and their forms, named as for bench (default: ESC-light in three)",
    )
    parser.add_argument("--scale", type=int, choices=SCALES, default=2, help="upscaling factor (default: 2)")
    parser.add_argument("--batch", type=int, default=4, help="images (default: 4)")
    parser.add_argument("--patch", type=int, default=64, help="side of their LR (default: 64)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="bf16 is autocast (default: fp32)"
    )
    add_measuring_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write it down where asked."""
    device, dtype = check_measuring_arguments(args), PRECISIONS[args.precision]
    for name in args.network:
        if network_of(name) not in VARIANTS:
            raise UserError(f"--network {name}: expected {', '.join(VARIANTS)}, or a form of one.")
        if device.type == "cpu" and name.endswith(":release-flex"):
            raise UserError(f"--network {name}: Flex has no gradients on a CPU; leave it out here.")
    if min(args.batch, args.patch) < 1:
        raise UserError(f"--batch and --patch must be at least 1, got {args.batch} and {args.patch}.")
    check_implementations(args.network, device, dtype or torch.float32)
    make_folder(args.output)
    random = torch.Generator().manual_seed(0)
    lq = torch.rand(args.batch, 3, args.patch, args.patch, generator=random).to(device)
    side = args.patch * args.scale
    gt = torch.rand(args.batch, 3, side, side, generator=random).to(device)
    rows = measure(args.network, args.scale, lq, gt, dtype, args.repeats, args.warmup)
    keys = ("scale", "batch", "patch", "precision", "repeats", "warmup")
    settings = {key: getattr(args, key) for key in keys}
    publish(args.output, "training_step", markdown(rows), settings, rows, device, lambda: draw(rows))
    return 0


def measure(
    names: Sequence[str],
    scale: int,
    lq: Tensor,
    gt: Tensor,
    dtype: torch.dtype | None,
    repeats: int,
    warmup: int,
) -> list[Row]:
    """Measure steps of several forms on one batch, in turn."""
    steps = {
        name: Step(build_network(name, scale, lq.device), lq, gt, dtype) for name in dict.fromkeys(names)
    }
    times = times_in_turn(steps, repeats, warmup, lq.device)
    first: dict[str, dict[str, Tensor]] = {}
    rows = []
    for name, step in steps.items():
        gradients = step.gradients()
        expected = first.setdefault(network_of(name), gradients)
        compare = functools.partial(largest_relative_difference, gradients, expected)
        if expected is gradients:
            rows.append(Row(name, times[name], None, None))
        else:
            rows.append(Row(name, times[name], compare(""), compare("relative_position_bias")))
    return rows


def largest_relative_difference(
    gradients: dict[str, Tensor], expected: dict[str, Tensor], part: str
) -> float:
    """Return, over the parameters whose name has ``part`` in it: norm of the difference, against the norm."""
    tiny = torch.finfo(torch.float32).tiny
    named = [(gradients[name], grad) for name, grad in expected.items() if part in name]
    differences = [(made - grad).norm() / grad.norm().clamp(min=tiny) for made, grad in named]
    return float(torch.stack(differences).max())


def markdown(rows: Sequence[Row]) -> str:
    """Write a table; ratios are to the first implementation of the same variant."""
    first: dict[str, Row] = {}
    lines = []
    for row in rows:
        base = first.setdefault(network_of(row.network), row)
        ratio = "" if base is row else f"{base.latency / row.latency:.2f}"
        differences = map(scientific, (row.difference, row.bias_difference))
        lines.append([row.network, milliseconds(row.latency), ratio, *differences])
    head = ["network", "a step", "times as fast", "gradients differ", "position bias's alone"]
    return markdown_table(head, lines)


def draw(rows: Sequence[Row]) -> Figure:
    """Draw steps per second."""
    figure = Figure(figsize=(7, 1 + 0.5 * len(rows)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh([row.network for row in rows], [1 / row.latency for row in rows])
    axis.bar_label(bars, fmt="%.3g")
    axis.invert_yaxis()
    axis.set_xlabel("steps per second")
    axis.margins(x=0.15)
    return figure


if __name__ == "__main__":
    name = "training_step"
    sys.exit(run_command(name, sys.argv[1:], prog=f"python -m {name}"))
