"""Measure latency, peak memory, multiply-adds and parameters of networks, in turn, in one run.

By the field's convention: one image, 1280×720 output, warm-up, median of several runs. CUDA is timed by
events, in strict float32 (no TF32) unless a precision is asked for, and its memory is that of PyTorch's
allocator; a CPU's is read from the operating system, Linux or macOS, in a fresh process.

  python -m esc_basicsr bench                                          ESC against the release's form of it
  python -m esc_basicsr bench --network ESC:release ESC ESC:kernels --scale 2 3 4 -o DIR
  python -m esc_basicsr bench --network ESC MSRResNet spandrel.DAT weights.pth options.yml

A network is a published variant (ESC, ESC-light, ESC-FP); the same with ':release' (naive attention, NCHW,
direct convolutions, as the authors released it), ':release-flex' (its attention by compiled Flex),
':kernels' (ours by the C++ kernels, float32 on a CPU) or ':compiled' (ours by torch.compile); a rival of
the paper's (SwinIR-light, RCAN, HiT-SRF, MambaIRv2-light, ATD-light, OmniSR); a network of BasicSR's
registry, with options where it needs some ('EDSR,num_in_ch=3,num_out_ch=3'); one of spandrel's
architectures (spandrel.DAT); a YAML file with a network_g section; each of these with ',weights=FILE' if it
is to be a trained one; or a checkpoint of ESC, one that spandrel reads, or a TorchScript file. Forms of a
variant share their weights, and their outputs and figures are compared with those of the first of them at
that scale. A network with a scale of its own, as a checkpoint has, is measured at that scale, whatever
--scale says.

An option that stands for the scale (upscale, scale and the like) is filled in. Weights are random, except
those of files. spandrel comes with the extra esc-basicsr[spandrel].
"""

