"""C++ kernels for ESC's layers on a CPU: optional, compiled where they run, once.

They give what the layers of `archs` give, to rounding, with gradients. `load` compiles; `fast.prepare` puts
them to use without gradients, `fast.train_by_kernels` with them.

Within autocast to bfloat16 and where the processor has instructions for it, factors of matrix products are in
bfloat16, multiplied by AMX where there is that, but not for gradients; sums, softmax, normalisation and the
large kernel stay in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.jit import is_tracing  # type: ignore[attr-defined]

from esc_basicsr.common.errors import UserError
from esc_basicsr.fast.frequency_tiles import LEAST_KERNEL, best_tile
from esc_basicsr.fast.kernels_build import load

__all__ = [
    "conv_ffn",
    "convolve_symmetric",
    "load",
    "multiplies_by_amx",
    "require_bf16",
    "serves",
    "serves_float32",
    "serves_heads_of",
    "serves_large_kernel",
    "window_attention",
]


def require_bf16() -> None:
    """Refuse bfloat16 on a CPU where these kernels do not compute in it, which would be slower than float32.

    Raises:
        UserError: The processor has no instructions for it, or the kernels cannot be compiled.
    """
    if not load().has_bf16:
        raise UserError(
            "bfloat16 would be slower than float32 on this CPU, which has no instructions that multiply it "
            "(AVX-512 BF16): compute in float32"
        )


def serves(x: Tensor) -> bool:
    """Tell whether ``x`` is float32, or of autocast to bfloat16, and nobody records operations for later."""
    if torch.compiler.is_compiling() or is_tracing() or x.device.type != "cpu":
        return False
    if not torch.is_autocast_enabled("cpu"):
        return x.dtype == torch.float32
    is_bf16 = torch.get_autocast_dtype("cpu") == torch.bfloat16
    return is_bf16 and x.dtype in (torch.float32, torch.bfloat16) and load().has_bf16


def serves_float32(x: Tensor) -> bool:
    """Tell as `serves` does, of float32 alone, which `conv_ffn` takes."""
    return x.dtype == torch.float32 and serves(x)


def multiplies_by_amx() -> bool:
    """Tell whether PyTorch's convolutions multiply by AMX: within autocast, where the processor has it."""
    return torch.is_autocast_enabled("cpu") and load().has_amx


def serves_heads_of(x: Tensor, channels: int) -> bool:
    """Tell whether the attention kernel serves ``x`` with so many channels a head."""
    return serves(x) and channels <= 4 * load().lanes


def serves_large_kernel(weight: Tensor) -> bool:
    """Tell whether `convolve_symmetric` serves a kernel (out channels, in channels, k, k) and pays."""
    out_channels, in_channels, _, size = weight.shape
    return size >= LEAST_KERNEL and not (out_channels % load().lanes or in_channels % load().lanes)


def _pointers(tensors: Sequence[Tensor | None], dtype: torch.dtype = torch.float32) -> list[int | None]:
    """Give tensors' addresses to cpu.cpp, which reads and writes there: the caller keeps tensors alive."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(
                f"expected contiguous {str(dtype).removeprefix('torch.')} tensors on a CPU, got "
                f"{tensor.dtype} on {tensor.device} of strides {tensor.stride()}."
            )
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _call(function: Callable[..., int], pointers: Sequence[int | None], *sizes: int) -> None:
    if function(*pointers, *sizes, torch.get_num_threads()):
        raise MemoryError(f"no memory for the CPU kernels' scratch ({torch.get_num_threads()} threads).")


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, table: Tensor, window_size: int) -> Tensor:  # type: ignore[no-untyped-def]
        out, log_sums = _attend(qkv, table, window_size, with_log_sums=True)
        ctx.save_for_backward(qkv, table, log_sums)
        ctx.window_size = window_size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, out_grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        qkv, table, log_sums = ctx.saved_tensors
        B, H, W, channels = qkv.shape
        w, heads = ctx.window_size, len(table)
        rows, columns = H // w, W // w
        qkv_grad = torch.empty_like(qkv)
        table_grad = table.new_empty(B * rows * columns, *table.shape)
        upstream = out_grad.contiguous()
        maps = _pointers((qkv, upstream, qkv_grad), qkv.dtype)
        sizes = (int(qkv.dtype == torch.bfloat16), B, rows, columns, w, heads, channels // 3 // heads)
        others = _pointers((table, log_sums, table_grad))
        _call(load().window_attention_backward, [*maps, *others], *sizes)
        return qkv_grad, table_grad.sum(0), None


def _attend(
    qkv: Tensor, table: Tensor, window_size: int, with_log_sums: bool
) -> tuple[Tensor, Tensor | None]:
    B, H, W, channels = qkv.shape
    w, heads = window_size, len(table)
    if H % w or W % w:
        raise ValueError(f"the sides of the map must be multiples of the window {w}, got {H}x{W}.")
    rows, columns = H // w, W // w
    out = qkv.new_empty(B, H, W, channels // 3)
    log_sums = table.new_empty(B * rows * columns * heads * w * w) if with_log_sums else None
    is_half = qkv.dtype == torch.bfloat16 and load().has_bf16
    maps = _pointers((qkv, out), torch.bfloat16 if is_half else torch.float32)
    sizes = (int(is_half), B, rows, columns, w, heads, channels // 3 // heads)
    _call(load().window_attention, [*maps, *_pointers((table, log_sums))], *sizes)
    return out, log_sums


def window_attention(qkv: Tensor, table: Tensor, window_size: int) -> Tensor:
    """Attend within windows, with a relative position bias.

    Args:
        qkv: Queries, keys and values, channels ordered (q k v, head, channel), of a kind that
            `serves_heads_of` takes.
        table: The bias by relative position, key minus query.
        window_size: Side w of a window.

    Shape:
        qkv: (B, H, W, 3·dim), H and W multiples of w; float32 or bfloat16. table:
        (heads, (2w-1)²). Output: (B, H, W, dim), of qkv's type.
    """
    qkv, table = qkv.contiguous(), table.contiguous()
    if torch.is_grad_enabled() and (qkv.requires_grad or table.requires_grad):
        out: Tensor = _WindowAttention.apply(qkv, table, window_size)
        return out
    return _attend(qkv, table, window_size, with_log_sums=False)[0]


def conv_ffn(
    x: Tensor,
    norm: tuple[Tensor, Tensor] | None,
    proj: tuple[Tensor, Tensor],
    dwc: tuple[Tensor, Tensor],
    last: tuple[Tensor, Tensor],
    split: int = 0,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a ConvFFN whose last 1×1 convolution may be another than its own.

    Within autocast 1×1 convolutions have factors in bfloat16.

    Args:
        x: Features, laid out channels last.
        norm: Weight and bias of a LayerNorm over channels before it, eps 1e-6; not with gradients.
        proj: Weight and bias of the first 1×1 convolution.
        dwc: Weight and bias of the depthwise 3×3 convolution.
        last: Weight (split + dim, hidden) and bias of the last 1×1 convolution.
        split: How many of the last one's channels are for the first result.
        residual: Whether the second result is added to ``x``, which without gradients may be overwritten.

    Shape:
        x: (B, dim, H, W), float32. Output: (B, split, H, W) and (B, dim, H, W), laid out channels last.
    """
    x = x.permute(0, 2, 3, 1).contiguous()
    weights = [tensor.contiguous() for pair in (proj, dwc, last) for tensor in pair]
    is_half = torch.is_autocast_enabled("cpu")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)):
        if norm is not None:
            raise ValueError("conv_ffn has no gradients of a LayerNorm: normalise before it.")
        first, out = _ConvFFN.apply(x, *weights, split, residual, is_half)
    else:
        first, out = x.new_empty(*x.shape[:3], split), x if residual else torch.empty_like(x)
        _run_conv_ffn(x, norm, weights, first, out, residual, is_half)
    return first.permute(0, 3, 1, 2), out.permute(0, 3, 1, 2)


