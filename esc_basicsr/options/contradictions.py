"""Options of a file that are sound each by itself and do not go together."""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from esc_basicsr.common.log import logger
from esc_basicsr.options.data_check import process_count
from esc_basicsr.options.kinds import COUNT, is_whole
from esc_basicsr.options.schema import (
    DATASETS,
    DEGRADING_MODELS,
    KNOWN_MODELS,
    LOADER,
    SECTIONS,
    TRAIN,
    lookup,
    sound,
)
from esc_basicsr.options.sections import has_ours

Problem = tuple[str, str]  # key, message


def contradictions(opt: Mapping[str, Any], is_train: bool, model: Any) -> Iterator[Problem]:
    """Find what does not go together; what goes together, but is odd, is logged as a warning.

    Args:
        opt: All options.
        is_train: Whether they are to be trained by.
        model: The class that ``model_type`` names; None if there is none.
    """
    if opt.get("model_type") in KNOWN_MODELS:
        yield from _of_the_scale(opt)
    val = sound(opt.get("val"), SECTIONS["val"])
    if val.get("save_img") is True and not is_train and "suffix" not in opt["val"]:
        yield "val.suffix", f"missing; expected {SECTIONS['val']['suffix'].kind.expected}."
    datasets = opt.get("datasets")
    first: dict[str, str] = {}
    for name, dataset in datasets.items() if isinstance(datasets, Mapping) else ():
        label = lookup(dataset, "name")
        if name != "train" and isinstance(label, str) and (other := first.setdefault(label, name)) != name:
            yield (
                f"datasets.{name}.name",
                f"got '{label}', as datasets.{other} has. Give each a name of its own.",
            )
        for key, message in _of_a_data_set(opt, dataset, name == "train"):
            yield f"datasets.{name}.{key}", message
    if is_train and isinstance(opt.get("train"), Mapping):
        yield from _of_the_schedule(opt)
        yield from _of_a_step(opt, model)
        if opt.get("model_type") in DEGRADING_MODELS and opt.get("high_order_degradation", True):
            yield from _of_degradations(opt)
    if is_train and lookup(opt, "logger.wandb.project") and lookup(opt, "logger.use_tb_logger") is not True:
        yield "logger.use_tb_logger", "expected true with wandb, which sends what TensorBoard logs."


def _of_the_scale(opt: Mapping[str, Any]) -> Iterator[Problem]:
    scale = opt.get("scale")
    for key in ("upscaling_factor", "upscale", "up_scale"):
        factor = lookup(opt, f"network_g.{key}")
        if factor is not None and factor != scale:
            yield f"network_g.{key}", f"got {factor}, but scale is {scale}. Make them equal."
    metrics = lookup(opt, "val.metrics")
    for name, metric in metrics.items() if isinstance(metrics, Mapping) else ():
        border = metric.get("crop_border") if isinstance(metric, Mapping) else None
        if lookup(metric, "type") == "calculate_niqe":  # which is published without a border
            continue
        if is_whole(border) and border != scale and scale != 1:
            logger.warning(
                "val.metrics.%s.crop_border is %s and scale is %s: published figures crop a border of scale "
                "pixels.",
                *(name, border, scale),
            )


