"""When the Triton kernels serve: on CUDA, where Triton is installed and did not fail."""

import importlib

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]

from esc_basicsr.common.log import warn_once

_failures: list[Exception] = []
_tried: set[tuple[object, ...]] = set()


def by_triton(name: str, x: Tensor, *others: Tensor | int) -> Tensor | None:
    """Compute by a function of `triton_kernels`; None where that does not serve.

    Args:
        name: The function's.
        x: Its first argument, a map (B, C, H, W).
        others: Its further arguments, tensors first.
    """
    if not _serves(x) or _failures:
        return None
    try:
        function = getattr(importlib.import_module("esc_basicsr.fast.triton_kernels"), name)
        sizes = tuple(other if isinstance(other, int) else other.shape for other in others)
        if torch.is_grad_enabled() and (name, x.dtype, sizes) not in _tried:
            # What fails only in the backward pass could not be caught there.
            with torch.enable_grad():
                own = [one.detach().requires_grad_() for one in (x[:1], *others) if isinstance(one, Tensor)]
                rest = [one for one in others if not isinstance(one, Tensor)]
                function(*own, *rest).float().sum().backward()
            _tried.add((name, x.dtype, sizes))
        out: Tensor = function(x, *others)
        return out
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no compiler, a card that is too old or too small
        _failures.append(error)
        reason = f"{type(error).__name__}: {error}"
        warn_once(f"The Triton kernels fail ({reason}); PyTorch's operations take over.")
        return None


def take_failures() -> list[Exception]:
    """Return what has kept the kernels from serving, and let them be tried again."""
    failures = [*_failures]
    _failures.clear()
    return failures


def _serves(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or is_tracing():
        return False
    return x.device.type == "cuda" and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
