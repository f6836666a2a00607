"""Networks measured in turn on one input: the figures, their table, and the figure of them."""

import functools
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.common.tables import markdown_table, mebibytes, milliseconds, scientific
from esc_basicsr.lab.measure.complexity import measure_complexity
from esc_basicsr.lab.measure.measure import (
    NotEnoughMemoryError,
    largest_difference,
    peak_memory_growth,
    time_networks,
)
from esc_basicsr.lab.networks.by_name import (
    IMPLEMENTATIONS,
    IN_BF16,
    build_network,
    described,
    implementation_of,
    network_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Row(NamedTuple):
    """One network's figures at one scale."""

    network: str  # as it was named
    scale: int
    input: tuple[int, int]  # height, width
    seconds: list[float]  # each latency measured
    memory: int | None  # bytes of peak memory growth; None if it could not be measured
    multiply_adds: int | None  # None if they cannot be counted
    params: int
    # largest absolute difference of the output from that of the network's first implementation
    difference: float | None
    # of the output against the network's in float32, dB for a range of 1; None of what is float32 itself
    psnr: float | None

    @property
    def latency(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def random_image(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Make an image, (1, 3, H, W) in [0, 1], the same each time."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)


def measure(names: Sequence[str], scale: int, lq: torch.Tensor, repeats: int, warmup: int) -> list[Row]:
    """Measure networks on one input, (1, 3, H, W) in [0, 1], in turn.

    One for which the memory is not enough is left out, with a warning.

    Raises:
        NotEnoughMemoryError: No network is left.
    """
    nets = {name: build_network(name, scale, lq.device).to(lq.dtype).eval() for name in names}
    params = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    times, outputs = _time_those_that_fit(nets, lq, repeats, warmup)
    nets.clear()
    first: dict[str, torch.Tensor] = {}
    exact: dict[str, torch.Tensor] = {}
    multiply_adds: dict[str, int | None] = {}
    rows = []
    for name in tqdm(times, desc=f"memory and multiply-adds, ×{scale}", unit="network", leave=False):
        network = network_of(name)
        if not outputs[name].isfinite().all():
            logger.warning("%s ×%d in %s gives numbers that are not finite.", name, scale, lq.dtype)
        difference = largest_difference(outputs[name], first.setdefault(network, outputs[name]))
        if network not in multiply_adds:
            multiply_adds[network] = count_multiply_adds(network, scale, lq)
        psnr = None
        if lq.dtype != torch.float32 or implementation_of(name) in IN_BF16:
            if network not in exact:
                with torch.inference_mode():
                    exact[network] = build_network(network, scale, lq.device).eval()(lq.float())
            psnr = float(-10 * (outputs[name].float() - exact[network]).square().mean().log10())
        size = (lq.shape[-2], lq.shape[-1])
        measured = (times[name], _memory(name, scale, lq), multiply_adds[network], params[name])
        rows.append(Row(name, scale, size, *measured, difference, psnr))
    return rows


def _time_those_that_fit(
    nets: dict[str, nn.Module], lq: torch.Tensor, repeats: int, warmup: int
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    while True:
        try:
            return time_networks(nets, lq, repeats, warmup)
        except NotEnoughMemoryError as failure:
            del nets[failure.network]
            if not nets:
                raise
            logger.warning("%s It is left out, and the measurement begins again.", failure)


def _memory(name: str, scale: int, lq: torch.Tensor) -> int | None:
    """Measure peak memory growth; None, with a warning, where that fails: times are not lost for it.

    None of CUDA graphs too, which hold what a pass takes between passes.
    """
    if implementation_of(name) == "graphs" and lq.device.type == "cuda":
        return None
    try:
        return peak_memory_growth(functools.partial(build_network, name, scale, lq.device), lq)
    except UserError as error:
        logger.warning("%s ×%d: %s", name, scale, error)
        return None


def count_multiply_adds(network: str, scale: int, lq: torch.Tensor) -> int | None:
    """Count multiply-adds of a forward pass on ``lq``; None, with a warning, for what cannot be counted."""
    net = build_network(network, scale)
    problem = ""
    for device in ("meta", str(lq.device)):
        try:
            return measure_complexity(net, lq.shape[-2], lq.shape[-1], device).multiply_adds
        except Exception as error:  # whatever counting makes of foreign code
            problem = described(error)
    logger.warning("%s: multiply-adds are not counted (%s).", network, problem)
    return None


def markdown(rows: Sequence[Row]) -> str:
    """Write a table; ratios are to the first implementation of the same network at the same scale."""
    head = ["network", "scale", "latency", "times as fast", "peak memory growth", "ratio"]
    head += ["multiply-adds", "parameters", "difference"]
    is_half = any(row.psnr is not None for row in rows)
    first: dict[tuple[str, int], Row] = {}
    lines = []
    for row in rows:
        base = first.setdefault((network_of(row.network), row.scale), row)
        ratio = ""
        if row is not base and row.memory is not None and base.memory is not None:
            ratio = f"{row.memory / max(base.memory, 1):.2f}"
        cells = [
            row.network,
            f"×{row.scale}",
            milliseconds(row.latency),
            "" if row is base else f"{base.latency / row.latency:.2f}",
            "" if row.memory is None else mebibytes(row.memory),
            ratio,
            "" if row.multiply_adds is None else f"{row.multiply_adds / 1e9:.2f} G",
            f"{row.params:,}",
            scientific(row.difference),
        ]
        if is_half:
            cells.append("" if row.psnr is None else f"{row.psnr:.1f} dB")
        lines.append(cells)
    return markdown_table(head + ["PSNR against float32"] * is_half, lines)


# of each implementation
_MARKERS = dict(zip(IMPLEMENTATIONS, "ovs^*pDPXhd", strict=True))


def draw(rows: Sequence[Row]) -> "Figure":
    """Draw parameters against latency, by scale.

    A network has a colour, an implementation a marker; circles are sized by memory.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    scales = sorted({row.scale for row in rows})
    networks = list(dict.fromkeys(network_of(row.network) for row in rows))
    used = {implementation_of(row.network) for row in rows}
    figure = Figure(figsize=(3 + 5 * len(scales), 5), layout="constrained")
    largest = max(row.memory or 0 for row in rows) or 1
    for axis, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales, strict=True):
        shown = [row for row in rows if row.scale == scale]
        fewest = min(row.params for row in shown)
        for row in shown:
            colour = f"C{networks.index(network_of(row.network)) % 10}"
            point, marker = (row.latency * 1e3, row.params / 1e3), _MARKERS[implementation_of(row.network)]
            area = 1500 * max(row.memory or 0, 0) / largest
            axis.scatter(*point, s=area, color=colour, alpha=0.25, linewidth=0)
            axis.scatter(*point, s=30, color=colour, marker=marker, zorder=3)
            above = row.params > fewest  # the lowest row's labels keep clear of the next row's
            memory = "?" if row.memory is None else mebibytes(row.memory)
            axis.annotate(
                f"{row.latency * 1e3:,.{0 if row.latency >= 0.1 else 2}f} ms\n{memory}",
                point,
                xytext=(0, (1 if above else -1) * (6 + area**0.5 / 2)),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontsize=8,
            )
        axis.set_xscale("log")
        axis.set_title(f"×{scale}")
        axis.tick_params(axis="x", which="minor", labelsize=6)
        axis.set_xlabel("latency (ms)")
        axis.set_ylabel("parameters (K)")
        axis.margins(0.25, 0.45)
        axis.grid(alpha=0.3, which="both")
    marks = [(f"C{number % 10}", "o", network) for number, network in enumerate(networks)]
    marks += [("black", _MARKERS[key], text) for key, text in IMPLEMENTATIONS.items() if key in used]
    handles = [Line2D([], [], color=colour, marker=m, linestyle="", label=text) for colour, m, text in marks]
    title = "circle: peak memory growth"
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8, title=title)
    return figure
