"""Training data that can be had again: order, augmentation, position, whatever the processes and workers."""

import itertools
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.utils.registry import DATASET_REGISTRY

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.data.loaders import batch_of_process, create_train_val_dataloader
from esc_basicsr.data.reproducible import ReproducibleDataset, ReproducibleSampler, TrainingLoader


class Noise:
    """Images that are their number, with noise of every global generator; some cannot be read."""

    def __init__(
        self, opt: dict[str, Any] | None = None, images: int = 10, broken: tuple[int, ...] = ()
    ) -> None:
        self.opt = opt
        self.images = images
        self.broken = broken
        self.paths = [{"gt_path": f"photo{index}"} for index in range(images)]

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.broken:
            raise OSError("cut short")
        return {"image": index, "noise": random.random() + np.random.rand() + float(torch.rand(()))}


def load(
    epochs: int = 1,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    first_epoch: int = 0,
    resumed: dict[str, int] | None = None,
    dataset: Any = None,
    most_unreadable: int = 3,
    **options: Any,
) -> list[dict[str, Any]]:
    """The batches of some epochs."""
    sampler = ReproducibleSampler(
        **{"images": 10, "ratio": 1.2, "batch": 4, "seed": 5, **options},
        rank=rank,
        world_size=world_size,
        resumed=resumed,
    )
    data = ReproducibleDataset(dataset or Noise(), most_unreadable)
    loader = TrainingLoader(
        data, sampler, sampler.batch // world_size, num_workers=workers, persistent_workers=workers > 0
    )
    batches = []
    for epoch in range(first_epoch, first_epoch + epochs):
        sampler.set_epoch(epoch)
        batches += [*loader]
    return batches


