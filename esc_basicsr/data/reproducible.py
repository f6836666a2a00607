"""Training data whose order, augmentation and position are reproducible: resumed, or on more processes.

A sample depends on the seed, the epoch and its position there alone: not on which process or worker makes it,
nor on what either made before.
"""

import atexit
import contextlib
import functools
import hashlib
import multiprocessing
import os
import random
import struct
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from esc_basicsr.common import signals as stopping
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.common.parallel_map import end_with_main_process, from_server

__all__ = ["Draw", "ReproducibleDataset", "ReproducibleSampler", "TrainingLoader"]


class Draw(NamedTuple):
    """One sample of an epoch: which image of the data set, and what its random numbers come from."""

    image: int
    seed: int


class ReproducibleSampler(Sampler[Draw]):
    """The samples of one process: of each global batch, its share.

    An epoch is a permutation of ``images`` × ``ratio`` samples, cut into global batches; an incomplete last
    one is dropped. Each process takes the same number of samples of each, one stretch after another, so that
    a global batch is the same whatever the number of processes.

    Args:
        images: Length of the data set.
        ratio: Samples of an epoch by image.
        batch: Samples of a global batch, a multiple of ``world_size``.
        rank: This process.
        world_size: Processes.
        seed: The same in all processes.
        resumed: `position` of the batch that training was at; None to begin anew.
    """

    def __init__(
        self,
        images: int,
        ratio: float,
        batch: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        resumed: dict[str, int] | None = None,
    ) -> None:
        self.images = images
        self.samples = int(np.ceil(images * ratio))
        self.batch = batch
        self.batches = self.samples // batch
        self.seed = resumed["seed"] if resumed else seed
        self.start = 0  # the first batch of the epoch at hand
        self._share = range(rank * batch // world_size, (rank + 1) * batch // world_size)
        self._resumed = resumed
        self._epoch: int | None = None

    def __len__(self) -> int:
        """Return the samples of a whole epoch for this process."""
        return self.batches * len(self._share)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch: to its beginning, or to where training was when it was interrupted."""
        self._epoch = epoch
        self.start = self.begin(epoch)

    def begin(self, epoch: int) -> int:
        """Return the batch that an epoch begins with: above 0 where training was interrupted there."""
        resumed = self._resumed
        if not resumed or resumed["epoch"] != epoch or resumed["samples"] != self.samples:
            return 0
        return min(resumed["done"] * resumed["batch"] // self.batch, self.batches)

    def position(self, done: int) -> dict[str, int]:
        """Return what a resumed run needs to go on after ``done`` batches of this epoch."""
        if self._epoch is None:
            raise RuntimeError("set_epoch comes first")
        return {
            "seed": self.seed,
            "samples": self.samples,
            "batch": self.batch,
            "epoch": self._epoch,
            "done": done,
        }

    def __iter__(self) -> Iterator[Draw]:
        """Yield the rest of the epoch; nothing before there is one, so that no worker begins wrongly."""
        if self._epoch is None:
            return
        generator = torch.Generator().manual_seed(_hash(self.seed, self._epoch, -1))
        order = (torch.randperm(self.samples, generator=generator) % self.images).numpy()
        for first in range(self.start * self.batch, self.batches * self.batch, self.batch):
            for position in range(first + self._share.start, first + self._share.stop):
                yield Draw(int(order[position]), _hash(self.seed, self._epoch, position))


class ReproducibleDataset(Dataset[dict[str, Any]]):
    """A data set of BasicSR, each of whose samples has random numbers of its own, and a substitute.

    Where an image cannot be read another one, drawn by the sample's own random numbers, takes its place.

    Args:
        dataset: What it draws from; Python's, NumPy's and PyTorch's global generators are seeded for it.
        most_unreadable: How many images in a row may fail.
        order: Its indices, in the order in which samples are drawn from; as it has them by default.

    Returns of an item, for a `Draw`:
        What ``dataset`` gives, and ``unreadable``: a line for each image that was passed over. Where too many
        in a row fail, or what it gives is no dict, ``failure`` alone: why.
    """

    def __init__(self, dataset: Any, most_unreadable: int, order: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.most_unreadable = most_unreadable
        self.order = order

    def __len__(self) -> int:
        """Images of the data set."""
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """Make one sample."""
        unreadable: list[str] = []
        trace = ""
        index = draw.image if self.order is None else self.order[draw.image]
        with _seeded(draw.seed):
            while len(unreadable) <= self.most_unreadable:
                try:
                    sample = self.dataset[index]
                    if isinstance(sample, Mapping):
                        return {**sample, "unreadable": "\n".join(unreadable)}
                    kind = type(sample).__name__
                    return {"failure": f"{self._name(index)} is a {kind}; BasicSR's models take a dict"}
                except MemoryError:
                    raise
                except UserError as error:
                    unreadable.append(_line(f"{self._name(index)}: {error}"))
                except Exception as error:  # data sets of others fail as they please
                    message = f"{type(error).__name__}: {error}"
                    if not isinstance(error, OSError):  # it may be a fault of the data set's own
                        trace = f"\n{traceback.format_exc()}"
                    unreadable.append(_line(f"{self._name(index)} cannot be read or decoded ({message})"))
                index = random.randrange(len(self.dataset))
        return {"failure": "\n  ".join(unreadable) + trace}

    def _name(self, index: int) -> str:
        """Describe an image and its set: PairedImageDataset's errors do not."""
        opt = getattr(self.dataset, "opt", None) or {}
        label = f"{opt.get('name', 'data set')}, image {index}"
        paths = getattr(self.dataset, "paths", None)
        path = paths[index] if isinstance(paths, list) and index < len(paths) else None
        known = path.get("gt_path", path.get("lq_path")) if isinstance(path, dict) else path
        return label if known is None else f"{label}, {known}"


class TrainingLoader(DataLoader[dict[str, Any]]):
    """Batches of a `ReproducibleDataset`, by a `ReproducibleSampler`.

    A batch has what the data set's samples have, and ``position``: what resuming after it needs. An image
    that had to be passed over is logged by name, once; beyond ``most_unreadable`` of them in this process it
    ends.

    Args:
        dataset: The samples.
        sampler: Their order.
        batch_size: Samples of a batch of this process.
        kwargs: `torch.utils.data.DataLoader`'s.

    Raises of an iteration:
        UserError: Too many images cannot be read, or a worker died.
    """

    sampler: ReproducibleSampler

    def __init__(
        self, dataset: ReproducibleDataset, sampler: ReproducibleSampler, batch_size: int, **kwargs: Any
    ) -> None:
        if kwargs.get("num_workers"):
            is_forked = multiprocessing.get_start_method() == "fork"
            context = None if is_forked else from_server(__name__, "esc_basicsr.data.dflip_dataset")
            kwargs.setdefault("multiprocessing_context", context)
        super().__init__(
            dataset,
            batch_size,
            sampler=sampler,
            drop_last=True,
            collate_fn=_collate,
            worker_init_fn=_start_worker,
            # Of its own: workers' seeds, which nothing here uses, are else drawn from the global one.
            generator=torch.Generator(),
            **kwargs,
        )
        self._most_unreadable = dataset.most_unreadable
        self._unreadable: set[str] = set()
        self._workers: Sequence[BaseProcess] = ()  # persistent ones that end as Python ends

    def __iter__(self) -> Any:
        """Yield the batches of the epoch at hand. Workers start with the first."""
        with stopping.held():
            batches = super().__iter__()
        workers = getattr(batches, "_workers", ())
        shut_down = functools.partial(_shut_down, weakref.ref(batches), workers, os.getpid())
        if workers is not self._workers:
            atexit.register(shut_down)
            self._workers = workers if self.persistent_workers else ()
        done = self.sampler.start
        try:
            while (batch := _next(batches)) is not None:
                done += 1
                if "failure" in batch:
                    raise UserError(f"training data cannot be read:\n  {batch['failure']}")
                self._report(batch.pop("unreadable"))
                yield {**batch, "position": self.sampler.position(done)}
        finally:
            if not self.persistent_workers:
                shut_down()
                atexit.unregister(shut_down)

    def _report(self, lines: Sequence[str]) -> None:
        for line in (line for text in lines for line in text.splitlines()):
            if line in self._unreadable:
                continue
            self._unreadable.add(line)
            # at a level that is heard from every rank
            logger.error("Training data: passed over %s", line)
            if len(self._unreadable) > self._most_unreadable:
                raise UserError(
                    f"{len(self._unreadable)} images of the training data could not be read, more than "
                    f"datasets.train.max_unreadable, {self._most_unreadable}. The last: {line}\n"
                    "Check the data ('python -m esc_basicsr lmdb --help'), then go on with --auto_resume."
                )


def _next(batches: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return next(batches, None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that loads training data died ({_line(str(error))}), perhaps for want of memory: "
            "lower datasets.train.num_worker_per_gpu, and go on with --auto_resume."
        ) from error


def _line(text: str) -> str:
    return " ".join(text.split())


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Put samples together to a batch; if one failed, return its reason alone."""
    failure = next((sample for sample in samples if "failure" in sample), None)
    batch: dict[str, Any] = failure or default_collate(samples)
    return batch


def _start_worker(number: int) -> None:
    stopping.ignored()
    end_with_main_process()  # PyTorch's workers watch their parent, which here may be the server


def _shut_down(batches: "weakref.ref[Any]", workers: Sequence[BaseProcess], owner: int) -> None:
    """End what is left of workers as Python ends: multiprocessing would send SIGTERM, and wait for ever.

    PyTorch asks them to end, and where one has not heard it, sends SIGTERM, too.
    """
    if os.getpid() != owner:  # a process that was forked from it since
        return
    if (left := batches()) is not None and hasattr(left, "_shutdown_workers"):
        left._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _hash(*numbers: int) -> int:
    """Derive a seed of 63 bits from numbers, on every machine the same."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within it the global random numbers begin at ``seed``; afterwards a main process has its own again."""
    before = None
    if get_worker_info() is None:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # leaves GPUs' alone: no sample is made there
    try:
        yield
    finally:
        if before is not None:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
