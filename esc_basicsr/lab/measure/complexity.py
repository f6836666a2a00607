"""Count a network's parameters and multiply-adds, by the field's convention.

A multiply-add counts once, attention's two matrix products count whatever backend computes them, and, as
fvcore has it, a layer norm counts 5 and a mean 1 for each number that it takes.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

OUTPUT_HEIGHT, OUTPUT_WIDTH = 720, 1280


class Complexity(NamedTuple):
    """A network's learned parameters, and the multiply-adds of one forward pass."""

    params: int
    multiply_adds: int


# PyTorch counts a multiply-add twice
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.native_layer_norm: lambda shape, *_, **__: 10 * math.prod(shape),
    torch.ops.aten.mean: lambda shape, *_, **__: 2 * math.prod(shape),
}


def written_out(net: nn.Module) -> nn.Module:
    """Copy a network for counting: attention that has several implementations writes its scores out."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if hasattr(module, "attn_type"):
            setattr(module, "attn_type", "Naive")  # noqa: B010 - of a foreign class
    return net


def measure_complexity(net: nn.Module, height: int, width: int, device: str = "meta") -> Complexity:
    """Count parameters and multiply-adds of one forward pass.

    Args:
        net: A network that takes (1, 3, H, W). It is not changed.
        height: H, in LR pixels.
        width: W, in LR pixels.
        device: Where it runs. On ``meta`` nothing is computed, which takes networks that read no values.
    """
    net = written_out(net).to(device)
    # Gradients may be recorded, and none are: so no layer takes a fast path that cannot be counted.
    net.requires_grad_(False)
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        net(torch.zeros(1, 3, height, width, device=device))
    params = sum(p.numel() for p in net.parameters())
    return Complexity(params, counter.get_total_flops() // 2)
