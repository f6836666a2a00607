"""The ESC networks without gradients: less memory, less arithmetic, the same results.

Each layer goes chunk by chunk and writes its result in place (`row_chunks`); the large kernel is convolved in
frequency tiles; the ConvFFN's last 1×1 convolution and ConvAttn's become one; C++ kernels take over where
they are asked for and serve.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from esc_basicsr.archs.block import ESCBlock
from esc_basicsr.archs.conv_attention import (
    AttentionMixer,
    ConvAttention,
    LargeKernelConv,
    UnsharedConvAttention,
    depthwise_per_image,
)
from esc_basicsr.archs.esc_arch import ESC
from esc_basicsr.archs.esc_fp_arch import ESCFP
from esc_basicsr.archs.esc_real_arch import ESCRealM
from esc_basicsr.archs.layers import ConvFFN, LayerNorm2d, matrix_and_bias
from esc_basicsr.fast import kernels as cpp
from esc_basicsr.fast.attention import add_attention
from esc_basicsr.fast.frequency_tiles import SymmetricKernel
from esc_basicsr.fast.gpu import by_triton
from esc_basicsr.fast.precision import without_autocast
from esc_basicsr.fast.row_chunks import add_in_chunks, empty_map, map_in_chunks, overlapping_chunks

# The network's large kernel: ESC's, ESC-FP's pair of filters, or none that is shared.
LargeKernel = SymmetricKernel | tuple[Tensor, Tensor] | None


class FastNetwork(nn.Module):
    """The fast implementation of an ESC network, for use without gradients; with them it is the network.

    Args:
        net: The network; its weights are shared, not copied.
        kernels: Whether the C++ kernels, and Triton's on CUDA, serve where they can.

    Shape:
        As the network's.
    """

    def __init__(self, net: ESC | ESCFP | ESCRealM, kernels: bool = False) -> None:
        super().__init__()
        self.net = net
        self.kernels = kernels
        if kernels and next(net.parameters()).device.type == "cpu":
            cpp.load()

    def forward(self, x: Tensor) -> Tensor:
        """Upscale a batch of images."""
        is_recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_tracing()
        return self.net(x) if is_recorded else self.upscale(x)

    def upscale(self, x: Tensor) -> Tensor:
        """Upscale a batch of images, without gradients."""
        net: Any = self.net
        return _add(map_in_chunks(self._to_image, self.features(x)), net.upscale_input(x))

    def features(self, x: Tensor) -> Tensor:
        """Compute what the network makes its image of, (B, dim, H, W)."""
        net = self.net
        with self._exactly(x):
            feat = net.proj(x.contiguous(memory_format=torch.channels_last))
        large_kernel: LargeKernel
        if isinstance(net, ESCFP):
            large_kernel = net.lk_channel, net.lk_spatial
            tail = nn.Sequential(net.ln_last, net.last)
        else:
            large_kernel = None if net.plk_filter is None else SymmetricKernel(net.plk_filter)
            tail = nn.Sequential(net.last)
        out = feat
        block: Any
        for block in net.blocks:
            out = self._block(block, out, large_kernel)
        with self._exactly(x):
            return _add(feat, map_in_chunks(tail, out))

    def _to_image(self, x: Tensor) -> Tensor:
        with self._exactly(x):
            return F.pixel_shuffle(self.net.to_img(x), self.net.upscaling_factor).contiguous()

    def _block(self, block: ESCBlock, x: Tensor, large_kernel: LargeKernel) -> Tensor:
        y = self._conv_ffn(block.ln_proj, block.proj, x)
        if block.attn is not None and block.ln_attn is not None:
            y = add_attention(y, block.ln_attn, block.attn, y, self.kernels)
        layers: Any = zip(block.lns, block.convffns, block.pconvs, strict=True)
        for ln, convffn, pconv in layers:
            if isinstance(pconv, AttentionMixer):
                y = add_attention(y, pconv.norm, pconv.attn, self._conv_ffn(ln, convffn, y), self.kernels)
            else:
                y = self._add_conv_attention(y, ln, convffn, pconv, large_kernel)
        with self._exactly(x):
            return _add(map_in_chunks(lambda chunk: block.conv_out(block.ln_out(chunk)), y), x)

    def _serves(self, x: Tensor) -> bool:
        return self.kernels and cpp.serves_float32(x) and next(self.net.parameters()).dtype == x.dtype

    def _exactly(self, x: Tensor) -> AbstractContextManager[object]:
        """Give a context for what all later layers add to, and what ends it: with the C++ kernels in float32.

        In half precision these convolutions, a tenth of the work, would make most of the difference.
        """
        return without_autocast(x.device) if self._serves(x) else nullcontext()

    def _conv_ffn(self, norm: nn.Module, ffn: ConvFFN, x: Tensor) -> Tensor:
        """Compute ``ffn(norm(x))``."""
        if self._serves(x):
            return _conv_ffn_by_kernel(norm, ffn, x, matrix_and_bias(ffn.aggr))[1]
        return map_in_chunks(lambda chunk: ffn.aggr(_hidden(ffn, norm(chunk), self.kernels)), x)

    def _add_conv_attention(
        self, x: Tensor, norm: nn.Module, ffn: ConvFFN, mixer: ConvAttention, large_kernel: LargeKernel
    ) -> Tensor:
        """Compute ``x + mixer(ffn(norm(x)))`` in ``x``'s place."""
        convolved, x = self._two_ended_conv_ffn(norm, ffn, x, *two_ends(ffn, mixer))
        if isinstance(mixer, UnsharedConvAttention):
            large_kernel = SymmetricKernel(mixer.plk_filter)
        if isinstance(large_kernel, SymmetricKernel):
            core = cast(LargeKernelConv, mixer.plk)
            features, directly = convolved, self._serves(x) and cpp.multiplies_by_amx()
            if self._serves(x) and not directly and cpp.serves_large_kernel(large_kernel.weight):
                convolved = cpp.convolve_symmetric(features, large_kernel.weight)
            else:
                convolved = large_kernel.convolve(features, directly)
            if core.dwc_proj is not None:
                convolved = _add(convolved, depthwise_per_image(features, core.dwc_proj(features)))
        else:
            convolved = mixer.plk(convolved, *(large_kernel or ()))
        join = mixer.aggr.weight[:, : mixer.pdim]
        return add_in_chunks(x, lambda chunk: F.conv2d(chunk, join), convolved, multiple=1)

    def _two_ended_conv_ffn(
        self,
        norm: nn.Module,
        ffn: ConvFFN,
        x: Tensor,
        first: tuple[Tensor, Tensor],
        rest: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Run a ConvFFN that ends in two other 1×1 convolutions, each a matrix (channels, hidden) and a bias.

        Shape:
            Output: what ``first`` gives, (B, channels, H, W); ``x`` plus what ``rest`` gives, (B, dim, H, W),
            in ``x``'s place.
        """
        if self._serves(x):
            matrix, bias = (torch.cat(pair) for pair in zip(first, rest, strict=True))
            return _conv_ffn_by_kernel(norm, ffn, x, (matrix, bias), split=len(first[1]), residual=True)
        B, _, H, W = x.shape
        out = empty_map((B, len(first[1]), H, W), like=x)
        for rows, surrounded, inner in overlapping_chunks(x):
            hidden = _hidden(ffn, norm(surrounded), self.kernels)[:, :, inner]
            out[:, :, rows] = F.conv2d(hidden, first[0][:, :, None, None], first[1])
            x[:, :, rows] += F.conv2d(hidden, rest[0][:, :, None, None], rest[1])
        return out, x


def two_ends(ffn: ConvFFN, mixer: ConvAttention) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Join a ConvFFN's last convolution and ConvAttn's.

    On the channels that are not convolved nothing lies between: there the two are one.

    Returns:
        Matrix (channels, hidden) and bias to the channels that are convolved; the same to ConvAttn's output.
    """
    pdim = mixer.pdim
    (inner, inner_bias), (outer, outer_bias) = matrix_and_bias(ffn.aggr), matrix_and_bias(mixer.aggr)
    with without_autocast(inner.device):
        weight = outer[:, pdim:] @ inner[pdim:]
        bias = torch.addmv(outer_bias, outer[:, pdim:], inner_bias[pdim:])
    return (inner[:pdim], inner_bias[:pdim]), (weight, bias)


def _add(own: Tensor, other: Tensor) -> Tensor:
    """Add, in ``own``'s place if it can hold the sum: fresh memory costs a CPU more than the operation."""
    return own.add_(other) if own.dtype == torch.result_type(own, other) else own + other


def _hidden(ffn: ConvFFN, x: Tensor, kernels: bool) -> Tensor:
    """Compute what a ConvFFN aggregates at its end; by the Triton kernel, if it is wanted and serves."""
    x = ffn.proj(x)
    assert ffn.dwc.bias is not None
    if kernels and (middle := by_triton("conv_ffn_middle", x, ffn.dwc.weight, ffn.dwc.bias)) is not None:
        return middle
    gelu = torch.ops.aten.gelu_  # in its operand's place
    x = gelu(x)
    return _add(gelu(ffn.dwc(x)), x)


def _conv_ffn_by_kernel(
    norm: nn.Module,
    ffn: ConvFFN,
    x: Tensor,
    last: tuple[Tensor, Tensor],
    split: int = 0,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    affine = (norm.weight, norm.bias) if isinstance(norm, LayerNorm2d) else None
    assert ffn.dwc.bias is not None
    dwc = ffn.dwc.weight, ffn.dwc.bias
    return cpp.conv_ffn(x, affine, matrix_and_bias(ffn.proj), dwc, last, split, residual)
