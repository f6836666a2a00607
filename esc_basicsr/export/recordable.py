"""Networks in a form that can be recorded once for every batch, height and width."""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.attention import BACKENDS, WindowAttention
from esc_basicsr.archs.conv_attention import LargeKernelConv, SeparableLargeKernelConv
from esc_basicsr.archs.esc_real_arch import ESCRealM
from esc_basicsr.archs.layers import reflect_pad
from esc_basicsr.common.errors import UserError

Layers = Mapping[type[nn.Module], type[nn.Module]]


def recordable(network: nn.Module, layers: Layers | None = None) -> nn.Module:
    """Copy a network, its layers replaced by such as do the same operations at every size.

    Args:
        network: The network; not changed. Layers of other packages are left as they are.
        layers: Class of a layer -> class that replaces it; by default such as serve PyTorch's own formats.

    Returns:
        The copy: on the CPU, in evaluation mode, without gradients.
    """
    network = copy.deepcopy(network).cpu().eval().requires_grad_(False)
    layers = _LAYERS if layers is None else layers
    for layer in network.modules():
        layer.__class__ = layers.get(type(layer), type(layer))
    return network


@contextlib.contextmanager
def recording(format_name: str) -> Iterator[None]:
    """Record without gradients and warnings.

    Raises:
        UserError: Recording fails; ``format_name`` is what cannot be written.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # of deprecation, and of what `recordable` has taken care of
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # what recording raises has no limits
        raise UserError(
            f"PyTorch {torch.__version__} cannot write {format_name} ({type(error).__name__}: {error}). Use "
            "another format."
        ) from error


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


_LAYERS: Layers = {
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
