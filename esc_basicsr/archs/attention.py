"""Window self-attention, and the backends that compute it. Source: ESC, arXiv:2503.06671, Sec. 3.2."""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.layers import pad_to_multiple
from esc_basicsr.common.log import info_once, warn_once

__all__ = [
    "ATTN_TYPES",
    "BACKENDS",
    "WindowAttention",
    "attend_by_sdpa",
    "expand_position_bias",
    "join_windows",
    "split_windows",
]

ATTN_TYPES = ("auto", "Naive", "SDPA", "Flex")


def expand_position_bias(table: Tensor, window_size: int) -> Tensor:
    """Lay out the relative position bias for every pair of a query and a key.

    Query (qh, qw) and key (kh, kw) meet at (kh - qh + w - 1, kw - qw + w - 1): key minus query, Swin's table
    turned by 180°. Each query therefore sees a w×w window of the table that slides backwards with the query.

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


def split_windows(qkv: Tensor, num_heads: int, window_size: int) -> Tensor:
    """Cut a map of queries, keys and values into windows.

    Args:
        qkv: Channels ordered (q k v, head, channel).
        num_heads: Attention heads.
        window_size: Side w of a window.

    Shape:
        qkv: (B, 3·dim, H, W), H and W multiples of w. Output: (3, windows, heads, w², dim / heads).
    """
    w = window_size
    B, channels, H, W = qkv.shape
    # [B, (3 heads d), (rows w), (columns w)] -> [3, (B rows columns), heads, (w w), d]
    qkv = qkv.view(B, 3, num_heads, -1, H // w, w, W // w, w).permute(1, 0, 4, 6, 2, 5, 7, 3)
    return qkv.reshape(3, -1, num_heads, w * w, channels // 3 // num_heads)


def join_windows(windows: Tensor, size: Sequence[int], window_size: int) -> Tensor:
    """Put windows back together to a map of ``size``, its height and width.

    Shape:
        windows: (windows, heads, w², d). Output: (B, heads·d, H, W), laid out channels last.
    """
    w, heads = window_size, windows.shape[1]
    (height, width), d = size, windows.shape[-1]
    rows, columns = height // w, width // w
    # [(B rows columns), heads, (w w), d] -> [B, (rows w), (columns w), (heads d)]
    x = windows.view(-1, rows, columns, heads, w, w, d).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(-1, height, width, heads * d).permute(0, 3, 1, 2)


def _naive(qkv: Tensor, table: Tensor, window_size: int) -> Tensor:
    q, k, v = split_windows(qkv, len(table), window_size)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + expand_position_bias(table, window_size)
    # Half precision overflows in a sum of exponentials over a window of 32×32 keys.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    out = scores.softmax(-1, dtype=dtype).to(v.dtype) @ v
    return join_windows(out, qkv.shape[-2:], window_size)


def attend_by_sdpa(qkv: Tensor, bias: Tensor, window_size: int) -> Tensor:
    """Attend within windows, with the bias as `expand_position_bias` lays it out."""
    q, k, v = split_windows(qkv, len(bias), window_size)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).unsqueeze(0))
    return join_windows(out, qkv.shape[-2:], window_size)


def _sdpa(qkv: Tensor, table: Tensor, window_size: int) -> Tensor:
    return attend_by_sdpa(qkv, expand_position_bias(table, window_size), window_size)


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


def _flex(qkv: Tensor, table: Tensor, window_size: int) -> Tensor:
    device, w = qkv.device.type, window_size
    if device in _flex_failed:
        return _sdpa(qkv, table, w)
    if device != "cuda" and _needs_grad(qkv, table):
        info_once(f"attn_type Flex: torch has no backward for it on {device}; SDPA takes over for training.")
        return _sdpa(qkv, table, w)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = key // w - query // w + w - 1
        columns = key % w - query % w + w - 1
        return score + table[h, rows * (2 * w - 1) + columns]

    q, k, v = split_windows(qkv, len(table), w)
    try:
        with warnings.catch_warnings():
            # torch warns that uncompiled Flex writes the scores out; on a CPU that is what is asked for here.
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            out = _flex_kernel(device)(q, k, v, score_mod=add_bias)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # No Triton, no compiler, a shape that Flex does not take: the result is the same by SDPA.
        _flex_failed.add(device)
        warn_once(f"attn_type Flex failed on {device} ({type(error).__name__}: {error}); SDPA takes over.")
        return _sdpa(qkv, table, w)
    return join_windows(out, qkv.shape[-2:], w)


# attn_type -> function of qkv (B, 3·dim, H, W), the bias table and the window's side; gives (B, dim, H, W).
BACKENDS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"Naive": _naive, "SDPA": _sdpa, "Flex": _flex}


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
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.to_out = nn.Conv2d(dim, dim, 1)

    def extra_repr(self) -> str:
        """Show what the submodules do not."""
        return f"window_size={self.window_size}, num_heads={self.num_heads}, attn_type={self.attn_type!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window."""
        H, W = x.shape[-2:]
        out = self.attend(self.to_qkv(pad_to_multiple(x, self.window_size)))
        return self.to_out(out[:, :, :H, :W])

    def attend(self, qkv: Tensor) -> Tensor:
        """Attend by the backend; (B, 3·dim, H, W), whole windows, give (B, dim, H, W)."""
        backend = BACKENDS[self.backend(qkv.device.type)]
        return backend(qkv, self.relative_position_bias, self.window_size)

    def backend(self, device: str) -> str:
        """Choose the key of `BACKENDS` to attend by on a type of device, and log the choice of ``auto``."""
        if self.attn_type != "auto":
            return self.attn_type
        if device == "cpu" and _needs_grad(self.relative_position_bias):
            # There SDPA falls back to a form of its own that does more work than ours.
            info_once("attn_type auto: Naive to train on cpu (no fused kernel there learns the bias).")
            return "Naive"
        info_once(f"attn_type auto: SDPA on {device} (a fused kernel for any shape, nothing to compile).")
        return "SDPA"
