"""How much memory there is to work in."""

from pathlib import Path

import psutil
import torch

__all__ = ["available_memory", "is_out_of_memory"]

# A container's limit and use: control groups, version 2, then 1.
_CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_memory(device: torch.device) -> int:
    """Bytes that can be taken on a device, or in main memory, without anything being driven out."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what PyTorch keeps for itself and does not use
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = int(psutil.virtual_memory().available)
    for limit, used in _CONTROL_GROUPS:
        try:
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # no such group, or one without a limit
            continue
        available = min(available, max(left, 0))
    return available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is want of memory; on a CPU PyTorch has no type of its own for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)
