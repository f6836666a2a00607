"""Timing calls fairly on a noisy machine: in turn, in one run, by medians."""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm

_REST = 0.1  # seconds before a call on a CPU: threads that another runtime keeps spin for a while


def times_in_turn(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int,
    device: torch.device,
    once_above: float = math.inf,
) -> dict[str, list[float]]:
    """Time several calls in turn, so that a slow minute of the machine slows all of them.

    Args:
        calls: What to time, by name.
        repeats: Timed rounds; each times every call once.
        warmup: Rounds before them.
        device: Where the calls run; CUDA is timed by events.
        once_above: A call whose first run takes more seconds than this is run once only; that is its time.

    Returns:
        Seconds of each timed run, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    once: set[str] = set()
    rounds = warmup + repeats
    with tqdm(total=rounds * len(calls), desc="timing", unit="call", leave=False) as bar:
        for number in range(rounds):
            for name, call in calls.items():
                bar.update()
                if name in once:
                    continue
                seconds = _seconds(call, device)
                if number == 0 and seconds > once_above:
                    once.add(name)
                if number >= warmup or name in once:
                    times[name].append(seconds)
    return times


def median_times(
    calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int, device: torch.device
) -> dict[str, float]:
    """Give the median seconds of `times_in_turn` by name."""
    times = times_in_turn(calls, repeats, warmup, device)
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        time.sleep(_REST)
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
