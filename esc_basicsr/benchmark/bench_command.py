"""Measure latency, peak memory, multiply-adds and parameters of networks, in turn, in one run.

By the field's convention: one image, 1280×720 output, warm-up, median of several runs. A CPU's peak memory is
read from the operating system, Linux or macOS.

  python -m esc_basicsr bench                                     ESC against the release's form of it
  python -m esc_basicsr bench --network ESC-light ESC-FP Bicubic  published variants and BasicSR's networks
  python -m esc_basicsr bench --network ESC MSRResNet.yml -o DIR  network_g of an option file

A network is a published variant (ESC, ESC-light, ESC-FP); the same with ':release' (naive attention, NCHW,
direct convolutions, as the authors released it) or ':release-flex' (its attention by compiled Flex); or a
YAML file with a network_g section. Forms of one variant share their weights, and their outputs are compared.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mmengine
import torch
import torch.nn as nn

from esc_basicsr.archs.variants import SCALES, VARIANTS, build_variant
from esc_basicsr.benchmark.measure import describe_machine, median_times, peak_memory_growth
from esc_basicsr.benchmark.reference import ReferenceNetwork
from esc_basicsr.complexity import OUTPUT_HEIGHT, OUTPUT_WIDTH, measure_complexity
from esc_basicsr.config.loader import load_options
from esc_basicsr.errors import UserError

FORMS = {"": "ours", "release": "the release's form", "release-flex": "the release's form, compiled Flex"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Row(NamedTuple):
    """One network's figures.

    Attributes:
        network: As it was named.
        seconds: Median latency.
        memory: Bytes of peak memory growth.
        flops: Multiply-adds; None for a form of a network that is counted already.
        params: Parameters.
        difference: Largest absolute difference of the output from that of the first network with its weights.
    """

    network: str
    seconds: float
    memory: int
    flops: int | None
    params: int
    difference: float | None


def build(name: str, scale: int) -> nn.Module:
    """Build a network by its name; a variant's weights are random, but the same for each of its forms.

    Raises:
        UserError: There is no such network.
    """
    variant, _, form = name.partition(":")
    if variant in VARIANTS and form in FORMS:
        torch.manual_seed(0)
        net = build_variant(variant, scale)
        # fresh predictors give kernels of zero, which a difference would not notice
        for parameter in net.parameters():
            if parameter.ndim == 4 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return net if not form else ReferenceNetwork(net, compile_flex=form == "release-flex")
    if name.endswith((".yml", ".yaml")):
        from basicsr.archs import build_network

        options = load_options(name)
        if "network_g" not in options:
            raise UserError(f"{name}: there is no network_g section.")
        torch.manual_seed(0)
        return build_network(options["network_g"])
    raise UserError(
        f"{name!r} is no network: expected {', '.join(VARIANTS)}, with ':release' or ':release-flex' or "
        "without, or a YAML file with a network_g section."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--network", nargs="+", default=["ESC:release", "ESC"], help="what to measure")
    parser.add_argument("--scale", type=int, choices=SCALES, default=4, help="upscaling factor (default: 4)")
    parser.add_argument(
        "--input-size", type=int, nargs=2, metavar=("H", "W"), help="default: for 1280×720 output"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, help="runs before them (default: 1)")
    parser.add_argument("-o", "--output", type=Path, help="folder for bench.json, bench.md and bench.png")


def run(args: argparse.Namespace) -> int:
    """Measure, print a Markdown table, and write it down where asked."""
    if args.repeats < 1 or args.warmup < 0:
        raise UserError(f"--repeats must be at least 1 and --warmup 0, got {args.repeats} and {args.warmup}.")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that PyTorch can use.")
    dtype = PRECISIONS[args.precision]
    height, width = args.input_size or (OUTPUT_HEIGHT // args.scale, OUTPUT_WIDTH // args.scale)
    lq = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    rows = measure(args.network, args.scale, lq, args.repeats, args.warmup)
    table = markdown(rows)
    print(table)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        settings = {"scale": args.scale, "input": [height, width], "precision": args.precision}
        settings |= {"repeats": args.repeats, "warmup": args.warmup, "machine": describe_machine(device)}
        rows_json = [row._asdict() for row in rows]
        mmengine.dump({"settings": settings, "rows": rows_json}, args.output / "bench.json", indent=1)
        (args.output / "bench.md").write_text(table + "\n", encoding="utf-8")
        draw(rows, args.output / "bench.png")
    return 0


def measure(names: Sequence[str], scale: int, lq: torch.Tensor, repeats: int, warmup: int) -> list[Row]:
    """Measure networks on one input, in turn."""
    nets = {name: build(name, scale).to(lq.device, lq.dtype).eval() for name in names}
    first: dict[str, torch.Tensor] = {}
    differences: dict[str, float | None] = {}
    with torch.inference_mode():
        for name, net in nets.items():
            sr, variant = net(lq).float(), name.partition(":")[0]
            known = first.setdefault(variant, sr)
            differences[name] = None if known is sr else float((sr - known).abs().max())
        calls = {name: functools.partial(net, lq) for name, net in nets.items()}
        seconds = median_times(calls, repeats, warmup, lq.device)
    rows = []
    for name, net in nets.items():
        is_form = isinstance(net, ReferenceNetwork)
        flops = None if is_form else measure_complexity(net.float(), *lq.shape[-2:]).flops
        memory = peak_memory_growth(functools.partial(build, name, scale), lq)
        params = sum(p.numel() for p in net.parameters())
        rows.append(Row(name, seconds[name], memory, flops, params, differences[name]))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """A table; ratios are to the first row."""
    head = ["network", "latency", "times as fast", "peak memory growth", "ratio"]
    head += ["multiply-adds", "parameters", "difference"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells: list[Any] = [
            row.network,
            f"{row.seconds * 1e3:.1f} ms",
            f"{rows[0].seconds / row.seconds:.2f}",
            f"{row.memory / 2**20:.0f} MiB",
            f"{row.memory / max(rows[0].memory, 1):.2f}",
            "" if row.flops is None else f"{row.flops / 1e9:.2f} G",
            f"{row.params:,}",
            "" if row.difference is None else f"{row.difference:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Parameters against latency, circles sized by memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axis = figure.subplots()
    largest = max(row.memory for row in rows) or 1
    for row in rows:
        axis.scatter(row.seconds * 1e3, row.params / 1e3, s=100 + 1500 * row.memory / largest, alpha=0.5)
        axis.annotate(f"{row.network}\n{row.memory / 2**20:.0f} MiB", (row.seconds * 1e3, row.params / 1e3))
    axis.set_xlabel("latency (ms)")
    axis.set_ylabel("parameters (K)")
    axis.set_title("Circle: peak memory growth")
    axis.margins(0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