def _run_conv_ffn(
    x: Tensor,
    norm: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    first: Tensor,
    out: Tensor,
    residual: bool,
    is_half: bool,
) -> None:
    norms = [None, None] if norm is None else [tensor.contiguous() for tensor in norm]
    sizes = (int(residual), int(is_half), *x.shape, len(weights[1]), first.shape[-1])
    _call(load().conv_ffn, _pointers((x, *norms, *weights, first, out)), *sizes)


class _ConvFFN(torch.autograd.Function):
    """`conv_ffn` with gradients: it keeps its input alone, and computes what lies between again."""

    @staticmethod
    def forward(ctx, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        *weights, split, residual, is_half = arguments
        first, out = x.new_empty(*x.shape[:3], split), torch.empty_like(x)
        _run_conv_ffn(x, None, weights, first, out, residual, is_half)
        ctx.save_for_backward(x, *weights)
        ctx.flags = int(residual), int(is_half)
        return first, out

    @staticmethod
    @once_differentiable
    def backward(ctx, first_grad: Tensor, out_grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, proj, proj_bias, dwc, dwc_bias, last, last_bias = ctx.saved_tensors
        weights = (proj, proj_bias, dwc, dwc_bias, last, last_bias)
        grads = [torch.empty_like(tensor) for tensor in (x, *weights)]
        upstream = (first_grad.contiguous(), out_grad.contiguous())
        transposed = (proj.T.contiguous(), dwc, dwc_bias, last.T.contiguous())
        tensors = (x, proj, proj_bias, *transposed, *upstream, *grads)
        sizes = (*ctx.flags, *x.shape, len(proj), first_grad.shape[-1])
        _call(load().conv_ffn_backward, _pointers(tensors), *sizes)
        return *grads, None, None, None


def convolve_symmetric(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with a kernel that equals its flips, by frequency tiles (`frequency_tiles`), in float32.

    Args:
        x: The map.
        weight: The kernel; `serves_large_kernel` says which.

    Shape:
        x: (B, in channels, H, W). weight: (out channels, in channels, k, k). Output: (B, out channels, H, W),
        laid out channels last.
    """
    maps, taps = x.permute(0, 2, 3, 1).contiguous(), weight.permute(2, 3, 1, 0).contiguous()
    out: Tensor = _SymmetricConvolution.apply(maps, taps)
    return out.permute(0, 3, 1, 2)


class _SymmetricConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        B, H, W, channels = x.shape
        size, out_channels = len(taps), taps.shape[-1]
        out = x.new_empty(B, H, W, out_channels)
        ctx.sizes = best_tile(H, W, size, channels), size, B, H, W, channels, out_channels
        _call(load().large_kernel, _pointers((x, taps, out)), *ctx.sizes)
        ctx.save_for_backward(x, taps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, out_grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        x, taps = ctx.saved_tensors
        grads = torch.empty_like(x), torch.empty_like(taps)
        upstream = out_grad.contiguous()
        _call(load().large_kernel_backward, _pointers((x, taps, upstream, *grads)), *ctx.sizes)
        return grads
