"""Count the parameters and multiply-adds of the published ESC networks.

The convention is the field's: one image, 1280×720 output, a multiply-add counts once. Attention's two
matrix products are counted, whatever backend computes them.

  python -m esc_basicsr complexity
  python -m esc_basicsr complexity --variant ESC --scale 4 --modules       mmengine's table, module by module
"""

import argparse

import torch
from mmengine.analysis import get_model_complexity_info
from tqdm import tqdm

from esc_basicsr.archs.variants import RELEASED, SCALES, build_variant, scales_of
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.lab.measure.complexity import OUTPUT_HEIGHT, OUTPUT_WIDTH, measure_complexity, written_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--variant", nargs="+", choices=RELEASED, default=list(RELEASED), help="networks (default: all)"
    )
    parser.add_argument(
        "--scale",
        nargs="+",
        type=int,
        choices=SCALES,
        default=list(SCALES),
        help="default: all",
    )
    parser.add_argument(
        "--modules", action="store_true", help="list each network's modules too, by mmengine's analysis"
    )


def run(args: argparse.Namespace) -> int:
    """Print a Markdown table, and a table of modules for each network where asked."""
    rows, modules = [], []
    wanted = [(name, scale) for name in args.variant for scale in args.scale if scale in scales_of(name)]
    for name, scale in tqdm(wanted, unit="network"):
        with torch.device("meta"):  # sizes alone are needed
            net = build_variant(name, scale)
        size = (OUTPUT_HEIGHT // scale, OUTPUT_WIDTH // scale)
        params, multiply_adds = measure_complexity(net, *size)
        rows.append([name, f"×{scale}", f"{params:,}", f"{multiply_adds / 1e9:.2f} G"])
        if args.modules:
            net = written_out(build_variant(name, scale))
            info = get_model_complexity_info(net, (3, *size), show_arch=False)
            modules.append(f"\n{name} ×{scale}\n{info['out_table']}")
    print("\n".join([markdown_table(["network", "scale", "parameters", "multiply-adds"], rows), *modules]))
    return 0