def _of_a_data_set(opt: Mapping[str, Any], dataset: Any, is_training_set: bool) -> Iterator[Problem]:
    kind = str(dataset.get("type")) if isinstance(dataset, Mapping) else ""
    values = sound(dataset, {**LOADER, **DATASETS.get(kind, {})})
    if is_training_set and values.get("prefetch_mode") == "cuda" and values.get("pin_memory") is False:
        yield "pin_memory", "expected true with prefetch_mode: cuda."
    model = opt.get("model_type")
    if model in KNOWN_MODELS and model != "ESCModel" and values.get("lq_on_device") is True:
        yield "lq_on_device", f"got true, but {model} cannot make LR: with model_type: ESCModel it can."
    is_folder = lookup(dataset, "io_backend.type") == "disk"
    if kind == "RealESRGANDataset" and is_folder and dataset.get("meta_info") is None:
        yield "meta_info", "missing; expected a file that lists the images to take of dataroot_gt."
    if kind == "DegradedDataset":
        if (values.get("noise_sigma") is None) == (values.get("jpeg_quality") is None):
            yield "noise_sigma", "expected either this or jpeg_quality."
        elif values.get("color") == "y" and values.get("noise_sigma") is not None:
            yield "color", "is for jpeg_quality alone. Leave it out."
        if opt.get("scale") not in (None, 1):
            yield "type", f"got 'DegradedDataset', which is for scale 1, and scale is {opt['scale']}."
        quality = values.get("jpeg_quality")
        if isinstance(quality, list) and not is_training_set:
            yield "jpeg_quality", f"got {quality}, expected one quality: it is drawn for training alone."
        elif isinstance(quality, list) and quality[0] > quality[1]:
            yield "jpeg_quality", f"got {quality}, expected the least first."
    mean: Any = values.get("mean")
    std: Any = values.get("std")
    channels = 1 if values.get("color") == "y" else 3
    if (mean is None) != (std is None):
        yield "mean" if mean is None else "std", "missing; mean and std go together."
    elif mean is not None and (not {len(mean), len(std)} <= {1, channels} or 0 in std):
        yield "mean", f"got {mean}, and std {std}, which divides; expected {channels} numbers each, or 1."
    size, scale = values.get("gt_size"), opt.get("scale")
    if is_training_set and size and COUNT.accepts(scale) and size % scale:
        yield "gt_size", f"got {size}, expected a multiple of scale, {scale}."


def _of_the_schedule(opt: Mapping[str, Any]) -> Iterator[Problem]:
    train = sound(opt["train"], SECTIONS["train"])
    if opt.get("model_type") in KNOWN_MODELS and not (train.get("pixel_opt") or train.get("perceptual_opt")):
        yield "train.pixel_opt", "missing; expected a section that names the loss, or perceptual_opt."
    total = train.get("total_iter")
    if total is None:
        return
    if train.get("warmup_iter", -1) > total:
        logger.warning(
            "train.warmup_iter is %s and total_iter is %s: the learning rate never gets as high as lr.",
            *(train["warmup_iter"], total),
        )
    where = "train.scheduler"
    scheduler = sound(train.get("scheduler"), SECTIONS[where])
    milestones = scheduler.get("milestones")
    if milestones and min(milestones) > total:
        logger.warning(
            "%s.milestones start at %s and total_iter is %s: the learning rate is never lowered.",
            *(where, min(milestones), total),
        )
    if "periods" in scheduler and sum(scheduler["periods"]) < total - 1:
        yield (
            f"{where}.periods",
            f"got {scheduler['periods']}, {sum(scheduler['periods'])} iterations in all, "
            f"less than total_iter, {total}. Make them cover the training.",
        )


def _devices_of_process(opt: Mapping[str, Any]) -> int:
    """Count the GPUs that one process feeds: all, unless a launcher starts one for each."""
    wanted = opt.get("num_gpu")
    devices = torch.cuda.device_count() if wanted == "auto" else wanted
    is_launched = "WORLD_SIZE" in os.environ or "SLURM_PROCID" in os.environ
    return devices if is_whole(devices) and devices > 1 and not is_launched else 1


def _share(opt: Mapping[str, Any]) -> tuple[int, int] | None:
    """Count the samples of a step of one process, and the pieces that they go through the network in.

    None where the options that say so are not sound, which is reported elsewhere.
    """
    data = sound(lookup(opt, "datasets.train"), LOADER)
    pieces = sound(opt["train"], SECTIONS["train"]).get("accumulate")
    if "batch_size_per_gpu" not in data or pieces is None:
        return None
    at_once: int = data["batch_size_per_gpu"] * _devices_of_process(opt)
    whole = data.get("global_batch_size")
    if whole is None:
        return at_once, pieces
    share = whole // process_count(opt)
    return share, math.ceil(share / at_once)


