"""Layers that every ESC network is made of. Source: ESC, arXiv:2503.06671, and the authors' release."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ConvFFN", "LayerNorm2d", "matrix_and_bias", "pad_to_multiple", "reflect_border", "reflect_pad"]


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
        self.proj = nn.Conv2d(dim, hidden, 1)
        self.dwc = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.aggr = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Expand, mix neighbours, and aggregate."""
        x = F.gelu(self.proj(x))
        x = x + F.gelu(self.dwc(x))
        return self.aggr(x)


def matrix_and_bias(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """View a 1×1 convolution as a matrix, (out_channels, in_channels), and a bias, (out_channels,)."""
    assert conv.kernel_size == (1, 1) and conv.bias is not None
    return conv.weight[:, :, 0, 0], conv.bias


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad at bottom and right by `reflect_pad`, until both sides are multiples of ``multiple``.

    Shape:
        Input: (B, C, H, W), any H, W >= 1. Output: (B, C, H', W').
    """
    H, W = x.shape[-2:]
    return reflect_pad(x, multiple) if H % multiple or W % multiple else x


def reflect_pad(x: Tensor, multiple: int) -> Tensor:
    """Reflect ``x`` at bottom and right, at whatever size, until both sides are multiples of ``multiple``.

    Where the padding needed is not smaller than the side, one reflection is not enough (and torch's
    refuses): the border is then reflected again and again, as a mirror facing a mirror; a side of one
    pixel is repeated.

    Shape:
        Input: (B, C, H, W), any H, W >= 1. Output: (B, C, H', W'), laid out channels last.
    """
    height, width = ((side + multiple - 1) // multiple * multiple for side in x.shape[-2:])
    return _reflected(x, height, width, before=0)


def reflect_border(x: Tensor, border: int) -> Tensor:
    """Reflect ``x`` at its four sides, as `reflect_pad` does, by ``border`` pixels.

    Shape:
        Input: (B, C, H, W), any H, W >= 1.
        Output: (B, C, H + 2·border, W + 2·border), laid out channels last.
    """
    height, width = (side + 2 * border for side in x.shape[-2:])
    return _reflected(x, height, width, before=border)


def _reflected(x: Tensor, height: int, width: int, before: int) -> Tensor:
    # index_select gives a contiguous result: seen as [B, H, W, C] it stays channels last.
    x = x.permute(0, 2, 3, 1)
    for axis, padded_size in ((1, height), (2, width)):
        x = x.index_select(axis, _reflected_index(x.shape[axis], padded_size, before, like=x))
    return x.permute(0, 3, 1, 2)


def _reflected_index(size: int, padded_size: int, before: int, like: Tensor) -> Tensor:
    """Give indices that read ``size`` entries back and forth, ``before`` of them ahead of the first."""
    # Tensors on ``like``'s device throughout, so that a recording serves every size and device.
    there_and_back = like.new_full((), 2 * size - 2, dtype=torch.long)
    index = like.new_ones(padded_size, dtype=torch.long).cumsum(0) - (1 + before)
    index = index % there_and_back.clamp(min=1)  # one entry is repeated
    return torch.minimum(index, there_and_back - index)
