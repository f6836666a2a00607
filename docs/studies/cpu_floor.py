"""How far ESC is from what a processor can do: its rates, a floor by them, and each implementation's time.

    python docs/studies/cpu_floor.py --network ESC:kernels ESC:kernels-bf16 ESC:openvino-bf16 -o DIR

The processor's rates are PyTorch's, of operands that fit the cache: products of 1024×1024 matrices in
float32 and in bfloat16, exponentials, GELUs; and the bandwidth of copying what does not fit. They are
measured in turn with the networks. The floor is the sum of a network's multiply-adds, exponentials and
GELUs at these rates, products in the implementation's precision; or the time in which each layer reads
and writes its maps once, where that is more. An implementation may come below: kernels skip
multiply-adds, by frequency tiles (docs/speed.md).
Writes cpu_floor.json, cpu_floor.md and cpu_floor.png.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.archs.conv_attention import ConvAttention
from esc_basicsr.archs.layers import ConvFFN
from esc_basicsr.archs.variants import SCALES, VARIANTS, build_variant
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table, milliseconds
from esc_basicsr.common.timing import median_times
from esc_basicsr.lab.gpu_report.floor import layer_calls
from esc_basicsr.lab.measure.benchmark import random_image
from esc_basicsr.lab.measure.complexity import measure_complexity
from esc_basicsr.lab.measure.measure import add_measuring_arguments, check_measuring_arguments
from esc_basicsr.lab.measure.results import make_folder, publish
from esc_basicsr.lab.networks.by_name import (
    IN_BF16,
    build_network,
    check_implementations,
    implementation_of,
    network_of,
)

_SIDE = 1024  # of the matrices
_CACHED, _UNCACHED = 2**16, 2**26  # numbers
_BYTES = 4  # of a map's number
# what is done at each rate, as the table has it; in billions a second
RATES = {
    "float32": "multiply-adds in float32",
    "bfloat16": "multiply-adds in bfloat16",
    "exponentials": "exponentials",
    "gelus": "GELUs",
    "bytes": "bytes read and written",
}


class Work(NamedTuple):
    """What one forward pass has to do."""

    multiply_adds: int
    exponentials: int
    gelus: int
    bytes: int  # that its layers read and write, each its input and its output once


class Row(NamedTuple):
    """An implementation's time, and the floor; seconds."""

    network: str
    seconds: float
    floor: float


def rate_calls() -> dict[str, tuple[Callable[[], object], float]]:
    """Give what measures each of `RATES`, and how many of it a call does."""
    matrix, numbers, many = torch.rand(_SIDE, _SIDE), torch.rand(_CACHED) - 0.5, torch.rand(_UNCACHED)
    half, result, copied = matrix.bfloat16(), torch.empty_like(numbers), torch.empty_like(many)
    times = 64  # a call of one pass over what is cached would be too short to time

    def repeated(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for _ in range(times)]

    return {
        "float32": (lambda: matrix @ matrix, _SIDE**3),
        "bfloat16": (lambda: half @ half, _SIDE**3),
        "exponentials": (repeated(lambda: torch.exp(numbers, out=result)), times * _CACHED),
        "gelus": (repeated(lambda: F.gelu(numbers)), times * _CACHED),
        "bytes": (lambda: copied.copy_(many), 2 * many.nbytes),
    }


