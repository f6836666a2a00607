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
from esc_basicsr.archs.layers import LayerNorm2d

__all__ = [
    "AttentionMixer",
    "ConvAttention",
    "LargeKernelConv",
    "SeparableLargeKernelConv",
    "UnsharedConvAttention",
    "average_over_symmetries",
    "depthwise_per_image",
]

# side of the kernel made from the image
DYNAMIC_KERNEL_SIZE = 3


def average_over_symmetries(kernel: Tensor) -> Tensor:
    """Average a square kernel over the 8 flips and quarter turns of the square.

    Shape:
        Input, output: (..., k, k); the output is equal to its own flips and transposition.
    """
    kernel = (kernel + kernel.flip(-1)) / 2
    kernel = (kernel + kernel.flip(-2)) / 2
    return (kernel + kernel.transpose(-1, -2)) / 2


def depthwise_per_image(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each channel of each image with a kernel of its own.

    Shape:
        x: (B, C, H, W). kernels: (B, C, k, k), k odd. Output: (B, C, H, W).
    """
    B, C, H, W = x.shape
    size = kernels.shape[-1]
    # [B, C, H, W] -> [1, (B C), H, W]: one group for each image and channel
    x = x.reshape(1, B * C, H, W)
    kernels = kernels.reshape(B * C, 1, size, size)
    return F.conv2d(x, kernels, padding=size // 2, groups=B * C).view(B, C, H, W)


class KernelPredictor(nn.Sequential):
    """Global average pool and two 1×1 convolutions that make a 3×3 kernel for each channel.

    Args:
        pdim: Channels.
        hidden: Channels between the convolutions.

    Shape:
        Input: (B, pdim, H, W). Output: (B, pdim, 3, 3).
    """

    def __init__(self, pdim: int, hidden: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(pdim, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, pdim * DYNAMIC_KERNEL_SIZE**2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Predict each image's kernels."""
        return super().forward(x).reshape(x.shape[0], -1, DYNAMIC_KERNEL_SIZE, DYNAMIC_KERNEL_SIZE)


class LargeKernelConv(nn.Module):
    """ESC's core: the shared large kernel plus a depthwise kernel predicted from the image.

    Args:
        pdim: Channels.
        dynamic_kernel: Whether there is a predicted kernel.

    Shape:
        x, output: (B, pdim, H, W). large_kernel: (pdim, pdim, k, k).
    """

    def __init__(self, pdim: int, dynamic_kernel: bool = True) -> None:
        super().__init__()
        self.dwc_proj = KernelPredictor(pdim, pdim // 2) if dynamic_kernel else None
        if self.dwc_proj is not None:
            for parameter in self.dwc_proj[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, large_kernel: Tensor) -> Tensor:
        """Convolve with both kernels and add."""
        out = F.conv2d(x, large_kernel, padding=large_kernel.shape[-1] // 2)
        return out if self.dwc_proj is None else out + depthwise_per_image(x, self.dwc_proj(x))


class SeparableLargeKernelConv(nn.Module):
    """ESC-FP's core: a 1×1 convolution, then one depthwise convolution, shared plus predicted kernel.

    Args:
        pdim: Channels.

    Shape:
        x, output: (B, pdim, H, W). lk_channel: (pdim, pdim, 1, 1). lk_spatial: (pdim, 1, k, k).
    """

    def __init__(self, pdim: int) -> None:
        super().__init__()
        self.proj = KernelPredictor(pdim, pdim // 4)

    def forward(self, x: Tensor, lk_channel: Tensor, lk_spatial: Tensor) -> Tensor:
        """Mix channels, then convolve each with its own kernel."""
        border = (lk_spatial.shape[-1] - DYNAMIC_KERNEL_SIZE) // 2
        kernels = lk_spatial[:, 0] + F.pad(self.proj(x), [border] * 4)  # [B, pdim, k, k]
        return depthwise_per_image(F.conv2d(x, lk_channel), kernels)


class ConvAttention(nn.Module):
    """ConvAttn: ``core`` convolves the first ``pdim`` channels; a 1×1 convolution joins them with the rest.

    Args:
        dim: Feature channels.
        pdim: Channels that are convolved, at most ``dim``.
        core: `LargeKernelConv` or `SeparableLargeKernelConv` over ``pdim`` channels.

    Shape:
        x, output: (B, dim, H, W). large_kernel: as ``core`` takes it.
    """

    def __init__(self, dim: int, pdim: int, core: nn.Module) -> None:
        super().__init__()
        self.pdim = pdim
        self.plk = core
        self.aggr = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, *large_kernel: Tensor) -> Tensor:
        """Convolve some channels, and join them with the others."""
        f_att, f_idt = x[:, : self.pdim], x[:, self.pdim :]
        f_res = self.plk(f_att, *large_kernel)
        return self.aggr(torch.cat((f_res, f_idt), dim=1))


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

    def forward(self, x: Tensor, *large_kernel: Tensor) -> Tensor:
        """Do as ConvAttn does, with the layer's own large kernel."""
        return super().forward(x, average_over_symmetries(self.plk_filter))


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

    def forward(self, x: Tensor) -> Tensor:
        """Attend; there is no large kernel."""
        return self.attn(self.norm(x))
