"""Window attention run fast: by chunks of whole windows without gradients, and by its C++ kernel."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esc_basicsr.archs.attention import (
    BACKENDS,
    WindowAttention,
    expand_position_bias,
    join_windows,
    split_windows,
)
from esc_basicsr.archs.layers import pad_to_multiple
from esc_basicsr.fast import kernels as cpp
from esc_basicsr.fast.gpu import by_triton
from esc_basicsr.fast.row_chunks import add_in_chunks

__all__ = ["add_attention", "attend_by_kernels"]

_KERNELS = "Kernels"


def attend_by_kernels(net: nn.Module) -> None:
    """Have a network's window attention computed by the C++ kernel, on CUDA by Triton's, in training too.

    Where neither serves, as in half precision on a CPU, it goes on as ``attn_type: auto``.

    Raises:
        UserError: The kernels cannot be compiled.
    """
    if next(net.parameters()).device.type == "cpu":
        cpp.load()
    for layer in net.modules():
        if isinstance(layer, WindowAttention):
            layer.attn_type = _KERNELS


def add_attention(
    x: Tensor, norm: nn.Module, attn: WindowAttention, source: Tensor, kernels: bool = False
) -> Tensor:
    """Compute ``x + attn(norm(source))`` without gradients, in ``x``'s place.

    Args:
        x: What is added to; overwritten.
        norm: The normalisation before the attention.
        attn: The window attention.
        source: Its input before the normalisation; may be ``x`` itself.
        kernels: Whether the C++ kernel serves where it can.

    Shape:
        x, source, output: (B, dim, H, W).
    """
    w, table = attn.window_size, attn.relative_position_bias
    attend: Callable[[Tensor, Tensor, int], Tensor]
    if kernels and cpp.serves_heads_of(x, x.shape[1] // attn.num_heads):
        attend = _by_kernel
    elif kernels and x.device.type == "cuda":
        attend = _kernels_backend
    else:
        backend = attn.backend(x.device.type)
        attend = _sdpa_with(expand_position_bias(table, w)) if backend == "SDPA" else BACKENDS[backend]

    def layer(chunk: Tensor) -> Tensor:
        H, W = chunk.shape[-2:]
        qkv = attn.to_qkv(pad_to_multiple(norm(chunk), w))
        return attn.to_out(attend(qkv, table, w)[:, :, :H, :W])

    return add_in_chunks(x, layer, source, w)


def _sdpa_with(bias: Tensor) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Make a backend of SDPA with a position bias that is laid out once for all chunks."""

    def attend(qkv: Tensor, table: Tensor, window_size: int) -> Tensor:
        q, k, v = split_windows(qkv, len(table), window_size)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).unsqueeze(0))
        return join_windows(out, qkv.shape[-2:], window_size)

    return attend


def _by_kernel(qkv: Tensor, table: Tensor, window_size: int) -> Tensor:
    return cpp.window_attention(qkv.permute(0, 2, 3, 1), table, window_size).permute(0, 3, 1, 2)


def _kernels_backend(qkv: Tensor, table: Tensor, window_size: int) -> Tensor:
    out = by_triton("window_attention", qkv, table, window_size)
    if out is not None:
        return out
    if cpp.serves_heads_of(qkv, qkv.shape[1] // (3 * len(table))):
        return _by_kernel(qkv, table, window_size)
    trains_on_cpu = qkv.device.type == "cpu" and torch.is_grad_enabled()
    return BACKENDS["Naive" if trains_on_cpu else "SDPA"](qkv, table, window_size)


BACKENDS[_KERNELS] = _kernels_backend