def work_of(network: str, scale: int, height: int, width: int) -> Work:
    """Count what a published variant does for an image of height × width."""
    net = build_variant(network, scale)
    multiply_adds = measure_complexity(net, height, width).multiply_adds
    exponentials = gelus = moved = 0
    for layer, x, out in layer_calls(net, (ConvFFN, WindowAttention, ConvAttention), height, width):
        moved += _BYTES * (x.numel() + out.numel())
        rows, columns = out.shape[-2:]
        if isinstance(layer, ConvFFN):
            gelus += 2 * rows * columns * layer.proj.out_channels
        if isinstance(layer, WindowAttention):
            w = layer.window_size
            exponentials += -(-rows // w) * -(-columns // w) * layer.num_heads * w**4
    return Work(multiply_adds, exponentials, gelus, moved)


def floor_of(work: Work, rates: Mapping[str, float], precision: str) -> float:
    """Compute the least seconds, by rates a second, with products in ``precision``, a key of them."""
    arithmetic = work.multiply_adds / rates[precision] + work.exponentials / rates["exponentials"]
    return max(arithmetic + work.gelus / rates["gelus"], work.bytes / rates["bytes"])


def measure(
    names: Sequence[str], scale: int, lq: Tensor, repeats: int, warmup: int
) -> tuple[list[Row], dict[str, float]]:
    """Measure networks and the processor's rates, a second, in turn."""
    nets = {name: build_network(name, scale).eval() for name in names}
    rated = rate_calls()
    calls = {name: call for name, (call, _) in rated.items()}
    calls |= {name: lambda net=net: net(lq) for name, net in nets.items()}
    with torch.inference_mode():
        seconds = median_times(calls, repeats, warmup, lq.device)
    rates = {name: number / seconds[name] for name, (_, number) in rated.items()}
    rows = []
    for name in names:
        work = work_of(network_of(name), scale, lq.shape[-2], lq.shape[-1])
        precision = "bfloat16" if implementation_of(name) in IN_BF16 else "float32"
        rows.append(Row(name, seconds[name], floor_of(work, rates, precision)))
    return rows, rates


def markdown(rows: Sequence[Row], rates: Mapping[str, float]) -> str:
    """Write the tables of rates and of times."""
    cells = [
        (row.network, milliseconds(row.seconds), milliseconds(row.floor), f"{row.seconds / row.floor:.2f}")
        for row in rows
    ]
    of_processor = [(RATES[name], f"{rate / 1e9:,.2f} G") for name, rate in rates.items()]
    return "\n\n".join(
        [
            markdown_table(["the processor", "a second"], of_processor),
            markdown_table(["network", "time", "floor", "times the floor"], cells),
        ]
    )


def draw(rows: Sequence[Row]) -> Figure:
    """Draw each implementation's time, and its floor before it."""
    figure = Figure(figsize=(7, 1 + 0.5 * len(rows)), layout="constrained")
    axis = figure.subplots()
    names = [row.network for row in rows]
    axis.barh(names, [row.seconds * 1e3 for row in rows], color="C0", alpha=0.4, label="time")
    axis.barh(names, [row.floor * 1e3 for row in rows], color="C0", height=0.4, label="floor")
    axis.invert_yaxis()
    axis.set_xlabel("ms")
    axis.legend()
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--network", nargs="+", default=["ESC", "ESC:kernels"], help="implementations")
    parser.add_argument("--scale", type=int, choices=SCALES, default=4)
    parser.add_argument("--input-size", type=int, nargs=2, metavar=("H", "W"), default=(90, 160))
    add_measuring_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, and write them down where asked."""
    device = check_measuring_arguments(args)
    if device.type != "cpu":
        raise UserError("--device: the floor is a CPU's; leave it out here.")
    for name in args.network:
        if network_of(name) not in VARIANTS:
            raise UserError(f"--network {name}: expected {', '.join(VARIANTS)}, or a form of one.")
    if min(args.input_size) < 1:
        raise UserError(f"--input-size must be at least 1 1, got {' '.join(map(str, args.input_size))}.")
    check_implementations(args.network, device, torch.float32)
    make_folder(args.output)
    lq = random_image(*args.input_size, device)
    rows, rates = measure(args.network, args.scale, lq, args.repeats, args.warmup)
    settings = {key: getattr(args, key) for key in ("scale", "input_size", "repeats", "warmup")}
    results = (settings, rows, device, lambda: draw(rows))
    publish(args.output, "cpu_floor", markdown(rows, rates), *results, rates=rates)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("cpu_floor", sys.argv[1:], prog="python docs/studies/cpu_floor.py"))
