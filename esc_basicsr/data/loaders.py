"""Loaders for BasicSR's training loop: training data that can be resumed, and validation sets."""

import importlib
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.reproducible import ReproducibleDataset, ReproducibleSampler, TrainingLoader

__all__ = ["batch_of_process", "create_train_val_dataloader"]


def batch_of_process(opt: Mapping[str, Any]) -> tuple[int, int]:
    """Return how one process trains on its part of a global batch.

    ``datasets.train.global_batch_size`` is shared out evenly, in passes of no more than
    ``batch_size_per_gpu`` samples on each GPU. Without it every GPU takes ``batch_size_per_gpu``, in
    ``train.accumulate`` passes.

    Returns:
        Samples, and passes through the network.

    Raises:
        UserError: ``global_batch_size`` is no multiple of the number of processes.
    """
    train = opt["datasets"]["train"]
    world_size = opt["world_size"]
    # without a launcher one process feeds all GPUs
    at_once = train["batch_size_per_gpu"] * (1 if opt["dist"] else max(1, opt["num_gpu"]))
    wanted = train.get("global_batch_size")
    if wanted is None:
        return at_once, opt["train"].get("accumulate", 1)
    if wanted % world_size:
        raise UserError(
            f"datasets.train.global_batch_size, {wanted}, cannot be shared evenly by {world_size} processes: "
            "start another number of them, or write a multiple."
        )
    share = wanted // world_size
    return share, math.ceil(share / at_once)


def create_train_val_dataloader(
    opt: dict[str, Any], log: logging.Logger
) -> tuple[TrainingLoader, ReproducibleSampler, list[Any], int, int]:
    """Make the loaders of BasicSR's train_pipeline, in place of BasicSR's own function of this name.

    Args:
        opt: All options; ``resume``, which `training.checkpoints.load_resume_state` puts in, says where in
            the data an interrupted training was.
        log: For what BasicSR's function logs.

    Returns:
        Training loader and its sampler, validation loaders, epochs, iterations.
    """
    data = importlib.import_module("basicsr.data")
    loaders = []
    for phase, section in opt["datasets"].items():
        if phase != "train":
            validation_set = data.build_dataset(section)
            loaders.append(
                data.build_dataloader(
                    validation_set, section, num_gpu=opt["num_gpu"], dist=opt["dist"], seed=opt["manual_seed"]
                )
            )
            log.info("Validation set %s: %d images.", section["name"], len(validation_set))
    section = opt["datasets"]["train"]
    batch, passes = batch_of_process(opt)
    resumed = opt.get("resume") or {}
    images = data.build_dataset(section)
    order = None
    if isinstance(paths := getattr(images, "paths", None), list) and len(paths) == len(images):
        # BasicSR lists a folder as the file system does, on each machine in another order.
        order = sorted(range(len(paths)), key=lambda index: str(paths[index]))
    dataset = ReproducibleDataset(images, section["max_unreadable"], order)
    sampler = ReproducibleSampler(
        len(dataset),
        section.get("dataset_enlarge_ratio", 1),
        batch * opt["world_size"],
        rank=opt["rank"],
        world_size=opt["world_size"],
        seed=_seed_of_all(opt),
        resumed=resumed if "samples" in resumed else None,
    )
    workers = section["num_worker_per_gpu"] * (1 if opt["dist"] else max(1, opt["num_gpu"]))
    queue = {}
    if workers:
        queue["persistent_workers"] = section.get("persistent_workers", False)
        if section.get("prefetch_mode") == "cpu":
            # BasicSR's thread for it waits for ever after an error, and shares the global random numbers.
            queue["prefetch_factor"] = 1 + section.get("num_prefetch_queue", 1)
    loader = TrainingLoader(
        dataset,
        sampler,
        batch,
        num_workers=workers,
        pin_memory=section.get("pin_memory", False),
        **queue,
    )
    iterations = int(opt["train"]["total_iter"])
    if not sampler.batches:
        raise UserError(
            f"datasets.train: an epoch has {sampler.samples} samples, less than a batch of {sampler.batch}. "
            "Lower the batch size or raise dataset_enlarge_ratio."
        )
    # Counted from where training goes on: with another batch size than before, epochs had another length.
    left = iterations - resumed.get("iter", 0) + sampler.begin(resumed.get("epoch", 0))
    epochs = resumed.get("epoch", 0) + math.ceil(left / sampler.batches)
    if sampler.seed != opt["manual_seed"] and not opt.get("seed_is_drawn"):
        log.warning(
            "manual_seed was %d and is %d: the order of the training data goes on by the state's. "
            "For another, start a new experiment.",
            *(sampler.seed, opt["manual_seed"]),
        )
    if resumed.get("samples", sampler.samples) != sampler.samples:
        log.warning(
            "The training data had %d samples an epoch and has %d now: the epoch is begun anew, so this is "
            "no exact resumption.",
            *(resumed["samples"], sampler.samples),
        )
    log.info(
        "Training set %s: %d images, %d samples an epoch.\n"
        "\tBatch: %d = %d processes × %d, in %d passes each.\n"
        "\tIterations: %d = %d epochs × %d.",
        *(section["name"], sampler.images, sampler.samples),
        *(sampler.batch, opt["world_size"], batch, passes),
        *(iterations, epochs, sampler.batches),
    )
    return loader, sampler, loaders, epochs, iterations


def _seed_of_all(opt: Mapping[str, Any]) -> int:
    """Return rank 0's seed: where the options have none, every process has drawn its own."""
    seeds = [opt["manual_seed"]]
    if opt["dist"]:
        dist.broadcast_object_list(seeds)
    return int(seeds[0])
