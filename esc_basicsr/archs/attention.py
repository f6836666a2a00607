"""Window self-attention, and the backends that compute it. Source: ESC, arXiv:2503.06671, Sec. 3.2."""

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.layers import Conv1x1, pad_to_multiple
from esc_basicsr.common.log import info_once, warn_once
from esc_basicsr.fast import kernels
from esc_basicsr.fast.row_chunks import add_by_strips

__all__ = ["ATTN_TYPES", "WindowAttention", "expand_position_bias"]

ATTN_TYPES = ("auto", "Naive", "SDPA", "Flex")


def expand_position_bias(table: Tensor, window_size: int) -> Tensor:
    """Lay out the relative position bias for every pair of a query and a key.

    Query (qh, qw) and key (kh, kw) meet at (kh - qh + w - 1, kw - qw + w - 1): key minus query, Swin's table
    transposed. Each query therefore sees a w×w window of the table that slides backwards with the query.

    Args:
        table: The bias by relative position.
        window_size: Side w of a window.

    Shape:
        table: (heads, (2w-1)²). Output: (heads, w², w²), queries by keys.
    """
    w = window_size
    windows = table.view(-1, 2 * w - 1, 2 * w - 1).unfold(1, w, 1).unfold(2, w, 1)
    # [heads, -qh, -qw, kh, kw] -> [heads, (qh qw), (kh kw)]
    return windows.flip(1, 2).reshape(-1, w * w, w * w)


class PositionBias:
    """The relative position bias of one layer, and its expansion, made once when a backend needs it."""

    def __init__(self, table: Tensor, window_size: int) -> None:
        self.table = table
        self.window_size = window_size

    @functools.cached_property
    def expanded(self) -> Tensor:
        """The bias of each query and key, (heads, w², w²)."""
        return expand_position_bias(self.table, self.window_size)


def _naive(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias.expanded
    # Half precision overflows in a sum of exponentials over a window of 32×32 keys.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=dtype).to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expanded.to(q.dtype).unsqueeze(0))


# devices on which Flex has failed in this process: a failing compilation takes long, and would fail again
_flex_failed: set[str] = set()


@functools.cache
def _flex_kernel(device_type: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Compiling is what makes Flex fast on a GPU. On a CPU it would need a C++ compiler, and SDPA is faster.
    kernel: Callable[..., Tensor] = flex_attention
    return torch.compile(kernel) if device_type == "cuda" else kernel


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias) -> Tensor:
    device, table, w = q.device.type, bias.table, bias.window_size
    if device in _flex_failed:
        return _sdpa(q, k, v, bias)
    if device != "cuda" and _needs_grad(q, k, v, table):
        info_once(f"attn_type Flex: torch has no backward for it on {device}; SDPA takes over for training.")
        return _sdpa(q, k, v, bias)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = key // w - query // w + w - 1
        columns = key % w - query % w + w - 1
        return score + table[h, rows * (2 * w - 1) + columns]

    try:
        with warnings.catch_warnings():
            # torch warns that uncompiled Flex writes the scores out; on a CPU that is what is asked for here.
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return _flex_kernel(device)(q, k, v, score_mod=add_bias)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # No Triton, no compiler, a shape that Flex does not take: the result is the same by SDPA.
        _flex_failed.add(device)
        warn_once(f"attn_type Flex failed on {device} ({type(error).__name__}: {error}); SDPA takes over.")
        return _sdpa(q, k, v, bias)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, PositionBias], Tensor]] = {
    "Naive": _naive,
    "SDPA": _sdpa,
    "Flex": _flex,
}


class WindowAttention(nn.Module):
    """Window self-attention with a learned relative position bias.

    Windows do not overlap and do not shift. The map is padded at bottom and right, reflecting, to multiples
    of the window (`pad_to_multiple`), and cropped back. Unlike Swin's, the bias is indexed key minus query.

    Args:
        dim: Feature channels, a multiple of ``num_heads``.
        window_size: Side of a window, in LR pixels.
        num_heads: Attention heads.
        attn_type: Backend, one of ``Naive`` (the scores are written out), ``SDPA`` (torch's
            scaled_dot_product_attention), ``Flex`` (torch's flex_attention, compiled on CUDA) and ``auto``.

    Shape:
        Input, output: (B, dim, H, W), any H, W >= 1.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``, or ``attn_type`` is unknown.
    """

    def __init__(self, dim: int, window_size: int, num_heads: int, attn_type: str = "auto") -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim {dim} and num_heads {num_heads}.")
        if attn_type not in ATTN_TYPES:
            raise ValueError(f"attn_type must be one of {', '.join(ATTN_TYPES)}, got {attn_type!r}.")
        self.window_size = window_size
        self.num_heads = num_heads
        self.attn_type = attn_type
        self.relative_position_bias = nn.Parameter(torch.empty(num_heads, (2 * window_size - 1) ** 2))
        nn.init.normal_(self.relative_position_bias, std=0.001)
        self.to_qkv = Conv1x1(dim, 3 * dim)
        self.to_out = Conv1x1(dim, dim)

    def extra_repr(self) -> str:
        """Show what the submodules do not."""
        return f"window_size={self.window_size}, num_heads={self.num_heads}, attn_type={self.attn_type!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window."""
        return self._attend(x, PositionBias(self.relative_position_bias, self.window_size))

    def add_to(self, x: Tensor, norm: nn.Module, source: Tensor) -> Tensor:
        """``x + self(norm(source))``, without gradients by strips of windows and in ``x``'s place."""
        bias = PositionBias(self.relative_position_bias, self.window_size)
        return add_by_strips(x, lambda strip: self._attend(norm(strip), bias), source, self.window_size)

    def _attend(self, x: Tensor, bias: PositionBias) -> Tensor:
        H, W = x.shape[-2:]
        w, heads = self.window_size, self.num_heads
        qkv = self.to_qkv(pad_to_multiple(x, w))
        B, _, padded_H, padded_W = qkv.shape
        if kernels.serves_heads_of(qkv, qkv.shape[1] // (3 * heads)):
            out = kernels.window_attention(qkv.permute(0, 2, 3, 1), bias.table, w)
            return self.to_out(out[:, :H, :W].permute(0, 3, 1, 2))
        rows, columns = padded_H // w, padded_W // w
        # [B, (3 heads d), (rows w), (columns w)] -> [3, (B rows columns), heads, (w w), d]
        qkv = qkv.view(B, 3, heads, -1, rows, w, columns, w).permute(1, 0, 4, 6, 2, 5, 7, 3)
        q, k, v = qkv.reshape(3, B * rows * columns, heads, w * w, -1)
        out = _BACKENDS[self._backend(x.device.type)](q, k, v, bias)
        # [(B rows columns), heads, (w w), d] -> [B, (heads d), (rows w), (columns w)]
        out = out.view(B, rows, columns, heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(B, padded_H, padded_W, -1)[:, :H, :W].permute(0, 3, 1, 2)
        return self.to_out(out)

    def _backend(self, device: str) -> str:
        if self.attn_type != "auto":
            return self.attn_type
        if device == "cpu" and _needs_grad(self.relative_position_bias):
            # There SDPA falls back to a form of its own that does more work than ours.
            info_once("attn_type auto: Naive to train on cpu (no fused kernel there learns the bias).")
            return "Naive"
        info_once(f"attn_type auto: SDPA on {device} (a fused kernel for any shape, nothing to compile).")
        return "SDPA"
