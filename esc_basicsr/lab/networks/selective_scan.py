"""The selective scan of state-space networks: a linear recurrence whose decay follows its input.

Source: Mamba, arXiv:2312.00752. Where mamba_ssm is installed its kernel serves float32 on CUDA
(`implementation` tells); anywhere else the scan runs in PyTorch, as follows.

The sequence is cut into chunks. Decays compose, so a chunk's effect on the state that enters it is known
from the sum of its steps and from what it makes of a state of zero. Hence two walks: the first finds what
each chunk makes of zero, the states that enter the chunks follow, and the second walk, from those, gives the
outputs. Both take one position of every chunk at a time, a block of chunks that fits a processor's cache,
and never write the states of the whole sequence down. Only decays of at most 1 are multiplied: nothing
divides, so that products which underflow do no harm.
"""

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]

from esc_basicsr.common.log import warn_once
from esc_basicsr.fast.precision import without_autocast

# ruff: noqa: N803 - A, B, C and D as in the paper

__all__ = ["count_multiply_adds", "implementation", "selective_scan"]

CHUNK = 128
# numbers of the state that one operation takes: on a CPU what stays in a core's cache, on others what keeps
# the device busy, and the memory of the backward pass in bounds
_BLOCK = {"cpu": 2**17}
_BLOCK_ELSEWHERE = 2**19


@functools.cache
def _mamba_ssm() -> Callable[..., Tensor] | None:
    """mamba_ssm's scan; None where it is not installed, or cannot be loaded."""
    try:
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError, RuntimeError) as error:  # built for another PyTorch or CUDA
        warn_once(
            f"mamba_ssm is installed but cannot be loaded ({error}); the selective scan runs in PyTorch."
        )
        return None
    kernel: Callable[..., Tensor] = scan.selective_scan_fn
    return kernel


