"""The least time of a network on a card: by what it can move and compute, and what there is to do."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.archs.conv_attention import ConvAttention
from esc_basicsr.archs.layers import ConvFFN
from esc_basicsr.common.timing import median_times
from esc_basicsr.lab.networks.by_name import build_network

# Layers of which nothing but input and output need touch the memory; norms go into what follows them.
_FUSED = (ConvFFN, ConvAttention, WindowAttention, nn.Conv2d)


def measure_ceilings(
    device: torch.device, dtypes: Mapping[str, torch.dtype], size: int, side: int, repeats: int
) -> dict[str, float]:
    """Measure what a device can do, on random numbers.

    Args:
        device: The device.
        dtypes: Types to multiply in, by name.
        size: Bytes of a copy.
        side: Side of the matrices that are multiplied.
        repeats: Timed runs of each.

    Returns:
        ``copy``, bytes read and written a second; by name of a type, operations a second of a matrix product.
    """
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = median_times({"copy": lambda: target.copy_(source)}, repeats, 1, device)
    found = {"copy": 2 * source.nbytes / seconds["copy"]}
    for name, dtype in dtypes.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = median_times({name: functools.partial(torch.matmul, a, b)}, repeats, 1, device)
        found[name] = 2 * side**3 / seconds[name]
    return found


@functools.cache
def count_numbers(variant: str, scale: int, height: int, width: int) -> int:
    """Count what a variant has to read and write for an image (1, 3, H, W).

    That is each layer's input and output, and each weight, once.
    """
    net = build_network(f"{variant}:plain", scale)
    weights = sum(parameter.numel() for parameter in net.parameters())
    calls = layer_calls(net, _FUSED, height, width)
    return weights + sum(x.numel() + output.numel() for _, x, output in calls)


def layer_calls(
    net: nn.Module, kinds: tuple[type[nn.Module], ...], height: int, width: int
) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """List what a pass over an image (1, 3, H, W) has layers do: each, its first input and its output.

    Args:
        net: The network; it is moved to the device ``meta``, where nothing is computed.
        kinds: Of the layers that are listed; not those within one that is.
        height: H.
        width: W.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((layer, inputs[0], output))

    def hook(module: nn.Module) -> None:
        if isinstance(module, kinds):
            module.register_forward_hook(note)
        else:
            for child in module.children():
                hook(child)

    net = net.to("meta").eval()
    hook(net)
    with torch.no_grad():
        net(torch.zeros(1, 3, height, width, device="meta"))
    return calls


def floor(multiply_adds: int, size: int, ceilings: Mapping[str, float], precision: str) -> tuple[float, str]:
    """Give the seconds that no pass of so many bytes runs much below, and what limits it."""
    times = {"operations": 2 * multiply_adds / ceilings[precision], "bytes": size / ceilings["copy"]}
    limit = max(times, key=times.__getitem__)
    return times[limit], limit
