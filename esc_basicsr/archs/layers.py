"""Layers that every ESC network is made of. Source: ESC, arXiv:2503.06671, and the authors' release."""

import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.fast import kernels
from esc_basicsr.fast.exporting import is_exporting
from esc_basicsr.fast.row_chunks import empty_map, is_plain_inference, map_by_strips, overlapping_strips

__all__ = ["Conv1x1", "ConvFFN", "LayerNorm2d", "add", "pad_to_multiple", "without_autocast"]


# Where is_plain_inference() the two functions below overwrite their first operand, which must be the caller's
# own: fresh memory for each result costs a CPU more than the operation.


def add(own: Tensor, other: Tensor) -> Tensor:
    """``own + other``, where no gradients are recorded in ``own``'s place, if it can hold the sum."""
    fits = own.dtype == torch.result_type(own, other)
    return own.add_(other) if fits and is_plain_inference() else own + other


def _gelu(own: Tensor) -> Tensor:
    """Exact GELU, where no gradients are recorded in ``own``'s place."""
    return torch.ops.aten.gelu_(own) if is_plain_inference() else F.gelu(own)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which operations keep their operands' precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of a feature map, eps 1e-6, affine.

    Shape:
        Input, output: (B, dim, H, W); the output is laid out channels last.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Conv1x1(nn.Conv2d):
    """1×1 convolution with a bias.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.

    Shape:
        Input: (B, in_channels, H, W). Output: (B, out_channels, H, W).
    """

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    @property
    def matrix(self) -> Tensor:
        """The weight, (out_channels, in_channels)."""
        return self.weight[:, :, 0, 0]


class DepthwiseConv3x3(nn.Conv2d):
    """Depthwise 3×3 convolution with a bias, zero padding.

    Args:
        dim: Channels of input and output.

    Shape:
        Input, output: (B, dim, H, W).
    """

    bias: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)


class ConvFFN(nn.Module):
    """Feed-forward network with a depthwise 3×3 convolution between its two 1×1 convolutions.

    Args:
        dim: Channels of input and output.
        exp_ratio: Hidden channels are ``int(dim * exp_ratio)``.

    Shape:
        Input, output: (B, dim, H, W).
    """

    def __init__(self, dim: int, exp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * exp_ratio)
        self.proj = Conv1x1(dim, hidden)
        self.dwc = DepthwiseConv3x3(hidden)
        self.aggr = Conv1x1(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Expand, mix neighbours, and aggregate."""
        return self.aggr(self._hidden(x))

    def after(self, norm: nn.Module, x: Tensor) -> Tensor:
        """``self(norm(x))``; by strips or by the kernel without gradients."""
        if is_plain_inference() and self._is_served(norm, x):
            return self._by_kernel(norm, x, (self.aggr.matrix, self.aggr.bias))[1]
        return map_by_strips(lambda strip: self(norm(strip)), x)

    def split_after(
        self, norm: nn.Module, x: Tensor, first: tuple[Tensor, Tensor], rest: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What two other 1×1 convolutions in ``aggr``'s place make of ``norm(x)``, without gradients.

        Args:
            norm: The normalisation before the ConvFFN.
            x: Features; may be overwritten.
            first: Matrix (channels, hidden) and bias of one convolution.
            rest: Matrix (dim, hidden) and bias of the other.

        Shape:
            Output: what ``first`` gives, (B, channels, H, W); ``x`` plus what ``rest`` gives, (B, dim, H, W).
        """
        if self._is_served(norm, x):
            matrix, bias = (torch.cat(pair) for pair in zip(first, rest, strict=True))
            return self._by_kernel(norm, x, (matrix, bias), split=len(first[1]), residual=True)
        B, _, H, W = x.shape
        out = empty_map((B, len(first[1]), H, W), like=x)
        for rows, surrounded, inner in overlapping_strips(x):
            hidden = self._hidden(norm(surrounded))[:, :, inner]
            out[:, :, rows] = F.conv2d(hidden, first[0][:, :, None, None], first[1])
            x[:, :, rows] += F.conv2d(hidden, rest[0][:, :, None, None], rest[1])
        return out, x

    def _hidden(self, x: Tensor) -> Tensor:
        x = _gelu(self.proj(x))
        return add(_gelu(self.dwc(x)), x)

    def _is_served(self, norm: nn.Module, x: Tensor) -> bool:
        return isinstance(norm, LayerNorm2d | nn.Identity) and kernels.serves(x)

    def _by_kernel(
        self, norm: nn.Module, x: Tensor, last: tuple[Tensor, Tensor], split: int = 0, residual: bool = False
    ) -> tuple[Tensor, Tensor]:
        affine = (norm.weight, norm.bias) if isinstance(norm, LayerNorm2d) else None
        proj, dwc = (self.proj.matrix, self.proj.bias), (self.dwc.weight, self.dwc.bias)
        return kernels.conv_ffn(x, affine, proj, dwc, last, split, residual)


def _reflected_index(size: int, padded_size: int, like: Tensor) -> Tensor:
    """Indices that read ``size`` entries back and forth until ``padded_size`` of them are read."""
    there_and_back = 2 * size - 2
    # The sum, unlike arange, is on ``like``'s device in a recording for another device, too.
    index = like.new_ones(padded_size, dtype=torch.long).cumsum(0) - 1
    index = index % (there_and_back + 1 // size)  # one entry is repeated
    return torch.minimum(index, there_and_back - index)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad at bottom and right, reflecting, until both sides are multiples of ``multiple``.

    Where the padding needed is not smaller than the side, one reflection is not enough (and torch's
    refuses): the border is then reflected again and again, as a mirror facing a mirror; a side of one
    pixel is repeated.

    Shape:
        Input: (B, C, H, W), any H, W >= 1.
        Output: (B, C, H', W'), laid out channels last; the input itself where it fits.
    """
    H, W = x.shape[-2:]
    padded_H = -(-H // multiple) * multiple
    padded_W = -(-W // multiple) * multiple
    sides = [(1, H, padded_H), (2, W, padded_W)]
    if not is_exporting():
        sides = [(axis, size, padded_size) for axis, size, padded_size in sides if size != padded_size]
        if not sides:
            return x
    # index_select gives a contiguous result: seen as [B, H, W, C] it stays channels last, which the
    # convolution that follows needs to be fast.
    x = x.permute(0, 2, 3, 1)
    for axis, size, padded_size in sides:
        x = x.index_select(axis, _reflected_index(size, padded_size, like=x))
    return x.permute(0, 3, 1, 2)
