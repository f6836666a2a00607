"""ConvAttn: convolutions that emulate self-attention.

Source: ESC, arXiv:2503.06671, Sec. 3.3 and the release.

A large kernel, shared by the whole network, takes the place of attention's long range; a 3×3 kernel made
from the image itself takes the place of its dependence on the input.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.archs.layers import Conv1x1, ConvFFN, LayerNorm2d, add, without_autocast
from esc_basicsr.fast.exporting import is_exporting
from esc_basicsr.fast.frequency_tiles import SymmetricKernel
from esc_basicsr.fast.row_chunks import (
    add_by_strips,
    is_plain_inference,
)

__all__ = [
    "AttentionMixer",
    "ConvAttention",
    "LargeKernel",
    "LargeKernelConv",
    "SeparableLargeKernelConv",
    "UnsharedConvAttention",
]

# What a network hands to its mixers: ESC's kernel, ESC-FP's pair of filters, or nothing.
LargeKernel = SymmetricKernel | tuple[Tensor, Tensor] | None

# side of the kernel made from the image
DYNAMIC_KERNEL_SIZE = 3


def _depthwise_per_image(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each channel of each image with a kernel of its own.

    Shape:
        x: (B, C, H, W). kernels: (B·C, 1, k, k), k odd. Output: (B, C, H, W).
    """
    B, C, H, W = x.shape
    if is_exporting():
        return _depthwise_tap_by_tap(x, kernels)
    # [B, C, H, W] -> [1, (B C), H, W]: one group for each image and channel
    out = F.conv2d(x.reshape(1, B * C, H, W), kernels, padding=kernels.shape[-1] // 2, groups=B * C)
    return out.view(B, C, H, W)


def _depthwise_tap_by_tap(x: Tensor, kernels: Tensor) -> Tensor:
    """The same as a sum of shifted maps: a recording cannot hold as many groups as there are images."""
    B, C, H, W = x.shape
    size = kernels.shape[-1]
    padded = F.pad(x, [size // 2] * 4)
    taps = kernels.reshape(B, C, size, size, 1, 1).unbind(2)
    return torch.stack(
        [
            tap * padded[:, :, top : top + H, left : left + W]
            for top, row in enumerate(taps)
            for left, tap in enumerate(row.unbind(2))
        ]
    ).sum(0)


def _kernel_predictor(pdim: int, hidden: int) -> nn.Sequential:
    """Global average pool and two 1×1 convolutions that make a 3×3 kernel for each channel."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(pdim, hidden, 1),
        nn.GELU(),
        nn.Conv2d(hidden, pdim * DYNAMIC_KERNEL_SIZE**2, 1),
    )


class LargeKernelConv(nn.Module):
    """ESC's core: the shared large kernel plus a depthwise kernel predicted from the image.

    Args:
        pdim: Channels.
        dynamic_kernel: Whether there is a predicted kernel.

    Shape:
        x, output: (B, pdim, H, W). large_kernel: of ``pdim`` channels.
    """

    def __init__(self, pdim: int, dynamic_kernel: bool = True) -> None:
        super().__init__()
        self.dwc_proj = _kernel_predictor(pdim, pdim // 2) if dynamic_kernel else None
        if self.dwc_proj is not None:
            for parameter in self.dwc_proj[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, large_kernel: SymmetricKernel) -> Tensor:
        """Convolve with both kernels and add."""
        out = large_kernel.convolve(x)
        if self.dwc_proj is None:
            return out
        kernels = self.dwc_proj(x).reshape(-1, 1, DYNAMIC_KERNEL_SIZE, DYNAMIC_KERNEL_SIZE)
        return add(out, _depthwise_per_image(x, kernels))


class SeparableLargeKernelConv(nn.Module):
    """ESC-FP's core: a 1×1 convolution, then one depthwise convolution, shared plus predicted kernel.

    Args:
        pdim: Channels.

    Shape:
        x, output: (B, pdim, H, W). large_kernel: (pdim, pdim, 1, 1) and (pdim, 1, k, k).
    """

    def __init__(self, pdim: int) -> None:
        super().__init__()
        self.proj = _kernel_predictor(pdim, pdim // 4)

    def forward(self, x: Tensor, large_kernel: tuple[Tensor, Tensor]) -> Tensor:
        """Mix channels, then convolve each with its own kernel."""
        lk_channel, lk_spatial = large_kernel
        predicted = self.proj(x).reshape(x.shape[0], -1, 1, DYNAMIC_KERNEL_SIZE, DYNAMIC_KERNEL_SIZE)
        mixed = F.conv2d(x, lk_channel)
        if is_exporting():  # apart: a sum over taps is for the small kernel
            size = lk_spatial.shape[-1]
            shared = F.conv2d(mixed, lk_spatial, padding=size // 2, groups=len(lk_spatial))
            return shared + _depthwise_per_image(mixed, predicted.flatten(0, 1))
        border = (lk_spatial.shape[-1] - DYNAMIC_KERNEL_SIZE) // 2
        kernels = lk_spatial + F.pad(predicted, [border] * 4)  # [B, pdim, 1, k, k]
        return _depthwise_per_image(mixed, kernels.flatten(0, 1))


class ConvAttention(nn.Module):
    """ConvAttn: ``core`` convolves the first ``pdim`` channels; a 1×1 convolution joins them with the rest.

    Called with the ConvFFN before it, it takes in that one's last 1×1 convolution where gradients allow, and
    the residual around both.

    Args:
        dim: Feature channels.
        pdim: Channels that are convolved, at most ``dim``.
        core: `LargeKernelConv` or `SeparableLargeKernelConv` over ``pdim`` channels.

    Shape:
        x, output: (B, dim, H, W).
    """

    def __init__(self, dim: int, pdim: int, core: nn.Module) -> None:
        super().__init__()
        self.pdim = pdim
        self.plk = core
        self.aggr = Conv1x1(dim, dim)

    def forward(self, x: Tensor, norm: nn.Module, convffn: ConvFFN, large_kernel: LargeKernel) -> Tensor:
        """Add to ``x`` what ConvAttn makes of ``convffn(norm(x))``, without gradients in ``x``'s place.

        Args:
            x: Features.
            norm: The normalisation before the ConvFFN.
            convffn: The ConvFFN before ConvAttn.
            large_kernel: The network's large kernel in the form that the core takes.
        """
        pdim = self.pdim
        if not is_plain_inference():
            y = convffn(norm(x))
            return x + self.aggr(torch.cat((self.plk(y[:, :pdim], large_kernel), y[:, pdim:]), dim=1))
        # Between the ConvFFN's last convolution and this one's nothing lies on the channels that are not
        # convolved: on these the two are one.
        last = convffn.aggr
        with without_autocast(x.device):
            rest = self.aggr.matrix[:, pdim:]
            weight = rest @ last.matrix[pdim:]
            bias = torch.addmv(self.aggr.bias, rest, last.bias[pdim:])
        convolved, x = convffn.split_after(norm, x, (last.matrix[:pdim], last.bias[:pdim]), (weight, bias))
        convolved = self.plk(convolved, large_kernel)
        return add_by_strips(
            x, lambda strip: F.conv2d(strip, self.aggr.weight[:, :pdim]), convolved, multiple=1
        )


class UnsharedConvAttention(ConvAttention):
    """ConvAttn with a large kernel of its own, as in the paper's ablation "no LK sharing".

    Args:
        dim: Feature channels.
        pdim: Channels that are convolved, at most ``dim``.
        kernel_size: Side of the large kernel, odd.
        dynamic_kernel: Whether there is a predicted kernel.

    Shape:
        x, output: (B, dim, H, W).
    """

    def __init__(self, dim: int, pdim: int, kernel_size: int, dynamic_kernel: bool) -> None:
        super().__init__(dim, pdim, LargeKernelConv(pdim, dynamic_kernel))
        self.plk_filter = nn.Parameter(torch.empty(pdim, pdim, kernel_size, kernel_size))
        nn.init.orthogonal_(self.plk_filter)

    def forward(self, x: Tensor, norm: nn.Module, convffn: ConvFFN, large_kernel: LargeKernel) -> Tensor:
        """As ConvAttn does, with the layer's own large kernel."""
        return super().forward(x, norm, convffn, SymmetricKernel(self.plk_filter))


class AttentionMixer(nn.Module):
    """Normalised window attention in ConvAttn's place, as in the paper's ablation "SA only".

    Args:
        dim: Feature channels.
        attention: The window attention.

    Shape:
        x, output: (B, dim, H, W).
    """

    def __init__(self, dim: int, attention: WindowAttention) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim)
        self.attn = attention

    def forward(self, x: Tensor, norm: nn.Module, convffn: ConvFFN, large_kernel: LargeKernel) -> Tensor:
        """Add attention over ``convffn(norm(x))``; there is no large kernel."""
        y = convffn.after(norm, x)
        return self.attn.add_to(x, self.norm, y)
