"""Window attention run fast: by chunks of whole windows without gradients, and by its C++ kernel."""

from collections.abc import Callable

from torch import Tensor, nn

from esc_basicsr.archs.attention import BACKENDS, WindowAttention, attend_by_sdpa, expand_position_bias
from esc_basicsr.archs.layers import pad_to_multiple
from esc_basicsr.fast import kernels as cpp
from esc_basicsr.fast.gpu import by_triton
from esc_basicsr.fast.row_chunks import add_in_chunks


class _KernelAttention(WindowAttention):
    """Window attention by the C++ or the Triton kernel where it serves, else by its ``attn_type``."""

    def attend(self, qkv: Tensor) -> Tensor:
        """Attend within whole windows."""
        out = by_triton("window_attention", qkv, self.relative_position_bias, self.window_size)
        if out is not None:
            return out
        if cpp.serves_heads_of(qkv, self.to_out.in_channels // self.num_heads):
            return _by_kernel(qkv, self.relative_position_bias, self.window_size)
        return super().attend(qkv)


def attend_by_kernels(net: nn.Module) -> None:
    """Have a network's window attention computed by the C++ kernel, on CUDA by Triton's, in training too.

    Where neither serves, as in float16 on a CPU, it goes on by its ``attn_type``.

    Raises:
        UserError: The kernels cannot be compiled.
    """
    if next(net.parameters()).device.type == "cpu":
        cpp.load()
    for layer in net.modules():
        if isinstance(layer, WindowAttention):
            layer.__class__ = _KernelAttention


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
    w = attn.window_size
    bias: Tensor = attn.relative_position_bias
    attend: Callable[[Tensor, Tensor, int], Tensor]
    if kernels and cpp.serves_float32(x) and cpp.serves_heads_of(x, x.shape[1] // attn.num_heads):
        attend = _by_kernel
    elif kernels and x.device.type == "cuda":
        attend = _by_triton
    elif (backend := attn.backend(x.device.type)) == "SDPA":
        attend, bias = attend_by_sdpa, expand_position_bias(bias, w)  # laid out once for all chunks
    else:
        attend = BACKENDS[backend]

    def layer(chunk: Tensor) -> Tensor:
        H, W = chunk.shape[-2:]
        qkv = attn.to_qkv(pad_to_multiple(norm(chunk), w))
        return attn.to_out(attend(qkv, bias, w)[:, :, :H, :W])

    return add_in_chunks(x, layer, source, w)


def _by_kernel(qkv: Tensor, table: Tensor, window_size: int) -> Tensor:
    return cpp.window_attention(qkv.permute(0, 2, 3, 1), table, window_size).permute(0, 3, 1, 2)


def _by_triton(qkv: Tensor, table: Tensor, window_size: int) -> Tensor:
    out = by_triton("window_attention", qkv, table, window_size)
    return BACKENDS["SDPA"](qkv, table, window_size) if out is None else out
