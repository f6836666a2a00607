"""Training steps of a network's implementations, timed in turn, and their gradients compared."""

import functools
import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from esc_basicsr.common.tables import markdown_table, milliseconds, scientific
from esc_basicsr.common.timing import times_in_turn
from esc_basicsr.lab.networks.by_name import build_network, network_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
            re.sub(r"^(net\.)+", "", name): grad
            for name, parameter in named
            if (grad := parameter.grad) is not None
        }


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


def draw(rows: Sequence[Row]) -> "Figure":
    """Draw steps per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.5 * len(rows)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh([row.network for row in rows], [1 / row.latency for row in rows])
    axis.bar_label(bars, fmt="%.3g")
    axis.invert_yaxis()
    axis.set_xlabel("steps per second")
    axis.margins(x=0.15)
    return figure
