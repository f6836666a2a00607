"""The ESC networks with gradients, by the C++ kernels: the blocks' layers fused, the same results.

Weights stay where they are: a layer is swapped for one that computes differently. Within autocast to bfloat16
the residual stream is float32, and so are the convolutions that begin it, add to it and end it: a tenth of
the work, and in half precision most of the difference.
"""

from typing import Any

import torch
from torch import Tensor, nn

from esc_basicsr.archs.block import ESCBlock
from esc_basicsr.archs.conv_attention import (
    ConvAttention,
    LargeKernelConv,
    UnsharedConvAttention,
    average_over_symmetries,
    depthwise_per_image,
)
from esc_basicsr.archs.esc_arch import ESC
from esc_basicsr.archs.esc_fp_arch import ESCFP
from esc_basicsr.archs.esc_real_arch import ESCRealM
from esc_basicsr.archs.layers import ConvFFN, matrix_and_bias
from esc_basicsr.fast import kernels as cpp
from esc_basicsr.fast.attention import attend_by_kernels
from esc_basicsr.fast.network import two_ends
from esc_basicsr.fast.precision import without_autocast


def train_by_kernels(net: nn.Module) -> None:
    """Have a network's blocks computed by the C++ kernels, on CUDA their window attention by Triton's.

    Where a kernel does not serve, the layer goes on as it is.

    Raises:
        UserError: The kernels cannot be compiled.
    """
    attend_by_kernels(net)
    for layer in net.modules():
        if type(layer) is ESCBlock:
            layer.__class__ = _KernelBlock
        if isinstance(layer, ESC | ESCFP | ESCRealM):
            for end in (layer.proj, layer.last, layer.to_img):
                if type(end) is nn.Conv2d:
                    end.__class__ = _Float32Conv2d


class _Float32Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        """Convolve, where kernels serve in float32 within autocast, too."""
        if not cpp.serves(x):
            return super().forward(x)
        with without_autocast(x.device):
            return super().forward(x.float())


class _KernelBlock(ESCBlock):
    def forward(self, x: Tensor, *large_kernel: Tensor) -> Tensor:
        """Compute the block."""
        if not cpp.serves(x):
            return super().forward(x, *large_kernel)
        skip = x = x.float()
        x = _conv_ffn(self.proj, self.ln_proj(x))
        if self.attn is not None and self.ln_attn is not None:
            x = x + self.attn(self.ln_attn(x))
        layers: Any = zip(self.lns, self.convffns, self.pconvs, strict=True)
        for ln, convffn, pconv in layers:
            if isinstance(pconv, ConvAttention):
                x = _add_conv_attention(x, ln, convffn, pconv, large_kernel)
            else:
                x = x + pconv(_conv_ffn(convffn, ln(x)))
        with without_autocast(x.device):
            return self.conv_out(self.ln_out(x)) + skip


def _conv_ffn(ffn: ConvFFN, x: Tensor) -> Tensor:
    return _two_ended(ffn, x, matrix_and_bias(ffn.aggr))[1]


def _two_ended(
    ffn: ConvFFN, x: Tensor, last: tuple[Tensor, Tensor], split: int = 0, residual: bool = False
) -> tuple[Tensor, Tensor]:
    assert ffn.dwc.bias is not None
    dwc = ffn.dwc.weight, ffn.dwc.bias
    return cpp.conv_ffn(x, None, matrix_and_bias(ffn.proj), dwc, last, split, residual)


def _add_conv_attention(
    x: Tensor, norm: nn.Module, ffn: ConvFFN, mixer: ConvAttention, large_kernel: tuple[Tensor, ...]
) -> Tensor:
    """Compute ``x + mixer(ffn(norm(x)))``."""
    last: Any = map(torch.cat, zip(*two_ends(ffn, mixer), strict=True))
    is_alone = isinstance(norm, nn.Identity)
    convolved, out = _two_ended(ffn, norm(x), tuple(last), mixer.pdim, residual=is_alone)
    with without_autocast(x.device):
        if isinstance(mixer, UnsharedConvAttention):
            large_kernel = (average_over_symmetries(mixer.plk_filter),)
        convolved = _convolve(mixer.plk, convolved, *large_kernel).permute(0, 2, 3, 1)
        join = mixer.aggr.weight[:, : mixer.pdim, 0, 0]
        out = (out if is_alone else x + out).permute(0, 2, 3, 1)
        joined = torch.addmm(out.reshape(-1, len(join)), convolved.reshape(-1, mixer.pdim), join.T)
        return joined.view(out.shape).permute(0, 3, 1, 2)


def _convolve(core: nn.Module, x: Tensor, *large_kernel: Tensor) -> Tensor:
    if not (isinstance(core, LargeKernelConv) and cpp.serves_large_kernel(large_kernel[0])):
        convolved: Tensor = core(x, *large_kernel)
        return convolved
    out = cpp.convolve_symmetric(x, large_kernel[0])
    return out if core.dwc_proj is None else out + depthwise_per_image(x, core.dwc_proj(x))
