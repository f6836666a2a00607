"""Triton kernels for ESC's layers on a GPU, forward and backward: window attention, the ConvFFN's middle.

Maps are laid out channels last, in float32, float16 or bfloat16; sums, softmax and GELU are in float32.
`esc_basicsr.fast.gpu` tells when they serve. On a CPU Triton's interpreter runs them (TRITON_INTERPRET=1).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# ruff: noqa: N803 - sizes and Triton's constants are upper case

# sides of a tile of scores; pixels and channels of a tile of a map
BLOCK = 64
PIXELS, CHANNELS = 32, 32


# Window attention. A program has a window, a head and a block of its w² queries or keys. Scores live in
# tiles (BLOCK, BLOCK) of which none is written down; the bias of a pair is read from the table.


@triton.jit
def _pixels(window, inside, H, W, w: tl.constexpr):
    """Find the rows of (B·H·W, ...) that the pixels ``inside`` a window have."""
    rows, columns = H // w, W // w
    top = window // (rows * columns) * H + window // columns % rows * w
    return (top + inside // w).to(tl.int64) * W + window % columns * w + inside % w


@triton.jit
def _relative(queries, keys, w: tl.constexpr):
    """Index the table by pairs, key minus query: (queries, keys)."""
    down = keys[None, :] // w - queries[:, None] // w + w - 1
    return down * (2 * w - 1) + keys[None, :] % w - queries[:, None] % w + w - 1


@triton.jit
def _load_rows(pointer, pixels, real, stride, first, d, D: tl.constexpr):
    """Load (BLOCK, D): channels ``first`` to ``first + d`` of pixels, zeros beyond them."""
    channels = tl.arange(0, D)
    mask = real[:, None] & (channels < d)[None, :]
    return tl.load(pointer + pixels[:, None] * stride + first + channels[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(pointer, value, pixels, real, stride, first, d, D: tl.constexpr):
    channels = tl.arange(0, D)
    mask = real[:, None] & (channels < d)[None, :]
    where = pointer + pixels[:, None] * stride + first + channels[None, :]
    tl.store(where, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _scores(q, k, table, queries, keys, scale, w: tl.constexpr):
    """Compute q·kᵀ·scale + bias, (BLOCK, BLOCK) in float32; -inf for keys and queries beyond the window."""
    real = (queries < w * w)[:, None] & (keys < w * w)[None, :]
    bias = tl.load(table + _relative(queries, keys, w), mask=real, other=float("-inf")).to(tl.float32)
    return tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias


@triton.jit
def _attend(
    qkv, table, out, log_sums, H, W, heads, d, scale, w: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr
):
    blocks: tl.constexpr = (w * w + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    window, head, block = program // (blocks * heads), program // blocks % heads, program % blocks
    dim = heads * d
    table += head * (2 * w - 1) * (2 * w - 1)
    queries = block * BLOCK + tl.arange(0, BLOCK)
    pixels = _pixels(window, queries, H, W, w)
    q = _load_rows(qkv, pixels, queries < w * w, 3 * dim, head * d, d, D)
    highest = tl.full((BLOCK,), -1e30, tl.float32)  # of each query's scores so far
    total = tl.zeros((BLOCK,), tl.float32)  # of their exponentials
    result = tl.zeros((BLOCK, D), tl.float32)
    for start in range(0, w * w, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        others = _pixels(window, keys, H, W, w)
        k = _load_rows(qkv, others, keys < w * w, 3 * dim, dim + head * d, d, D)
        v = _load_rows(qkv, others, keys < w * w, 3 * dim, 2 * dim + head * d, d, D)
        scores = _scores(q, k, table, queries, keys, scale, w)
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp(highest - higher)
        p = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        result = result * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = higher
    real = queries < w * w
    _store_rows(out, result / total[:, None], pixels, real, dim, head * d, d, D)
    tl.store(log_sums + pixels * heads + head, highest + tl.log(total), mask=real)


@triton.jit
def _score_grads(q, k, v, grad, table, log_sum, delta, queries, keys, scale, w: tl.constexpr):
    """Compute the softmax and the gradient of the scores, (BLOCK, BLOCK) each."""
    p = tl.exp(_scores(q, k, table, queries, keys, scale, w) - log_sum[:, None])
    return p, p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])


@triton.jit
def _queries_grad(
    qkv, table, log_sums, grad_out, deltas, grad_qkv, H, W, heads, d, scale,
    w: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (w * w + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    window, head, block = program // (blocks * heads), program // blocks % heads, program % blocks
    dim = heads * d
    table += head * (2 * w - 1) * (2 * w - 1)
    queries = block * BLOCK + tl.arange(0, BLOCK)
    pixels, real = _pixels(window, queries, H, W, w), queries < w * w
    q = _load_rows(qkv, pixels, real, 3 * dim, head * d, d, D)
    grad = _load_rows(grad_out, pixels, real, dim, head * d, d, D)
    log_sum = tl.load(log_sums + pixels * heads + head, mask=real, other=0.0)
    delta = tl.load(deltas + pixels * heads + head, mask=real, other=0.0)
    result = tl.zeros((BLOCK, D), tl.float32)
    for start in range(0, w * w, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        others = _pixels(window, keys, H, W, w)
        k = _load_rows(qkv, others, keys < w * w, 3 * dim, dim + head * d, d, D)
        v = _load_rows(qkv, others, keys < w * w, 3 * dim, 2 * dim + head * d, d, D)
        _, ds = _score_grads(q, k, v, grad, table, log_sum, delta, queries, keys, scale, w)
        result += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    _store_rows(grad_qkv, result * scale, pixels, real, 3 * dim, head * d, d, D)


@triton.jit
def _keys_grad(
    qkv, table, log_sums, grad_out, deltas, grad_qkv, H, W, heads, d, scale,
    w: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (w * w + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    window, head, block = program // (blocks * heads), program // blocks % heads, program % blocks
    dim = heads * d
    table += head * (2 * w - 1) * (2 * w - 1)
    keys = block * BLOCK + tl.arange(0, BLOCK)
    pixels, real = _pixels(window, keys, H, W, w), keys < w * w
    k = _load_rows(qkv, pixels, real, 3 * dim, dim + head * d, d, D)
    v = _load_rows(qkv, pixels, real, 3 * dim, 2 * dim + head * d, d, D)
    k_grad = tl.zeros((BLOCK, D), tl.float32)
    v_grad = tl.zeros((BLOCK, D), tl.float32)
    for start in range(0, w * w, BLOCK):
        queries = start + tl.arange(0, BLOCK)
        others, there = _pixels(window, queries, H, W, w), queries < w * w
        q = _load_rows(qkv, others, there, 3 * dim, head * d, d, D)
        grad = _load_rows(grad_out, others, there, dim, head * d, d, D)
        log_sum = tl.load(log_sums + others * heads + head, mask=there, other=0.0)
        delta = tl.load(deltas + others * heads + head, mask=there, other=0.0)
        p, ds = _score_grads(q, k, v, grad, table, log_sum, delta, queries, keys, scale, w)
        v_grad += tl.dot(tl.trans(p).to(grad.dtype), grad, input_precision="ieee")
        k_grad += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision="ieee")
    _store_rows(grad_qkv, k_grad * scale, pixels, real, 3 * dim, dim + head * d, d, D)
    _store_rows(grad_qkv, v_grad, pixels, real, 3 * dim, 2 * dim + head * d, d, D)


@triton.jit
def _table_grad(
    qkv, table, log_sums, grad_out, deltas, grad_table, windows, H, W, heads, d, scale,
    w: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sum a tile of the scores' gradients over all windows, and add it to the table's once."""
    blocks: tl.constexpr = (w * w + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    head, block, other = program // (blocks * blocks), program // blocks % blocks, program % blocks
    dim = heads * d
    table += head * (2 * w - 1) * (2 * w - 1)
    queries, keys = block * BLOCK + tl.arange(0, BLOCK), other * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for window in range(0, windows):
        pixels, real = _pixels(window, queries, H, W, w), queries < w * w
        others, there = _pixels(window, keys, H, W, w), keys < w * w
        q = _load_rows(qkv, pixels, real, 3 * dim, head * d, d, D)
        k = _load_rows(qkv, others, there, 3 * dim, dim + head * d, d, D)
        v = _load_rows(qkv, others, there, 3 * dim, 2 * dim + head * d, d, D)
        grad = _load_rows(grad_out, pixels, real, dim, head * d, d, D)
        log_sum = tl.load(log_sums + pixels * heads + head, mask=real, other=0.0)
        delta = tl.load(deltas + pixels * heads + head, mask=real, other=0.0)
        _, ds = _score_grads(q, k, v, grad, table, log_sum, delta, queries, keys, scale, w)
        total += ds
    mask = (queries < w * w)[:, None] & (keys < w * w)[None, :]
    where = grad_table + head * (2 * w - 1) * (2 * w - 1) + _relative(queries, keys, w)
    tl.atomic_add(where, total, mask=mask)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, w: int) -> Tensor:
        B, H, W, channels = qkv.shape
        heads, d = len(table), channels // 3 // len(table)
        out = qkv.new_empty(B, H, W, heads * d)
        log_sums = qkv.new_empty(B, H, W, heads, dtype=torch.float32)
        ctx.sizes = H, W, heads, d, d**-0.5
        ctx.tiles = {"w": w, "BLOCK": BLOCK, "D": max(triton.next_power_of_2(d), 16)}
        ctx.windows = B * (H // w) * (W // w)
        grid = (ctx.windows * heads * triton.cdiv(w * w, BLOCK),)
        _attend[grid](qkv, table, out, log_sums, *ctx.sizes, **ctx.tiles)
        ctx.save_for_backward(qkv, table, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        qkv, table, out, log_sums = ctx.saved_tensors
        heads, blocks = len(table), triton.cdiv(ctx.tiles["w"] ** 2, ctx.tiles["BLOCK"])
        grad_out = grad_out.contiguous()
        deltas = (out.float() * grad_out.float()).unflatten(-1, (heads, -1)).sum(-1)
        grad_qkv, grad_table = torch.empty_like(qkv), torch.zeros_like(table, dtype=torch.float32)
        given = (qkv, table, log_sums, grad_out, deltas)
        grid = (ctx.windows * heads * blocks,)
        _queries_grad[grid](*given, grad_qkv, *ctx.sizes, **ctx.tiles)
        _keys_grad[grid](*given, grad_qkv, *ctx.sizes, **ctx.tiles)
        _table_grad[(heads * blocks**2,)](*given, grad_table, ctx.windows, *ctx.sizes, **ctx.tiles)
        return grad_qkv, grad_table.to(table.dtype), None


def window_attention(qkv: Tensor, table: Tensor, window_size: int) -> Tensor:
    """Attend within windows, with a relative position bias that is read from its table.

    Args:
        qkv: Queries, keys and values, channels ordered (q k v, head, channel).
        table: The bias by relative position, key minus query.
        window_size: Side w of a window.

    Shape:
        qkv: (B, 3·dim, H, W), H and W multiples of w. table: (heads, (2w-1)²). Output: (B, dim, H, W), laid
        out channels last.
    """
    qkv = qkv.permute(0, 2, 3, 1).contiguous()
    out: Tensor = _WindowAttention.apply(qkv, table.contiguous(), window_size)
    return out.permute(0, 3, 1, 2)


# The ConvFFN's middle: g = gelu(x), u = depthwise 3×3 of g, output g + gelu(u). A program has a tile of
# pixels and channels, and computes g again at each of the nine neighbours; beyond the map g is 0, as gelu(0).


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _tile(B, H, W, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Give this program's pixels, (PIXELS,), and channels, (CHANNELS,), and which of them exist."""
    across = tl.cdiv(C, CHANNELS)
    program = tl.program_id(0)
    pixels = (program // across).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channels = program % across * CHANNELS + tl.arange(0, CHANNELS)
    return pixels, channels, (pixels < B * H * W)[:, None] & (channels < C)[None, :]


@triton.jit
def _neighbour(pointer, pixels, channels, mask, dy, dx, H, W, C):
    """Load the neighbours (dy, dx) away, in float32; zeros beyond the map."""
    y, x = pixels // W % H + dy, pixels % W + dx
    mask = mask & ((y >= 0) & (y < H) & (x >= 0) & (x < W))[:, None]
    where = pointer + (pixels + dy * W + dx)[:, None] * C + channels[None, :]
    return tl.load(where, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _convolved(x, weight, bias, pixels, channels, mask, H, W, C):
    """Compute u, (PIXELS, CHANNELS)."""
    u = tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    u = tl.broadcast_to(u, mask.shape)
    for tap in range(0, 9):
        g = _gelu(_neighbour(x, pixels, channels, mask, tap // 3 - 1, tap % 3 - 1, H, W, C))
        u += g * tl.load(weight + channels * 9 + tap, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    return u


@triton.jit
def _middle(x, weight, bias, out, B, H, W, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    pixels, channels, mask = _tile(B, H, W, C, PIXELS, CHANNELS)
    u = _convolved(x, weight, bias, pixels, channels, mask, H, W, C)
    result = _gelu(_neighbour(x, pixels, channels, mask, 0, 0, H, W, C)) + _gelu(u)
    where = out + pixels[:, None] * C + channels[None, :]
    tl.store(where, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _convolved_grad(
    x, weight, bias, grad_out, grad_u, grad_weight, grad_bias, B, H, W, C,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write u's gradient, and add this tile's part of the weight's and the bias's."""
    pixels, channels, mask = _tile(B, H, W, C, PIXELS, CHANNELS)
    u = _convolved(x, weight, bias, pixels, channels, mask, H, W, C)
    du = _neighbour(grad_out, pixels, channels, mask, 0, 0, H, W, C) * _gelu_slope(u)
    tl.store(grad_u + pixels[:, None] * C + channels[None, :], du, mask=mask)
    tl.atomic_add(grad_bias + channels, tl.sum(du, 0), mask=channels < C)
    for tap in range(0, 9):
        g = _gelu(_neighbour(x, pixels, channels, mask, tap // 3 - 1, tap % 3 - 1, H, W, C))
        tl.atomic_add(grad_weight + channels * 9 + tap, tl.sum(du * g, 0), mask=channels < C)


@triton.jit
def _input_grad(
    x, weight, grad_out, grad_u, grad_x, B, H, W, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    pixels, channels, mask = _tile(B, H, W, C, PIXELS, CHANNELS)
    dg = _neighbour(grad_out, pixels, channels, mask, 0, 0, H, W, C)
    for tap in range(0, 9):  # what a pixel gave to its neighbours
        du = _neighbour(grad_u, pixels, channels, mask, 1 - tap // 3, 1 - tap % 3, H, W, C)
        dg += du * tl.load(weight + channels * 9 + tap, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    dx = dg * _gelu_slope(_neighbour(x, pixels, channels, mask, 0, 0, H, W, C))
    where = grad_x + pixels[:, None] * C + channels[None, :]
    tl.store(where, dx.to(grad_x.dtype.element_ty), mask=mask)


class _ConvFFNMiddle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.tiles = {"PIXELS": PIXELS, "CHANNELS": CHANNELS}
        ctx.grid = (triton.cdiv(x[..., 0].numel(), PIXELS) * triton.cdiv(x.shape[-1], CHANNELS),)
        out = torch.empty_like(x)
        _middle[ctx.grid](x, weight, bias, out, *x.shape, **ctx.tiles)
        ctx.save_for_backward(x, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_x, grad_u = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
        grad_weight, grad_bias = (torch.zeros_like(p, dtype=torch.float32) for p in (weight, bias))
        given = (x, weight, bias, grad_out, grad_u, grad_weight, grad_bias)
        _convolved_grad[ctx.grid](*given, *x.shape, **ctx.tiles)
        _input_grad[ctx.grid](x, weight, grad_out, grad_u, grad_x, *x.shape, **ctx.tiles)
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def conv_ffn_middle(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute ``g + gelu(depthwise(g))`` of ``g = gelu(x)``.

    Shape:
        x: (B, C, H, W). weight: (C, 1, 3, 3). bias: (C,). Output: (B, C, H, W), laid out channels last.
    """
    x = x.permute(0, 2, 3, 1).contiguous()
    out: Tensor = _ConvFFNMiddle.apply(x, weight.contiguous(), bias)
    return out.permute(0, 3, 1, 2)
