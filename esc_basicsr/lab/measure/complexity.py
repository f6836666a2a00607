"""Count the parameters and multiply-adds of the published ESC networks, by mmengine's complexity analysis.

The convention is the field's: one image, 1280×720 output, a multiply-add counts once. Attention's two
matrix products are counted, whatever backend computes them.
"""

import argparse
import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from mmengine.analysis import FlopAnalyzer
from tqdm import tqdm

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.archs.variants import SCALES, VARIANTS, build_variant
from esc_basicsr.lab.networks.selective_scan import count_multiply_adds

OUTPUT_HEIGHT, OUTPUT_WIDTH = 720, 1280


class Complexity(NamedTuple):
    """What a network weighs.

    Attributes:
        params: Number of learned parameters.
        flops: Multiply-adds of one forward pass.
    """

    params: int
    flops: int


def _attention_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of torch's fused attention: queries by keys, then weights by values."""
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return math.prod(q) * k[-2] + math.prod(q[:-1]) * k[-2] * v[-1]


def _layer_norm_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Five an element, as mmengine and fvcore count it; four without a scale and a shift."""
    has_affine = inputs[2].type().kind() == "TensorType"
    return math.prod(inputs[0].type().sizes()) * (5 if has_affine else 4)


def measure_complexity(net: nn.Module, height: int, width: int) -> Complexity:
    """Count parameters and multiply-adds of one forward pass.

    Args:
        net: A network that takes (1, 3, H, W). It is not changed.
        height: H, in LR pixels.
        width: W, in LR pixels.
    """
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if isinstance(module, WindowAttention):
            module.attn_type = "SDPA"  # Flex cannot be traced; the products are the same
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    analyzer = FlopAnalyzer(net, torch.zeros(1, 3, height, width, device=device))
    analyzer.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
    # mmengine's own takes no more than five dimensions, as OmniSR's windows have
    analyzer.set_op_handle("aten::layer_norm", _layer_norm_flops)
    analyzer.set_op_handle("esc_basicsr::recurrence", count_multiply_adds)  # of MambaIRv2's scan
    # Element-wise operations are not counted, by the field's convention; mmengine would list them all.
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad():
        flops = int(analyzer.total())
    return Complexity(params=sum(p.numel() for p in net.parameters()), flops=flops)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--variant",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="which networks; all by default",
    )
    parser.add_argument(
        "--scale",
        nargs="+",
        type=int,
        choices=SCALES,
        default=list(SCALES),
        help="which scales; all by default",
    )


def run(args: argparse.Namespace) -> int:
    """Print a Markdown table."""
    cases = [(name, scale) for name in args.variant for scale in args.scale]
    rows = []
    for name, scale in tqdm(cases, unit="network"):
        result = measure_complexity(build_variant(name, scale), OUTPUT_HEIGHT // scale, OUTPUT_WIDTH // scale)
        rows.append(f"| {name} | ×{scale} | {result.params:,} | {result.flops / 1e9:.2f} G |")
    print("| network | scale | parameters | multiply-adds |\n|---|---|---|---|")
    print("\n".join(rows))
    return 0