import argparse
import functools
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from esc_basicsr.archs.variants import SCALES, VARIANTS
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.lab.measure.complexity import OUTPUT_HEIGHT, OUTPUT_WIDTH, measure_complexity
from esc_basicsr.lab.measure.measure import (
    NotEnoughMemoryError,
    add_measuring_arguments,
    describe_machine,
    device_to_measure_on,
    largest_difference,
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
from esc_basicsr.lab.networks.by_name import FORMS, build, check_forms, network_of, scale_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Row(NamedTuple):
    """One network's figures at one scale.

    Attributes:
        network: As it was named.
        scale: Scale of its output.
        input: Height and width of its input.
        seconds: Each latency measured.
        memory: Bytes of peak memory growth; None if it could not be measured.
        flops: Multiply-adds; None if they cannot be counted.
        params: Parameters.
        difference: Largest absolute difference of the output from that of the first form of the network.
        psnr: Of the output against the first form's in float32, dB for a range of 1; None in float32.
    """

    network: str
    scale: int
    input: tuple[int, int]
    seconds: list[float]
    memory: int | None
    flops: int | None
    params: int
    difference: float | None
    psnr: float | None

    @property
    def latency(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--network",
        nargs="+",
        default=["ESC:release", "ESC"],
        help="what to measure (default: ESC:release ESC)",
    )
    parser.add_argument(
        "--scale", type=int, nargs="+", choices=SCALES, default=[4], help="upscaling factors (default: 4)"
    )
    parser.add_argument(
        "--input-size", type=int, nargs=2, metavar=("H", "W"), help="default: for 1280×720 output"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="half precision is compared with float32 too (default: fp32)",
    )
    add_measuring_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print a Markdown table, and write it down where asked."""
    device, dtype = device_to_measure_on(args), PRECISIONS[args.precision]
    if args.input_size is not None and min(args.input_size) < 1:
        raise UserError(f"--input-size must be at least 1 1, got {' '.join(map(str, args.input_size))}.")
    check_forms(args.network, device, dtype)
    cases: dict[int, list[str]] = {}
    for scale in args.scale:
        for name in args.network:
            names = cases.setdefault(scale_of(name, scale), [])
            if name not in names:
                names.append(name)
    make_folder(args.output)
    rows: list[Row] = []
    for scale, names in cases.items():
        height, width = args.input_size or (OUTPUT_HEIGHT // scale, OUTPUT_WIDTH // scale)
        lq = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        rows += measure(names, scale, lq, args.repeats, args.warmup)
    table = markdown(rows)
    print(table)
    if args.output is not None:
        settings = {"precision": args.precision, "repeats": args.repeats, "warmup": args.warmup}
        settings["machine"] = describe_machine(device)
        results = {"settings": settings, "rows": [row._asdict() for row in rows]}
        write_report(args.output, "bench", results, table, draw(rows))
    return 0


def measure(names: Sequence[str], scale: int, lq: torch.Tensor, repeats: int, warmup: int) -> list[Row]:
    """Measure networks on one input, (1, 3, H, W) in [0, 1], in turn.

    One for which the memory is not enough is left out, with a warning.

    Raises:
        NotEnoughMemoryError: No network is left.
    """
    nets = {name: build(name, scale).to(lq.device, lq.dtype).eval() for name in names}
    params = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    times, outputs = _time_those_that_fit(nets, lq, repeats, warmup)
    nets.clear()
    first: dict[str, torch.Tensor] = {}
    exact: dict[str, torch.Tensor] = {}
    flops: dict[str, int | None] = {}
    rows = []
    for name in tqdm(times, desc=f"memory and multiply-adds, ×{scale}", unit="network", leave=False):
        network = network_of(name)
        if not outputs[name].isfinite().all():
            logger.warning("%s ×%d in %s gives numbers that are not finite.", name, scale, lq.dtype)
        difference = largest_difference(outputs[name], first.setdefault(network, outputs[name]))
        psnr = None
        if lq.dtype != torch.float32:
            if network not in exact:
                with torch.inference_mode():
                    exact[network] = build(name, scale).to(lq.device).eval()(lq.float())
            error = (outputs[name].float() - exact[network]).square().mean()
            psnr = float(-10 * error.log10())
        if network not in flops:
            flops[network] = count_flops(network, scale, lq)
        memory = _memory(name, scale, lq)
        size = (lq.shape[-2], lq.shape[-1])
        rows.append(
            Row(name, scale, size, times[name], memory, flops[network], params[name], difference, psnr)
        )
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
    """Peak memory growth; None, with a warning, where it could not be measured: times are not lost for it."""
    try:
        return peak_memory_growth(functools.partial(build, name, scale), lq)
    except UserError as error:
        logger.warning("%s ×%d: %s", name, scale, error)
        return None


def count_flops(network: str, scale: int, lq: torch.Tensor) -> int | None:
    """Multiply-adds of a forward pass on ``lq``; None for a network that cannot be traced, with a warning."""
    try:
        return measure_complexity(build(network, scale).to(lq.device), *lq.shape[-2:]).flops
    except Exception as error:  # whatever tracing makes of foreign code
        logger.warning("%s: multiply-adds are not counted (%s: %s).", network, type(error).__name__, error)
        return None


def markdown(rows: Sequence[Row]) -> str:
    """A table; ratios are to the first form of the same network at the same scale."""
    head = ["network", "scale", "latency", "times as fast", "peak memory growth", "ratio"]
    head += ["multiply-adds", "parameters", "difference"]
    is_half = any(row.psnr is not None for row in rows)
    first: dict[tuple[str, int], Row] = {}
    lines = []
    for row in rows:
        yardstick = first.setdefault((network_of(row.network), row.scale), row)
        is_first = yardstick is row
        cells = [
            row.network,
            f"×{row.scale}",
            milliseconds(row.latency),
            "" if is_first else f"{yardstick.latency / row.latency:.2f}",
            _memory_text(row),
            _memory_ratio(row, yardstick),
            "" if row.flops is None else f"{row.flops / 1e9:.2f} G",
            f"{row.params:,}",
            "" if row.difference is None else f"{row.difference:.1e}",
        ]
        if is_half:
            cells.append("" if row.psnr is None else f"{row.psnr:.1f} dB")
        lines.append(cells)
    return markdown_table(head + ["PSNR against float32"] * is_half, lines)


def _memory_text(row: Row) -> str:
    return "" if row.memory is None else mebibytes(row.memory)


def _memory_ratio(row: Row, yardstick: Row) -> str:
    if row is yardstick or row.memory is None or yardstick.memory is None:
        return ""
    return f"{row.memory / max(yardstick.memory, 1):.2f}"


def draw(rows: Sequence[Row]) -> "Figure":
    """Parameters against latency, by scale: a colour a network, a marker a form, circles sized by memory."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    scales = sorted({row.scale for row in rows})
    networks = list(dict.fromkeys(network_of(row.network) for row in rows))
    forms = [form for form in FORMS if any(_form_of(row.network) == form for row in rows)]
    figure = Figure(figsize=(3 + 5 * len(scales), 5), layout="constrained")
    largest = max(row.memory or 0 for row in rows) or 1
    for axis, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales, strict=True):
        shown = [row for row in rows if row.scale == scale]
        fewest = min(row.params for row in shown)
        for row in shown:
            colour = f"C{networks.index(network_of(row.network)) % 10}"
            marker = _MARKERS[_form_of(row.network)]
            place = (row.latency * 1e3, row.params / 1e3)
            area = 1500 * max(row.memory or 0, 0) / largest
            axis.scatter(*place, s=area, color=colour, alpha=0.25, linewidth=0)
            axis.scatter(*place, s=30, color=colour, marker=marker, zorder=3)
            above = row.params > fewest  # the lowest row's labels keep clear of the next row's
            axis.annotate(
                f"{row.latency * 1e3:,.{0 if row.latency >= 0.1 else 2}f} ms\n{_memory_text(row) or '?'}",
                place,
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
    handles = [
        Line2D([], [], color=f"C{number % 10}", marker="o", linestyle="", label=network)
        for number, network in enumerate(networks)
    ]
    handles += [
        Line2D([], [], color="black", marker=_MARKERS[form], linestyle="", label=FORMS[form])
        for form in forms
    ]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=4, fontsize=8, title="circle: peak memory growth"
    )
    return figure


_MARKERS = {"": "o", "release": "s", "release-flex": "^", "kernels": "*", "compiled": "D"}


def _form_of(name: str) -> str:
    return name.partition(":")[2] if network_of(name) in VARIANTS else ""
