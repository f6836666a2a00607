"""Memory that there is to work in."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_MEMBERSHIP = Path("/proc/self/cgroup")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
# What errors say that have no type of their own for it.
_OUT_OF_MEMORY = (
    *("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory"),
    *("could not create a primitive", "could not create a memory"),  # oneDNN's
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


def available_memory(device: torch.device) -> int:
    """Return the bytes that can be taken on a device, or in main memory, without driving anything out."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what PyTorch keeps for itself and does not use
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = int(psutil.virtual_memory().available)
    return min([available, *_left_in_control_groups()])


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is want of memory; of those that PyTorch raises few have a type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def _left_in_control_groups() -> Iterator[int]:
    """Find what the control groups of this process leave, a container's or a job's: versions 2 and 1."""
    for group, limit, used, pages in _control_groups():
        try:
            left = int((group / limit).read_text()) - int((group / used).read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or one without a limit
            continue
        # Files' pages count as used, and make room when it is wanted.
        yield max(left + sum(int(statistics.get(key, 0)) for key in pages), 0)


def _control_groups() -> Iterator[tuple[Path, str, str, tuple[str, str]]]:
    """List the groups that this process is in, with the names of their files, and of their page statistics.

    A group's limit holds for the groups below it, so that all above one's own count.
    """
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        own = Path(path.strip("/"))
        for part in (own, *own.parents):
            if not controllers:
                pages = ("active_file", "inactive_file")
                yield _CONTROL_GROUPS / part, "memory.max", "memory.current", pages
            elif "memory" in controllers.split(","):
                group = _CONTROL_GROUPS / "memory" / part
                pages = ("total_active_file", "total_inactive_file")
                yield group, "memory.limit_in_bytes", "memory.usage_in_bytes", pages