def _of_degradations(opt: Mapping[str, Any]) -> Iterator[Problem]:
    values = sound(opt, SECTIONS[""])
    pairs, share = values.get("queue_size"), _share(opt)
    if pairs and share and share[0] and pairs % share[0]:
        yield "queue_size", f"got {pairs}, expected a multiple of the {share[0]} samples of a step."
    size, scale = values.get("gt_size"), values.get("scale")
    if size and scale and size % scale:
        yield "gt_size", f"got {size}, expected a multiple of scale, {scale}."
    kind = lookup(opt, "datasets.train.type")
    if kind in DATASETS and kind != "RealESRGANDataset":
        yield (
            "datasets.train.type",
            f"got '{kind}', expected RealESRGANDataset, which gives the kernels that images are blurred by.",
        )


def _of_a_step(opt: Mapping[str, Any], model: Any) -> Iterator[Problem]:
    """Find what accumulation, half precision and compilation do not go with."""
    train = sound(opt["train"], SECTIONS["train"])
    devices = _devices_of_process(opt)
    if model is not None and not has_ours(model, "optimize_parameters"):
        keys = ("amp", "accumulate", "compile", "clip_grad_norm", "max_skipped")
        asked = [f"train.{key}" for key in keys if train.get(key) not in (None, False, TRAIN[key].default)]
        if lookup(opt, "datasets.train.global_batch_size") is not None:
            asked.append("datasets.train.global_batch_size")
        for where in asked:
            message = "takes its steps by itself, in float32 and one piece, and skips none. Leave it out."
            yield where, f"{opt['model_type']} {message}"
        return
    for key in ("amp", "compile"):
        if not train.get(key):
            continue
        if opt.get("cpu_kernels") is True and train[key] != "bf16":
            reason = (
                "does not go with cpu_kernels, which compute in float32 or bf16, uncompiled. Leave one out."
            )
            yield f"train.{key}", reason
        # Without a launcher several GPUs are served by threads, which autocast and compile do not suit.
        if devices > 1:
            yield (
                f"train.{key}",
                f"needs a process for each GPU, and num_gpu is {opt['num_gpu']} ({devices} GPUs) in one "
                "process. Start it by torchrun with --launcher pytorch, or write num_gpu: 1.",
            )
    where, pieces = "train.accumulate", train.get("accumulate", TRAIN["accumulate"].default)
    if lookup(opt, "datasets.train.global_batch_size") is not None:
        if pieces != 1:
            yield where, "not with datasets.train.global_batch_size, which chooses it. Leave one out."
            return
        where = "datasets.train.global_batch_size"
    elif pieces == 1:
        return
    batch = lookup(opt, "datasets.train.batch_size_per_gpu")
    if is_whole(batch) and batch % pieces:
        yield (
            where,
            f"got {pieces}, expected a divisor of datasets.train.batch_size_per_gpu, {batch}, which is "
            "worked through in that many equal pieces.",
        )
    # A piece's loss is weighed by its share of the batch, which is right for means over images alone.
    for key, value in (
        ("train.pixel_opt.reduction", "sum"),
        ("train.ldl_opt.reduction", "sum"),
        ("train.perceptual_opt.criterion", "fro"),
    ):
        if lookup(opt, key) == value:
            yield key, f"got '{value}', which is no mean over images: {where} would change it. Leave one out."
    if (_share(opt) or (0, 1))[1] == 1:
        return
    if "ESRGANModel" in (cls.__name__ for cls in getattr(model, "__mro__", ())):
        yield where, "ESRGANModel compares with the mean of a whole batch, not of pieces. Leave it out."
    if lookup(opt, "network_d.type") == "VGGStyleDiscriminator":
        yield where, "network_d normalises over a whole batch, not pieces. Leave it out, or write another."
