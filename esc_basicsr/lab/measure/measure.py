"""Measuring networks fairly on a noisy machine: in turn, in one run, by medians."""

import argparse
import contextlib
import ctypes
import functools
import math
import multiprocessing
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import Tensor

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.memory import is_out_of_memory
from esc_basicsr.common.timing import times_in_turn
from esc_basicsr.lab.networks.by_name import described


class NotEnoughMemoryError(UserError):
    """A network's forward pass takes more memory than there is; ``network`` is its name."""

    def __init__(self, network: str, x: Tensor) -> None:
        size = f"{x.shape[-2]}×{x.shape[-1]}"
        super().__init__(
            f"{network}: the memory is not enough for an input of {size}: measure a smaller one."
        )
        self.network = network


def add_measuring_arguments(parser: argparse.ArgumentParser, repeats: int = 5) -> None:
    """Declare what every measurement has: ``--device``, ``--repeats``, ``--warmup``, ``--output``."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help=f"timed runs of each (default: {repeats})"
    )
    parser.add_argument("--warmup", type=int, default=1, help="runs before them (default: 1)")
    parser.add_argument("-o", "--output", type=Path, help="folder for a JSON file, a table and a figure")


def check_measuring_arguments(args: argparse.Namespace) -> torch.device:
    """Check what `add_measuring_arguments` declared, and give the device, ready to measure on.

    Raises:
        UserError: A number is out of range, or there is no such device.
    """
    if args.repeats < 1 or args.warmup < 0:
        raise UserError(f"--repeats must be at least 1 and --warmup 0, got {args.repeats} and {args.warmup}.")
    return device_to_measure_on(args.device)


def device_to_measure_on(name: str) -> torch.device:
    """Make a device ready: strict float32 on CUDA.

    Raises:
        UserError: There is no such device.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: expected cpu, cuda, or cuda:N.")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no GPU that PyTorch can use.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, from cuda:0.")
        torch.cuda.set_device(device)  # events and synchronisation are those of the current device
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def time_networks(
    nets: Mapping[str, torch.nn.Module],
    x: Tensor,
    repeats: int,
    warmup: int,
    once_above: float = math.inf,
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Time forward passes on one input in turn, see `times_in_turn`.

    Returns:
        Seconds of each timed pass, and the last output, by name.

    Raises:
        NotEnoughMemoryError: Of the first network that needs more than there is.
        UserError: A network fails, for want of a compiler, say, or on an input that it does not take.
    """
    outputs: dict[str, Tensor] = {}

    def call(name: str) -> None:
        try:
            outputs[name] = nets[name](x)
        except Exception as failure:
            if is_out_of_memory(failure):
                raise NotEnoughMemoryError(name, x) from failure
            raise UserError(
                f"{name}: fails on an input of {tuple(x.shape)} ({described(failure)})."
            ) from failure

    calls = {name: functools.partial(call, name) for name in nets}
    with torch.inference_mode():
        times = times_in_turn(calls, repeats, warmup, x.device, once_above)
    return times, outputs


def largest_difference(sr: Tensor, reference: Tensor) -> float | None:
    """Return the largest absolute difference of two outputs; None of one from itself."""
    return None if reference is sr else float((sr.float() - reference.float()).abs().max())


def peak_memory_growth(build: Callable[[], torch.nn.Module], lq: Tensor) -> int:
    """Measure by how many bytes one forward pass raises the peak of memory, weights and input left out.

    On a CPU it is the growth of a fresh process's largest resident set, as the allocator keeps what an
    earlier pass has freed. ``build`` must then be picklable.

    Raises:
        UserError: The process was killed, as happens where memory runs out.
    """
    if lq.device.type == "cuda":
        net = build().to(lq.device, lq.dtype).eval()
        with torch.inference_mode():
            net(lq)  # libraries load and compile
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            net(lq)
        return torch.cuda.max_memory_allocated() - before
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        task = pool.submit(_resident_growth, build, tuple(lq.shape), lq.dtype, torch.get_num_threads())
        try:
            return task.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"the process that measured memory for an input of {tuple(lq.shape)} was killed: memory ran "
                "out, most likely. Measure a smaller input, or leave that network out."
            ) from error


def _resident_growth(
    build: Callable[[], torch.nn.Module], shape: tuple[int, ...], dtype: torch.dtype, threads: int
) -> int:
    torch.set_num_threads(threads)
    net = build().to(dtype).eval()
    with torch.inference_mode():
        for height in (64, 96):  # libraries load and compile; for any shape once they have seen two
            net(torch.rand(*shape[:2], height, 64, dtype=dtype))
        lq = torch.rand(shape, dtype=dtype)
        with contextlib.suppress(AttributeError):
            # what glibc's allocator keeps, a pass would use unseen
            ctypes.CDLL(None).malloc_trim(0)
        before = _peak_resident(restart=True)
        net(lq)
    return _peak_resident() - before


def _peak_resident(restart: bool = False) -> int:
    """Return the bytes of this process's largest resident set, on Linux since it was last restarted."""
    status = Path("/proc/self/status")
    if not status.is_file():
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024  # "VmHWM: NUMBER kB"
