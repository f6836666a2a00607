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
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from esc_basicsr.common.log import warn_once
from esc_basicsr.fast.precision import without_autocast

# ruff: noqa: N803 - A, B, C and D as in the paper

CHUNK = 128
# numbers of the state that one operation takes: on a CPU what stays in a core's cache, on others what keeps
# the device busy
_BLOCK = {"cpu": 2**17}
_BLOCK_ELSEWHERE = 2**19


@functools.cache
def _mamba_ssm() -> Callable[..., Tensor] | None:
    """Find mamba_ssm's scan; None where it is not installed, or cannot be loaded."""
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
    """Name what computes `selective_scan` for tensors of a device and type: ``mamba_ssm`` or ``PyTorch``."""
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
    pass runs it again, and holds its states in memory.

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
        kernel = _mamba_ssm()
        if implementation(u.device, dtype) == "mamba_ssm" and kernel is not None:
            u, delta, B, C = (x.transpose(1, 2).contiguous() for x in (u, delta, B, C))
            A, B, C = A.contiguous(), B[:, None], C[:, None]
            options: dict[str, Any] = {"z": None, "delta_softplus": True, "return_last_state": False}
            y = kernel(u, delta, A, B, C, D, delta_bias=delta_bias, **options).transpose(1, 2)
        else:
            dt = F.softplus(delta + delta_bias)
            y = torch.addcmul(_recurrence(dt, A, dt * u, B, C), D, u)
    return y.to(given)


# Lanes: chunks of all images side by side, the last axis of what follows. A state is (N, D, lanes).


def _lanes(x: Tensor, chunk: int) -> Tensor:
    """Cut (batch, n, rows) into (chunk, rows, lanes); zeros fill the last chunk: no step, no input."""
    x = F.pad(x, (0, 0, 0, -x.shape[1] % chunk))
    # Whole rows first: numbers one by one, a sequence apart, would each miss the cache.
    x = x.unflatten(1, (-1, chunk)).permute(2, 0, 1, 3).contiguous()
    return x.flatten(1, 2).transpose(1, 2).contiguous()


def _sequence(x: Tensor, batch: int, n: int) -> Tensor:
    """Join (chunk, rows, lanes) to (batch, n, rows)."""
    x = x.transpose(1, 2).contiguous().unflatten(1, (batch, -1))
    return x.permute(1, 2, 0, 3).flatten(1, 2)[:, :n].contiguous()


def _carry(decay: Tensor, made: Tensor, batch: int) -> Tensor:
    """Find the states that enter the chunks, from what each decays its state by, and makes of zero."""
    # [N, D, (batch chunks)] -> [chunks, N, D, batch]
    decay, made = (x.unflatten(2, (batch, -1)).movedim(3, 0) for x in (decay, made))
    entering = [torch.zeros_like(made[0])]
    for decay_k, made_k in zip(decay[:-1], made[:-1], strict=True):
        entering.append(torch.addcmul(made_k, decay_k, entering[-1]))
    return torch.stack(entering, 3).flatten(2)


@torch.library.custom_op("esc_basicsr::recurrence", mutates_args=())
def _recurrence(dt: Tensor, A: Tensor, x: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Run h[l] = exp(dt[l]·A) * h[l-1] + x[l]·B[l]; y[l] = h[l] · C[l]: (batch, n, D)."""
    batch, n, _ = dt.shape
    dt, x, B, C = (_lanes(value, min(CHUNK, n)) for value in (dt, x, B, C))
    A = A.t()[:, :, None]
    lanes = dt.shape[2]
    width = max(_BLOCK.get(A.device.type, _BLOCK_ELSEWHERE) // A.numel(), 1)
    blocks = [slice(start, start + width) for start in range(0, lanes, width)]
    h = A.new_zeros(*A.shape[:2], lanes)
    for block in blocks:
        _walk(h[:, :, block], A, *(value[..., block] for value in (dt, x, B)))
    h = _carry(torch.exp(A * dt.sum(0)), h, batch)
    y = torch.empty_like(x)
    for block in blocks:
        _walk(h[:, :, block], A, *(value[..., block] for value in (dt, x, B, C, y)))
    return _sequence(y, batch, n)


def _walk(
    h: Tensor, A: Tensor, dt: Tensor, x: Tensor, B: Tensor, C: Tensor | None = None, y: Tensor | None = None
) -> None:
    """Take a block of chunks from their first states to their last, in place; write what is read of them."""
    state = h.clone(memory_format=torch.contiguous_format)
    factor = torch.empty_like(state)
    for step, (dt_l, x_l, B_l) in enumerate(zip(dt, x, B, strict=True)):
        torch.mul(dt_l, A, out=factor).exp_()
        state.mul_(factor).addcmul_(x_l, B_l[:, None])
        if C is not None and y is not None:
            torch.sum(torch.mul(state, C[step][:, None], out=factor), 0, out=y[step])
    h.copy_(state)


@_recurrence.register_fake
def _(dt: Tensor, A: Tensor, x: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return torch.empty_like(dt, memory_format=torch.contiguous_format)


@register_flop_formula(torch.ops.esc_basicsr.recurrence)
def _(dt: torch.Size, A: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Count n·D·(9·N + 1) multiply-adds, as MambaIRv2's authors do; PyTorch counts each twice."""
    return 2 * math.prod(dt) * (9 * A[1] + 1)


def _written_down(dt: Tensor, A: Tensor, x: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Run the same recurrence by operations that have gradients, every state written down."""
    batch, n, _ = dt.shape
    dt, x, B, C = (_lanes(value, min(CHUNK, n)) for value in (dt, x, B, C))
    A = A.t()[:, :, None]
    states = [x[0] * B[0][:, None]]
    for decay, x_l, B_l in zip(torch.exp(dt[1:, None] * A), x[1:], B[1:], strict=True):
        states.append(torch.addcmul(x_l * B_l[:, None], decay, states[-1]))
    since_start = torch.exp(dt.cumsum(0)[:, None] * A)
    entering = _carry(since_start[-1], states[-1], batch)
    h = torch.addcmul(torch.stack(states), since_start, entering)
    return _sequence((h * C[:, :, None]).sum(1), batch, n)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = [value.detach().requires_grad_() for value in ctx.saved_tensors]
        return torch.autograd.grad(_written_down(*inputs), inputs, grad_y)


_recurrence.register_autograd(_backward, setup_context=_keep)
