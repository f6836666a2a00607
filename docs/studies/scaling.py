"""Time and peak memory of networks against the size of their output, and the power of the pixels that fits.

    python docs/studies/scaling.py -o DIR
    python docs/studies/scaling.py --network ESC ESC-light --sizes 256x256 512x512 1024x1024

Sizes are measured from the smallest. What a network will take at the next one is estimated from those before,
and it is left out from the size on that would take more than --memory-limit. Prints a table, and for each
network the exponent of a least-squares line through the larger half of its sizes, in logarithms: 1 is linear.
Networks are named as in ``python -m esc_basicsr bench``. Writes scaling.json, scaling.md and scaling.png.
"""

import argparse
import functools
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from memory_limit import add_memory_limit_argument, memory_limit
from tqdm import tqdm

from esc_basicsr.archs.variants import SCALES
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table, mebibytes, milliseconds, scientific
from esc_basicsr.lab.measure.benchmark import random_image
from esc_basicsr.lab.measure.measure import (
    add_measuring_arguments,
    check_measuring_arguments,
    largest_difference,
    peak_memory_growth,
    time_networks,
)
from esc_basicsr.lab.measure.results import make_folder, publish
from esc_basicsr.lab.networks.by_name import build_network, check_implementations, network_of, scale_of

SIZES = ["64x64", "128x128", "256x256", "512x512", "1024x1024", "2048x2048", "4096x4096", "7680x4320"]
NETWORKS = ["ESC:release", "ESC", "ESC:kernels"]
ONCE_ABOVE = 10.0  # seconds from which a run is not repeated


