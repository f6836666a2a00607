"""Networks in a form that can be recorded once for every batch, height and width."""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.attention import BACKENDS, WindowAttention
from esc_basicsr.archs.conv_attention import LargeKernelConv, SeparableLargeKernelConv
from esc_basicsr.archs.esc_real_arch import ESCRealM
from esc_basicsr.archs.layers import reflect_pad


def recordable(network: nn.Module) -> nn.Module:
    """Copy a network, its layers replaced by such as do the same operations at every size.

    Args:
        network: The network; not changed. Layers of other packages are left as they are.

    Returns:
        The copy: on the CPU, in evaluation mode, without gradients.
    """
    network = copy.deepcopy(network).cpu().eval().requires_grad_(False)
    for layer in network.modules():
        layer.__class__ = _RECORDABLE.get(type(layer), type(layer))
    return network


class _WindowAttention(WindowAttention):
    """Window attention that pads always, by none where the map fits; fused wherever PyTorch is."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window."""
        H, W = x.shape[-2:]
        qkv = self.to_qkv(reflect_pad(x, self.window_size))
        out = BACKENDS["SDPA"](qkv, self.relative_position_bias, self.window_size)
        return self.to_out(out[:, :, :H, :W])


class _LargeKernelConv(LargeKernelConv):
    def forward(self, x: Tensor, large_kernel: Tensor) -> Tensor:
        """Convolve with both kernels and add."""
        out = F.conv2d(x, large_kernel, padding=large_kernel.shape[-1] // 2)
        return out if self.dwc_proj is None else out + _depthwise_tap_by_tap(x, self.dwc_proj(x))


class _SeparableLargeKernelConv(SeparableLargeKernelConv):
    def forward(self, x: Tensor, lk_channel: Tensor, lk_spatial: Tensor) -> Tensor:
        """Mix channels, then convolve with the shared and the predicted kernel apart."""
        mixed = F.conv2d(x, lk_channel)
        shared = F.conv2d(mixed, lk_spatial, padding=lk_spatial.shape[-1] // 2, groups=len(lk_spatial))
        return shared + _depthwise_tap_by_tap(mixed, self.proj(x))


class _ESCRealM(ESCRealM):
    def forward(self, x: Tensor) -> Tensor:
        """Restore and upscale a batch of images, padded beforehand."""
        height, width = (side * self.upscaling_factor for side in x.shape[-2:])
        return super().forward(reflect_pad(x, self.unshuffle))[:, :, :height, :width]


_RECORDABLE: dict[type[nn.Module], type[nn.Module]] = {
    WindowAttention: _WindowAttention,
    LargeKernelConv: _LargeKernelConv,
    SeparableLargeKernelConv: _SeparableLargeKernelConv,
    ESCRealM: _ESCRealM,
}


def _depthwise_tap_by_tap(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve depthwise as a sum of shifted maps: no recording holds as many groups as there are images.

    Shape:
        x: (B, C, H, W). kernels: (B, C, k, k). Output: (B, C, H, W).
    """
    H, W = x.shape[-2:]
    size = kernels.shape[-1]
    padded = F.pad(x, [size // 2] * 4)
    taps = [
        kernels[:, :, row, column, None, None] * padded[:, :, row : row + H, column : column + W]
        for row in range(size)
        for column in range(size)
    ]
    return torch.stack(taps).sum(0)
