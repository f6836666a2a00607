"""ESC's window attention as its authors released it: scores written out, or compiled FlexAttention."""

import functools
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from esc_basicsr.archs.attention import (
    BACKENDS,
    WindowAttention,
    expand_position_bias,
    join_windows,
    split_windows,
)


def attend_as_released(net: nn.Module, compile_flex: bool = False) -> nn.Module:
    """Give a network of `archs` the release's attention, in its place; the rest is the release's already."""
    for layer in net.modules():
        if isinstance(layer, WindowAttention):
            layer.attn_type = "release-flex" if compile_flex else "release"
    return net


def _naive(qkv: Tensor, table: Tensor, window_size: int) -> Tensor:
    q, k, v = split_windows(qkv, len(table), window_size)
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + expand_position_bias(table, window_size)
    return join_windows(scores.softmax(-1) @ v, qkv.shape[-2:], window_size)


def _flex(qkv: Tensor, table: Tensor, window_size: int) -> Tensor:
    w = window_size

    def add_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows, columns = key // w - query // w + w - 1, key % w - query % w + w - 1
        return score + table[h, rows * (2 * w - 1) + columns]

    out = _compiled_flex()(*split_windows(qkv, len(table), w), score_mod=add_bias)
    return join_windows(out, qkv.shape[-2:], w)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Tensor] = torch.compile(flex_attention)
    return kernel


BACKENDS |= {"release": _naive, "release-flex": _flex}