class Row(NamedTuple):
    """One network's figures at one size."""

    network: str  # as it was named
    output: tuple[int, int]  # width, height
    seconds: list[float]  # each latency measured
    memory: int  # bytes of peak memory growth
    difference: (
        float | None
    )  # largest absolute, of the output from that of the network's first implementation

    @property
    def latency(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def pixels(self) -> int:
        """Of the output."""
        return math.prod(self.output)


def output_size(text: str) -> tuple[int, int]:
    """Read a size, WIDTHxHEIGHT."""
    found = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT, as 1280x720")
    return int(found[1]), int(found[2])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    names = " ".join(NETWORKS)
    parser.add_argument("--network", nargs="+", default=NETWORKS, help=f"what to measure (default: {names})")
    parser.add_argument("--scale", type=int, choices=SCALES, default=4, help="upscaling factor (default: 4)")
    parser.add_argument(
        "--sizes",
        type=output_size,
        nargs="+",
        default=[output_size(text) for text in SIZES],
        metavar="WxH",
        help=f"sizes of the output, multiples of the scale (default: {' '.join(SIZES)})",
    )
    add_measuring_arguments(parser, repeats=3)
    add_memory_limit_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and the exponents, and write them down where asked."""
    device = check_measuring_arguments(args)
    limit = memory_limit(args, device)
    names = list(dict.fromkeys(args.network))
    sizes = sorted(set(args.sizes), key=math.prod)
    for width, height in sizes:
        if width % args.scale or height % args.scale:
            raise UserError(f"--sizes {width}x{height}: not a multiple of the scale, {args.scale}.")
    check_implementations(names, device, torch.float32)
    for name in names:
        found = scale_of(name, args.scale)
        if found != args.scale:
            raise UserError(f"{name}: upscales ×{found}: give it --scale {found}, or leave it out here.")
    make_folder(args.output)
    rows, skipped = measure(names, args.scale, sizes, args.repeats, args.warmup, device, limit)
    text = markdown(rows, skipped)
    settings = {"scale": args.scale, "repeats": args.repeats, "warmup": args.warmup, "precision": "fp32"}
    settings |= {"memory_limit": limit}
    more = {"exponents": {name: exponents(rows, name) for name in names}, "skipped": skipped}
    publish(args.output, "scaling", text, settings, rows, device, lambda: draw(rows), **more)
    return 0


def measure(
    names: Sequence[str],
    scale: int,
    sizes: Sequence[tuple[int, int]],
    repeats: int,
    warmup: int,
    device: torch.device,
    limit: float,
) -> tuple[list[Row], list[str]]:
    """Measure networks at growing sizes, in turn at each.

    Returns:
        The figures, and why what is missing was left out.
    """
    nets = {name: build_network(name, scale, device).eval() for name in names}
    rows: list[Row] = []
    skipped: list[str] = []
    # as work grows with the pixels, so does the bar
    with tqdm(total=sum(map(math.prod, sizes)), desc="sizes", unit="pixel", unit_scale=True) as bar:
        for width, height in sizes:
            lq = random_image(height // scale, width // scale, device)
            present = {}
            for name, net in list(nets.items()):
                expected = expected_memory([row for row in rows if row.network == name], width * height)
                if expected > limit:
                    skipped.append(
                        f"{name} is left out from {width}×{height} on: it would take about "
                        f"{mebibytes(expected)}, and the limit is {mebibytes(limit)}."
                    )
                    del nets[name]
                    continue
                present[name] = net
            builders = {name: functools.partial(build_network, name, scale, device) for name in present}
            memory = {name: peak_memory_growth(build, lq) for name, build in builders.items()}
            times, outputs = time_networks(present, lq, repeats, warmup, once_above=ONCE_ABOVE)
            first: dict[str, torch.Tensor] = {}
            for name in present:
                known = first.setdefault(network_of(name), outputs[name])
                difference = largest_difference(outputs[name], known)
                rows.append(Row(name, (width, height), times[name], memory[name], difference))
            bar.update(width * height)
    return rows, skipped


def expected_memory(measured: Sequence[Row], pixels: int) -> float:
    """Estimate the bytes that a network will take, from what it took at smaller sizes; 0 if nothing is known.

    It is taken to grow as between the last two sizes, at least linearly, at most with the square.
    """
    if not measured:
        return 0.0
    *_, last = measured
    power = 1.0
    if len(measured) > 1:
        before = measured[-2]
        growth = math.log(max(last.memory, 1) / max(before.memory, 1))
        power = min(max(growth / math.log(last.pixels / before.pixels), 1.0), 2.0)
    return float(last.memory * (pixels / last.pixels) ** power)


def exponents(rows: Sequence[Row], network: str) -> dict[str, float] | None:
    """Fit powers of the pixels with which time and memory grow over the larger half of a network's sizes.

    Returns:
        ``seconds`` and ``memory``; None where there are fewer than two sizes.
    """
    measured = [row for row in rows if row.network == network]
    half = measured[-max(len(measured) // 2, 2) :]
    if len(half) < 2:
        return None
    pixels = np.log([row.pixels for row in half])

    def power(values: Sequence[float]) -> float:
        return float(np.polyfit(pixels, np.log(values), 1)[0])

    return {
        "seconds": power([row.latency for row in half]),
        "memory": power([max(row.memory, 1) for row in half]),
    }


def markdown(rows: Sequence[Row], skipped: Sequence[str]) -> str:
    """Write the table of figures, that of exponents, and what was left out."""
    head = ["network", "output", "runs", "latency", "for a pixel", "peak memory growth", "for a pixel"]
    figures = [
        [
            row.network,
            "×".join(map(str, row.output)),
            str(len(row.seconds)),
            milliseconds(row.latency),
            f"{row.latency / row.pixels * 1e9:,.0f} ns",
            mebibytes(row.memory),
            f"{row.memory / row.pixels:,.0f} B",
            scientific(row.difference),
        ]
        for row in rows
    ]
    fits = []
    for name in dict.fromkeys(row.network for row in rows):
        powers: Mapping[str, float] | None = exponents(rows, name)
        if powers is not None:
            fits.append([name, f"{powers['seconds']:.2f}", f"{powers['memory']:.2f}"])
    parts = [markdown_table([*head, "difference"], figures)]
    if fits:
        parts.append(markdown_table(["network", "time grows with pixels to the", "memory to the"], fits))
    parts.append(f"A run of more than {ONCE_ABOVE:.0f} s is not repeated. " + " ".join(skipped))
    return "\n\n".join(parts).rstrip()


def draw(rows: Sequence[Row]) -> Figure:
    """Draw time and memory against pixels, in logarithms; dotted lines are linear."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(row.network for row in rows)):
        measured = [row for row in rows if row.network == name]
        pixels = [row.pixels / 1e6 for row in measured]
        powers = exponents(rows, name)
        figures = {
            "seconds": [row.latency for row in measured],
            "memory": [row.memory / 2**20 for row in measured],
        }
        for axis, (key, values) in zip((left, right), figures.items(), strict=True):
            label = name if powers is None else f"{name}: pixels to the {powers[key]:.2f}"
            axis.plot(pixels, values, marker="os^D"[number % 4], color=f"C{number}", label=label)
            linear = [values[-1] * size / pixels[-1] for size in pixels]
            axis.plot(pixels, linear, color=f"C{number}", linestyle=":", linewidth=1)
    left.set_ylabel("latency (s)")
    right.set_ylabel("peak memory growth (MiB)")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("pixels of the output (millions); dotted: linear")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(run_command("scaling", sys.argv[1:], prog="python docs/studies/scaling.py"))
