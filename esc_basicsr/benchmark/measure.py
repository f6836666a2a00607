"""Measuring networks fairly on a noisy machine: in turn, in one run, by medians."""

import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

__all__ = ["describe_machine", "median_times", "peak_memory_growth"]


def median_times(
    calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int, device: torch.device
) -> dict[str, float]:
    """Time several calls in turn, so that a slow minute of the machine slows all of them.

    Args:
        calls: What to time, by name.
        repeats: Timed rounds; each times every call once.
        warmup: Rounds before them.
        device: Where the calls run; CUDA is timed by events.

    Returns:
        Median seconds by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with tqdm(total=(warmup + repeats) * len(calls), desc="timing", unit="call") as bar:
        for number in range(warmup + repeats):
            for name, call in calls.items():
                seconds = _time_cuda(call) if device.type == "cuda" else _time_cpu(call)
                if number >= warmup:
                    times[name].append(seconds)
                bar.update()
    return {name: statistics.median(values) for name, values in times.items()}


def _time_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time_cuda(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_memory_growth(build: Callable[[], torch.nn.Module], lq: Tensor) -> int:
    """Bytes by which one forward pass raises the peak of memory in use, weights and input left out.

    On a CPU it is the growth of a fresh process's largest resident set, as the allocator keeps what an
    earlier pass has freed. ``build`` must then be picklable.
    """
    if lq.device.type == "cuda":
        net = build().to(lq.device, lq.dtype).eval()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            net(lq)
        return torch.cuda.max_memory_allocated() - before
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident_growth, (build, tuple(lq.shape), lq.dtype, torch.get_num_threads()))


def _resident_growth(
    build: Callable[[], torch.nn.Module], shape: tuple[int, ...], dtype: torch.dtype, threads: int
) -> int:
    torch.set_num_threads(threads)
    net = build().to(dtype).eval()
    with torch.inference_mode():
        net(torch.rand(*shape[:2], 64, 64, dtype=dtype))  # libraries load and compile
        lq = torch.rand(shape, dtype=dtype)
        before = _peak_resident(restart=True)
        net(lq)
    return _peak_resident() - before


def _peak_resident(restart: bool = False) -> int:
    """Bytes of this process's largest resident set, on Linux since it was last restarted."""
    status = Path("/proc/self/status")
    if not status.is_file():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