def implementation(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """What computes `selective_scan` for tensors of a device and type: ``mamba_ssm`` or ``PyTorch``."""
    by_kernel = device.type == "cuda" and dtype != torch.float64 and _mamba_ssm() is not None
    return "mamba_ssm" if by_kernel else "PyTorch"


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """Run the recurrence over a sequence, for each channel d and each of its N states.

    ::

        dt      = softplus(delta + delta_bias)
        h[l, d] = exp(dt[l, d]·A[d]) * h[l-1, d] + dt[l, d]·u[l, d]·B[l]        h[-1, d] = 0
        y[l, d] = h[l, d] · C[l] + D[d]·u[l, d]

    Computed in float32 (float64 for float64), with autocast or without. Differentiable once; the backward
    pass walks again, and keeps the states of a block of chunks only.

    Args:
        u: The input.
        delta: The step before bias and softplus.
        A: What the decay is made of, below 0.
        B: How the input enters the states.
        C: How the states are read.
        D: How the input passes by.
        delta_bias: Added to ``delta``.

    Shape:
        u, delta, output: (batch, n, D), n >= 1. A: (D, N). B, C: (batch, n, N). D, delta_bias: (D,).
    """
    given = u.dtype
    dtype = torch.promote_types(given, torch.float32)
    with without_autocast(u.device):
        u, delta, A, B, C, D, delta_bias = (x.to(dtype) for x in (u, delta, A, B, C, D, delta_bias))
        # In a trace the multiply-adds of our recurrence are known, of the kernel they are not.
        if implementation(u.device, dtype) == "mamba_ssm" and not is_tracing():
            kernel = _mamba_ssm()
            assert kernel is not None
            u, delta, B, C = (x.transpose(1, 2).contiguous() for x in (u, delta, B, C))
            y = kernel(
                u,
                delta,
                A.contiguous(),
                B[:, None],
                C[:, None],
                D,
                z=None,
                delta_bias=delta_bias,
                delta_softplus=True,
                return_last_state=False,
            ).transpose(1, 2)
        else:
            dt = F.softplus(delta + delta_bias)
            y = torch.addcmul(_recurrence(dt, A, dt * u, B, C)[0], D, u)
    return y.to(given)


def count_multiply_adds(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of one scan, as the authors of MambaIRv2 count them: n·D·(9·N + 1) an image.

    A handle for mmengine's `FlopAnalyzer`, for operation ``esc_basicsr::recurrence``.
    """
    steps, A = (value.type().sizes() for value in inputs[:2])
    return math.prod(steps) * (9 * A[1] + 1)


# Lanes: chunks of all images side by side, the last axis of everything below. A state is (N, D, lanes).


def _lanes(x: Tensor, chunk: int) -> Tensor:
    """(batch, n, rows) -> (chunk, rows, lanes); zeros fill the last chunk: no step, no input, no decay."""
    x = F.pad(x, (0, 0, 0, -x.shape[1] % chunk))
    # Whole rows first: numbers one by one, a sequence apart, would each miss the cache.
    x = x.unflatten(1, (-1, chunk)).permute(2, 0, 1, 3).contiguous()
    return x.flatten(1, 2).transpose(1, 2).contiguous()


def _sequence(x: Tensor, batch: int, n: int) -> Tensor:
    """(chunk, rows, lanes) -> (batch, n, rows)."""
    x = x.transpose(1, 2).contiguous().unflatten(1, (batch, -1))
    return x.permute(1, 2, 0, 3).flatten(1, 2)[:, :n].contiguous()


def _blocks(A: Tensor, lanes: int) -> Iterator[slice]:
    """Slices of lanes that are walked together. ``A``: (N, D, 1)."""
    width = max(_BLOCK.get(A.device.type, _BLOCK_ELSEWHERE) // A.numel(), 1)
    return (slice(start, min(start + width, lanes)) for start in range(0, lanes, width))


def _carry(decay: Tensor, made: Tensor, batch: int) -> Tensor:
    """The states that enter the chunks, from what each decays its state by, and makes of zero."""
    # [N, D, (batch chunks)] -> [chunks, N, D, batch]
    decay, made = (x.unflatten(2, (batch, -1)).movedim(3, 0).contiguous() for x in (decay, made))
    entering = torch.zeros_like(made)
    for k in range(1, len(made)):
        torch.addcmul(made[k - 1], decay[k - 1], entering[k - 1], out=entering[k])
    return entering.movedim(0, 3).flatten(2)


def _states_before(dt: Tensor, A: Tensor, x: Tensor, B: Tensor, decay: Tensor, batch: int) -> Tensor:
    """The state that enters each chunk."""
    made = torch.zeros_like(decay)
    for block in _blocks(A, dt.shape[2]):
        h = torch.zeros_like(made[:, :, block])
        factor = torch.empty_like(h)
        for dt_l, x_l, B_l in zip(dt[..., block], x[..., block], B[..., block], strict=True):
            torch.mul(dt_l, A, out=factor).exp_()
            h.mul_(factor).addcmul_(x_l, B_l[:, None])
        made[:, :, block] = h
    return _carry(decay, made, batch)


@torch.library.custom_op("esc_basicsr::recurrence", mutates_args=())
def _recurrence(dt: Tensor, A: Tensor, x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """h[l] = exp(dt[l]·A) * h[l-1] + x[l]·B[l]; y[l] = h[l] · C[l].

    Returns:
        y, (batch, n, D); the state that enters each chunk, (N, D, lanes).
    """
    batch, n, _ = dt.shape
    dt, x, B, C = (_lanes(value, min(CHUNK, n)) for value in (dt, x, B, C))
    A = A.t()[:, :, None]
    entering = _states_before(dt, A, x, B, torch.exp(A * dt.sum(0)), batch)
    y = torch.empty_like(x)
    for block in _blocks(A, dt.shape[2]):
        h = entering[:, :, block].clone(memory_format=torch.contiguous_format)
        factor = torch.empty_like(h)
        walk = zip(*(value[..., block] for value in (dt, x, B, C, y)), strict=True)
        for dt_l, x_l, B_l, C_l, y_l in walk:
            torch.mul(dt_l, A, out=factor).exp_()
            h.mul_(factor).addcmul_(x_l, B_l[:, None])
            torch.sum(torch.mul(h, C_l[:, None], out=factor), 0, out=y_l)
    return _sequence(y, batch, n), entering


@_recurrence.register_fake
def _(dt: Tensor, A: Tensor, x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    batch, n, channels = dt.shape
    lanes = batch * -(-n // min(CHUNK, n))
    return torch.empty_like(dt, memory_format=torch.contiguous_format), dt.new_empty(
        A.shape[1], channels, lanes
    )


@torch.library.custom_op("esc_basicsr::recurrence_backward", mutates_args=())
def _recurrence_backward(
    dt: Tensor, A: Tensor, x: Tensor, B: Tensor, C: Tensor, entering: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for the five inputs of `_recurrence`.

    The gradient of a state is a recurrence, too, from the end:
    g[l] = exp(dt[l+1]·A) * g[l+1] + grad_y[l]·C[l].
    """
    batch, n, _ = dt.shape
    dt, x, B, C, grad_y = (_lanes(value, min(CHUNK, n)) for value in (dt, x, B, C, grad_y))
    A = A.t()[:, :, None]
    leaving = _gradients_after(dt, A, C, grad_y, batch)
    grads = [torch.empty_like(value) for value in (dt, x, B, C)]
    grad_A = torch.zeros_like(A)
    for block in _blocks(A, dt.shape[2]):
        h = _states_within(dt[..., block], A, x[..., block], B[..., block], entering[:, :, block])
        g = leaving[:, :, block].clone(memory_format=torch.contiguous_format)
        by_exponent, product = torch.empty_like(g), torch.empty_like(g)
        factor, by_A = torch.empty_like(g), torch.zeros_like(g)
        walk = zip(
            *(value[..., block] for value in (dt, x, B, C, grad_y, *grads)), h[1:], h[:-1], strict=True
        )
        for dt_l, x_l, B_l, C_l, grad_y_l, grad_dt, grad_x, grad_B, grad_C, h_l, h_before in reversed(
            [*walk]
        ):
            torch.sum(torch.mul(h_l, grad_y_l, out=product), 1, out=grad_C)
            g.addcmul_(C_l[:, None], grad_y_l)
            torch.sum(torch.mul(g, B_l[:, None], out=product), 0, out=grad_x)
            torch.sum(torch.mul(g, x_l, out=product), 1, out=grad_B)
            g.mul_(torch.mul(dt_l, A, out=factor).exp_())
            torch.mul(g, h_before, out=by_exponent)
            by_A.addcmul_(by_exponent, dt_l)
            torch.sum(by_exponent.mul_(A), 0, out=grad_dt)
        grad_A += by_A.sum(2, keepdim=True)
    grad_dt, grad_x, grad_B, grad_C = (_sequence(value, batch, n) for value in grads)
    return grad_dt, grad_A[:, :, 0].t().contiguous(), grad_x, grad_B, grad_C


def _gradients_after(dt: Tensor, A: Tensor, C: Tensor, grad_y: Tensor, batch: int) -> Tensor:
    """The gradient of the state that leaves each chunk: the same recurrence, from the end.

    Seen from there a chunk's first decay is one with the last decay of the chunk after it, as the gradient
    of a state that enters has passed it already.
    """
    made = torch.zeros(*A.shape[:2], dt.shape[2], dtype=dt.dtype, device=dt.device)
    for block in _blocks(A, dt.shape[2]):
        g = torch.zeros_like(made[:, :, block])
        factor = torch.empty_like(g)
        walk = zip(dt[..., block].flip(0), C[..., block].flip(0), grad_y[..., block].flip(0), strict=True)
        for dt_l, C_l, grad_y_l in walk:
            g.addcmul_(C_l[:, None], grad_y_l).mul_(torch.mul(dt_l, A, out=factor).exp_())
        made[:, :, block] = g
    # [N, D, (batch chunks)], from the last chunk to the first and back
    decay, made = (x.unflatten(2, (batch, -1)).flip(3).flatten(2) for x in (torch.exp(A * dt.sum(0)), made))
    return _carry(decay, made, batch).unflatten(2, (batch, -1)).flip(3).flatten(2)


def _states_within(dt: Tensor, A: Tensor, x: Tensor, B: Tensor, entering: Tensor) -> Tensor:
    """The states at each position of a block of chunks, (chunk + 1, N, D, lanes), from those that enter."""
    h = entering.new_empty(len(dt) + 1, *entering.shape)
    h[0] = entering
    for k, (dt_l, x_l, B_l) in enumerate(zip(dt, x, B, strict=True)):
        torch.mul(dt_l, A, out=h[k + 1]).exp_().mul_(h[k]).addcmul_(x_l, B_l[:, None])
    return h


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_y: Tensor, grad_entering: Tensor) -> tuple[Tensor, ...]:
    return _recurrence_backward(*ctx.saved_tensors, grad_y)


_recurrence.register_autograd(_backward, setup_context=_keep)
