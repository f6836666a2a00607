"""One layer of window attention at several windows: scores written out, against fused attention.

    python docs/studies/windows.py -o DIR

The layer is ESC's: 64 channels, 4 heads, on the map of a ×4 network for 1280×720 output, padded to the
window. Its methods share weights and input: naive (scores written out), fused (PyTorch's
scaled_dot_product_attention), the same by row chunks as the networks run it, by kernels (C++, or Triton's
on CUDA), and flex (PyTorch's flex_attention, compiled on CUDA).
The paper's ratios at a window of 32, on its GPU, stand beside ours. Writes windows.json, windows.md and
windows.png.
"""

import argparse
import sys

import torch
from memory_limit import add_memory_limit_argument, memory_limit
from tqdm import tqdm

from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import mebibytes
from esc_basicsr.fast import kernels
from esc_basicsr.lab.measure.measure import add_measuring_arguments, check_measuring_arguments
from esc_basicsr.lab.measure.results import make_folder, publish
from esc_basicsr.lab.measure.window_attention import (
    DIM,
    FLEX,
    HEADS,
    KERNELS,
    METHODS,
    NAIVE,
    Row,
    draw,
    markdown,
    measure,
    naive_memory,
)


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
        "--method",
        nargs="+",
        choices=METHODS,
        default=[method for method in METHODS if method != FLEX],
        help=f"(default: all but {FLEX}, which needs a GPU to be fast; the first is compared with)",
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
    device = check_measuring_arguments(args)
    limit = memory_limit(args, device)
    for option in ("window", "size"):
        if min(getattr(args, option)) < 1:
            raise UserError(f"--{option} must be at least 1, got {min(getattr(args, option))}.")
    methods = list(dict.fromkeys(args.method))
    if device.type == "cpu" and KERNELS in methods:
        kernels.load()
    make_folder(args.output)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, DIM, *args.size, generator=generator).to(device)
    rows: list[Row] = []
    skipped: list[str] = []
    for window in tqdm(sorted(set(args.window)), unit="window"):
        taken = naive_memory(window, args.size)
        present = [method for method in methods if method != NAIVE or taken <= limit]
        if len(present) < len(methods):
            skipped.append(
                f"The naive one is left out at {window}: it would take about {mebibytes(taken)}, "
                f"and the limit is {mebibytes(limit)}."
            )
        rows += measure(present, window, x, args.repeats, args.warmup)
    text = "\n\n".join([markdown(rows), *skipped])
    settings = {"size": list(args.size), "dim": DIM, "heads": HEADS, "precision": "fp32"}
    settings |= {"repeats": args.repeats, "warmup": args.warmup}
    publish(args.output, "windows", text, settings, rows, device, lambda: draw(rows), skipped=skipped)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("windows", sys.argv[1:], prog="python docs/studies/windows.py"))