def samples(batches: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [
        pair
        for batch in batches
        for pair in zip(batch["image"].tolist(), batch["noise"].tolist(), strict=True)
    ]


def test_samples_do_not_depend_on_workers() -> None:
    assert samples(load(epochs=2)) == samples(load(epochs=2, workers=2))


def test_processes_share_out_each_batch() -> None:
    whole = [samples([batch]) for batch in load(epochs=2)]
    for world_size in (2, 4):
        parts = [load(epochs=2, rank=rank, world_size=world_size) for rank in range(world_size)]
        shared = [samples([*batch]) for batch in zip(*parts, strict=True)]
        assert shared == whole


def test_epoch_visits_each_image_as_often_as_the_ratio_says_and_others_otherwise() -> None:
    first, second = (samples(load(first_epoch=epoch, images=6, ratio=2)) for epoch in (0, 1))
    images = [image for image, _ in first]
    assert sorted(images) == sorted([*range(6)] * 2)
    assert images != [image for image, _ in second]
    noise = [value for _, value in first + second]
    assert len(set(noise)) == len(noise)


def test_another_seed_is_another_order() -> None:
    assert samples(load()) != samples(load(seed=6))


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_run_goes_on_with_the_next_batch(workers: int) -> None:
    batches = load(epochs=3)
    for done in (1, 3, 4, 5):
        position = batches[done - 1]["position"]
        rest = load(3 - position["epoch"], workers, first_epoch=position["epoch"], resumed=position, seed=99)
        assert samples(rest) == samples(batches[done:])
        assert [batch["position"] for batch in rest] == [batch["position"] for batch in batches[done:]]


def test_resumed_run_with_another_batch_sees_what_is_left_of_the_epoch() -> None:
    position = load()[0]["position"]  # 4 of 12 samples
    rest = samples(load(batch=2, resumed=position))
    assert rest == samples(load())[4:]
    # and of other data the whole epoch, as its order is another one
    assert len(samples(load(ratio=2, resumed=position))) == 20


def test_global_random_numbers_of_the_main_process_are_left_alone() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    load(workers=0)
    load(workers=1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_no_epoch_no_samples() -> None:
    """BasicSR's prefetchers begin to iterate before there is an epoch."""
    loader = TrainingLoader(ReproducibleDataset(Noise(), 0), ReproducibleSampler(10, 1, 2), 2)
    assert list(loader) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_cannot_be_read_is_named_and_another_takes_its_place(
    workers: int, esc_log: list[str]
) -> None:
    batches = load(workers=workers, dataset=Noise(broken=(3,)))
    images = [image for image, _ in samples(batches)]
    assert len(images) == 12
    assert 3 not in images
    told = (
        "Training data: passed over data set, image 3, photo3 cannot be read or decoded (OSError: cut short)"
    )
    assert all(message == told for message in esc_log)
    assert len(esc_log) == 1
    assert images == [image for image, _ in samples(load(dataset=Noise(broken=(3,))))]
    sound = [image for image, _ in samples(load())]
    assert [ours for ours, theirs in zip(images, sound, strict=True) if theirs != 3] == [
        image for image in sound if image != 3
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_images_that_cannot_be_read_end_it(workers: int) -> None:
    many = {"images": 40, "ratio": 1, "epochs": 9, "workers": workers}
    load(**many, dataset=Noise(images=40, broken=(3, 5, 7)))  # each counts once
    told = r"4 images .* more than datasets\.train\.max_unreadable, 3\. The last: data set, i"
    with pytest.raises(UserError, match=told):
        load(**many, dataset=Noise(images=40, broken=(1, 3, 5, 7)))
    named = r"cannot be read:\n  data set, image \d, photo\d cannot be read or dec"
    with pytest.raises(UserError, match=named) as caught:
        load(workers=workers, dataset=Noise(broken=tuple(range(10))))
    assert "Traceback" not in str(caught.value)


_ENDED_BY_AN_ERROR = """
import torch
from esc_basicsr.data.reproducible import ReproducibleDataset, ReproducibleSampler, TrainingLoader

sampler = ReproducibleSampler(images=40, ratio=1, batch=4, seed=5, rank=0, world_size=1)
data = ReproducibleDataset([{"image": torch.zeros(1)}] * 40, most_unreadable=0)
loader = TrainingLoader(data, sampler, 4, num_workers=2, persistent_workers=PERSISTENT)
sampler.set_epoch(0)
held = iter(loader)
next(held)
if LOST:  # PyTorch's way of ending workers comes to nothing
    torch.utils.data.dataloader._MultiProcessingDataLoaderIter._shutdown_workers = lambda self: None
    loader._iterator = None
    del held
raise SystemExit(5)
"""


@pytest.mark.parametrize(("persistent", "lost"), [(False, False), (True, False), (False, True)])
def test_python_ends_although_an_epoch_was_left_in_the_middle(persistent: bool, lost: bool) -> None:
    """Its workers, which SIGTERM does not end, were else waited for, for ever."""
    script = _ENDED_BY_AN_ERROR.replace("PERSISTENT", str(persistent)).replace("LOST", str(lost))
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,  # which ends when the last process that holds the pipe has ended
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 5, ended.stderr
    assert lost or ended.stderr == ""


@pytest.fixture
def options() -> dict[str, Any]:
    if "Noise" not in DATASET_REGISTRY:
        DATASET_REGISTRY.register(Noise)
    return {
        **{"num_gpu": 0, "dist": False, "rank": 0, "world_size": 1, "manual_seed": 0},
        "train": {"total_iter": 12},
        "datasets": {
            "train": {
                **{"name": "noise", "type": "Noise", "phase": "train"},
                **{"batch_size_per_gpu": 2, "num_worker_per_gpu": 0, "max_unreadable": 10},
            }
        },
    }


@pytest.mark.parametrize(
    ("world_size", "per_gpu", "wanted", "expected"),
    [
        *[(1, 16, 64, (64, 4)), (2, 16, 64, (32, 2)), (4, 16, 64, (16, 1)), (8, 16, 64, (8, 1))],
        *[(1, 24, 64, (64, 3)), (3, 8, 6, (2, 1)), (4, 16, None, (16, 1))],
    ],
)
def test_global_batch_is_shared_out_in_as_few_passes_as_fit(
    options: dict[str, Any], world_size: int, per_gpu: int, wanted: int | None, expected: tuple[int, int]
) -> None:
    section = options["datasets"]["train"] | {"batch_size_per_gpu": per_gpu, "global_batch_size": wanted}
    options |= {"world_size": world_size, "dist": world_size > 1, "datasets": {"train": section}}
    assert batch_of_process(options) == expected


def test_global_batch_that_cannot_be_shared_evenly_is_refused(options: dict[str, Any]) -> None:
    options["datasets"]["train"]["global_batch_size"] = 64
    with pytest.raises(UserError, match=r"global_batch_size, 64, cannot be shared evenly by 3 processes"):
        batch_of_process(options | {"world_size": 3})


def test_resumed_run_with_another_batch_gets_all_its_iterations(options: dict[str, Any]) -> None:
    """BasicSR counts epochs from 0: with a smaller batch, of which an epoch has more, it ends too early."""
    loader, sampler, _, epochs, _ = create_train_val_dataloader(options, logger)
    assert (sampler.batches, epochs) == (5, 3)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        *_, last = itertools.islice(loader, 5 if epoch == 0 else 1)
    options["resume"] = {**last["position"], "iter": 6}
    options["datasets"]["train"]["batch_size_per_gpu"] = 1
    loader, sampler, _, epochs, _ = create_train_val_dataloader(options, logger)
    iterations = 6
    for epoch in range(1, epochs + 1):  # as train_pipeline does
        sampler.set_epoch(epoch)
        iterations += len([*loader])
    assert iterations >= 12


@pytest.mark.parametrize(
    ("seed", "is_drawn", "is_told"), [(0, False, False), (7, False, True), (7, True, False)]
)
def test_a_changed_seed_is_told_and_the_order_goes_on(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture, seed: int, is_drawn: bool, is_told: bool
) -> None:
    _, sampler, *_ = create_train_val_dataloader(options, logging.getLogger("test"))
    sampler.set_epoch(0)
    options["resume"] = {"iter": 1, **sampler.position(1)}
    options |= {"manual_seed": seed, "seed_is_drawn": is_drawn}
    _, sampler, *_ = create_train_val_dataloader(options, logging.getLogger("test"))
    assert sampler.seed == 0
    assert ("manual_seed was 0 and is 7" in caplog.text) == is_told


def test_set_smaller_than_a_batch_is_refused(options: dict[str, Any]) -> None:
    options["datasets"]["train"]["batch_size_per_gpu"] = 11
    with pytest.raises(UserError, match=r"an epoch has 10 samples, less than a batch of 11"):
        create_train_val_dataloader(options, logger)


def test_prefetching_does_not_hide_an_error(options: dict[str, Any]) -> None:
    """BasicSR's prefetch_mode: cpu waits for ever where its thread met an error."""
    section = options["datasets"]["train"]
    section |= {"num_worker_per_gpu": 1, "prefetch_mode": "cpu", "num_prefetch_queue": 2}
    loader, sampler, *_ = create_train_val_dataloader(options, logger)
    assert loader.prefetch_factor == 3
    loader.dataset.dataset = Noise(broken=tuple(range(10)))
    sampler.set_epoch(0)
    with pytest.raises(UserError, match="cut short"):
        list(loader)


class Signals(Noise):
    """What a worker would do on SIGTERM and on SIGINT, as numbers."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        handled = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)]
        blocked = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return {"image": index, "noise": 0.0, "safe": all(handled), "safe_while_starting": blocked}


def test_signals_are_left_to_the_main_process_from_a_workers_first_instant() -> None:
    """SLURM and terminals signal the whole group, and a spawned worker takes seconds to start."""
    batches = load(workers=1, dataset=Signals())
    assert all(batch["safe"].all() and batch["safe_while_starting"].all() for batch in batches)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


class Dying(Noise):
    def __getitem__(self, index: int) -> dict[str, Any]:
        os._exit(1)


def test_worker_that_dies_is_told_without_a_traceback() -> None:
    with pytest.raises(UserError, match=r"a process that loads training data died .*num_worker_per_gpu"):
        load(workers=1, dataset=Dying())


class ListsOfItsOwn:
    """As data sets of others are: two lists that belong together, and a fault, if asked for one."""

    def __init__(self, fault: str = "") -> None:
        self.paths = ["c.png", "a.png", "b.png"]
        self.labels = ["c", "a", "b"]
        self.fault = fault

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        if self.fault == "tuple":
            return torch.zeros(1), self.paths[index]
        if self.fault == "bug":
            return {"path": self.pahts[index]}  # type: ignore[attr-defined]
        return {"path": self.paths[index], "label": self.labels[index]}


def loader_of(dataset: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("basicsr.data.build_dataset", lambda section: dataset)
    section = {"name": "theirs", "batch_size_per_gpu": 3, "num_worker_per_gpu": 0, "type": "Theirs"}
    opt = {
        **{
            "datasets": {"train": section | {"max_unreadable": 10}},
            "train": {"total_iter": 1},
            "manual_seed": 0,
        },
        **{"rank": 0, "world_size": 1, "dist": False, "num_gpu": 0, "scale": 2},
    }
    loader, sampler, *_ = create_train_val_dataloader(opt, logger)
    sampler.set_epoch(0)
    return loader


def test_lists_of_others_are_not_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ListsOfItsOwn()
    (batch,) = loader_of(dataset, monkeypatch)
    assert dataset.paths == ["c.png", "a.png", "b.png"]
    assert [path.removesuffix(".png") for path in batch["path"]] == batch["label"]
    dataset.paths, dataset.labels = ["a.png", "b.png", "c.png"], ["a", "b", "c"]  # another machine's order
    (again,) = loader_of(dataset, monkeypatch)
    assert again["path"] == batch["path"]


def test_items_that_are_no_dict_are_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"image \d, \w\.png is a tuple; BasicSR's models take a dict"):
        next(iter(loader_of(ListsOfItsOwn("tuple"), monkeypatch)))


def test_a_fault_of_a_data_sets_own_comes_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"(?s)AttributeError: .*pahts.*Traceback.*line \d+, in __getitem__"):
        next(iter(loader_of(ListsOfItsOwn("bug"), monkeypatch)))
