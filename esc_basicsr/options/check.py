"""Checking an option file before anything is built: every mistake at once, each with its key and a remedy.

What stock BasicSR 1.4.2 does with a mistake: a mistyped key is ignored or ends in a KeyError, a number that
YAML reads as text in a TypeError, a missing folder in a FileNotFoundError, each after everything before it
was set up, and a training set smaller than a batch trains for zero iterations without a word.
"""

import inspect
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from esc_basicsr.archs.variants import VARIANTS
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import is_file
from esc_basicsr.common.log import logger
from esc_basicsr.common.suggestion import hint, nearest
from esc_basicsr.options import schema
from esc_basicsr.options.data_check import GUIDE, batch_problems, data_problems, expand
from esc_basicsr.options.kinds import (
    ANYTHING,
    BOOL,
    COUNT,
    INTEGER,
    NUMBER,
    SECTION,
    TEXT,
    Kind,
    is_number,
    is_whole,
)
from esc_basicsr.options.schema import Option, required_keys
from esc_basicsr.weights.fit import check_fit
from esc_basicsr.weights.infer import infer_network_options
from esc_basicsr.weights.read import is_safetensors, read_weights
from esc_basicsr.weights.shipped import weights_file

__all__ = ["check_options"]

_ANNOTATED: dict[Any, Kind] = {
    **{bool: BOOL, int: INTEGER, float: NUMBER, str: TEXT},
    **{"bool": BOOL, "int": INTEGER, "float": NUMBER, "str": TEXT},
}
# A parameter that has a number as default may take lists and more, but hardly a number as text.
_NO_NUMBER_AS_TEXT = Kind("a number", lambda value: _number_for(value, NUMBER) is None)

_REPORTED = 30  # problems
_LONGEST = 2000  # characters of one, most of them from the file

_FOREIGN = "If another package provides it, that package must be imported first."


def check_options(opt: Mapping[str, Any], path: str | Path, is_train: bool, resumes: bool = False) -> None:
    """Raise one error that lists everything found wrong in the options of a file.

    Args:
        opt: What `load_options` gave.
        path: Their file, to be named in the message.
        is_train: Whether they are to be trained by; else tested by.
        resumes: Whether training goes on from a state of its own; what it started from is not needed then.

    Raises:
        UserError: Unknown or missing keys, values that do not fit or contradict one another, data that
            does not exist.
    """
    check = _Check(opt, is_train, resumes)
    check.run()
    if check.problems:
        count = "1 problem" if len(check.problems) == 1 else f"{len(check.problems)} problems"
        problems = [_shortened(problem).replace("\n", "\n    ") for problem in check.problems[:_REPORTED]]
        if len(check.problems) > _REPORTED:
            problems.append(f"... and {len(check.problems) - _REPORTED} more")
        lines = "\n  ".join([f"{path}: {count}", *problems])
        raise UserError("\n".join([lines, *check.notes]))


class _Check:
    """One pass over the options, which collects problems."""

    def __init__(self, opt: Mapping[str, Any], is_train: bool, resumes: bool) -> None:
        self.opt = opt
        self.is_train = is_train
        self.resumes = resumes
        self.problems: list[str] = []
        self.notes: dict[str, None] = {}  # written once, after the problems, in this order
        self.network_g: torch.nn.Module | None = None  # on the meta device, if sound and of this package
        # Only these models' keys are all known.
        self.is_known_model = opt.get("model_type") in schema.KNOWN_MODELS
        # Each process of a launcher takes one GPU, whatever num_gpu is.
        self.is_launched = "WORLD_SIZE" in os.environ or "SLURM_PROCID" in os.environ

    def run(self) -> None:
        self.check_top_level()
        for name in self.opt:
            if str(name).startswith("network_"):
                self.check_network(str(name))
        self.check_path()
        if self.is_train:
            self.check_train()
            self.check_logger()
        self.check_val()
        self.check_section("dist_params", schema.DIST_PARAMS)
        self.check_datasets()

    # What every section needs

    def add(self, where: str, message: str) -> None:
        self.problems.append(f"{where}: {message}")

    def note_paths(self) -> None:
        self.notes[f"Relative paths start at the working directory, {Path.cwd()}."] = None

    def section(self, where: str) -> Mapping[str, Any]:
        """Return the section at ``where``; empty if it is none, which is reported with its parent."""
        return self.find(where) or {}

    def has_section(self, where: str) -> bool:
        return self.find(where) is not None

    def find(self, where: str) -> Mapping[str, Any] | None:
        value: Any = self.opt
        while where and isinstance(value, Mapping):
            # A user's name, as of a data set or a metric, may have dots of its own.
            names = [str(key) for key in value if f"{where}.".startswith(f"{key}.")]
            name = max(names, key=len, default=where)
            value, where = value.get(name), where[len(name) + 1 :]
        return value if isinstance(value, Mapping) else None

    def check_keys(
        self,
        where: str,
        kinds: Mapping[str, Kind],
        required: Iterable[str] = (),
        open_ended: bool = False,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """Report keys of a section that are unknown (unless ``open_ended``), missing, or hold a misfit."""
        section = self.section(where) if given is None else given
        prefix = f"{where}." if where else ""
        meant = set()
        for key, value in section.items():
            if key in kinds:
                self.check_value(f"{prefix}{key}", value, kinds[key])
            elif not open_ended:
                meant.add(nearest(key, kinds))
                declared = schema.SECTIONS.get(where, {}).get(key)
                is_escs = declared is not None and declared.model == "ESCModel"
                remedy = "With model_type: ESCModel it is known." if is_escs else hint(key, kinds)
                self.add(f"{prefix}{key}", f"unknown key. {remedy}".strip())
        for key in required:
            if key not in section and key not in meant:
                self.add(f"{prefix}{key}", f"missing; expected {kinds[key].expected}.")

    def check_section(
        self,
        where: str,
        table: Mapping[str, Option],
        *required: str,
        open_ended: bool = False,
        is_train: bool | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """Report what is wrong with the keys of a section by what is declared of them.

        Args:
            where: The section.
            table: Its keys.
            required: Keys that must be given besides those that are declared so.
            open_ended: Whether there may be others.
            is_train: Whether it is one to train by; by default, whether the file is.
            given: What is there instead of the section at ``where``.
        """
        models = ("", self.opt.get("model_type"))
        kinds = {key: option.kind for key, option in table.items() if option.model in models}
        is_train = self.is_train if is_train is None else is_train
        needed = [*required_keys(table, is_train, self.is_known_model), *required]
        self.check_keys(where, kinds, needed, open_ended, given)

    def check_value(self, where: str, value: Any, kind: Kind) -> None:
        if kind.accepts(value):
            return
        number = _number_for(value, kind)
        remedy = "" if number is None else f" {_why_text(value)}: write {number}."
        self.add(where, f"got {_shown(value)}, expected {kind.expected}.{remedy}")

    def check_call(
        self,
        where: str,
        function: Callable[..., Any],
        supplied: Sequence[str] = (),
        declared: Mapping[str, Option] | None = None,
        strict: bool = False,
    ) -> None:
        """Compare a section with the parameters of the function or class that will be called with it.

        Args:
            where: The section; its ``type`` has been looked up already.
            function: What ``type`` stands for.
            supplied: Parameters that the caller gives.
            declared: What is known better than from the signature.
            strict: Whether a ``**kwargs`` does not excuse unknown keys, as it only swallows them.
        """
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return
        named = [
            parameter
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.name not in supplied
        ]
        open_ended = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
        table = {parameter.name: _kind_of(parameter) for parameter in named}
        better = {name: option.kind for name, option in (declared or {}).items()}
        table |= {name: kind for name, kind in better.items() if name in table or open_ended}
        required = [parameter.name for parameter in named if parameter.default is parameter.empty]
        self.check_keys(where, {"type": TEXT, **table}, required, open_ended and not strict)

    def look_up(self, where: str, names: Iterable[str], what: str, remedy: str = "") -> str | None:
        """Return the section's ``type`` if it is among ``names``; else report it."""
        section = self.section(where)
        names = list(names)
        name = section.get("type")
        if name in names:
            return str(name)
        if "type" not in section:
            self.add(f"{where}.type", f"missing; expected the name of {what}.")
        else:
            near = hint(name, names)
            self.add(
                f"{where}.type", " ".join(f"got {_shown(name)}, no known {what}. {near} {remedy}".split())
            )
        return None

    def look_up_registered(self, where: str, registry: Any, what: str) -> Any:
        """Find what the section's ``type`` names in a registry of BasicSR; None, and reported, if nothing."""
        name = self.look_up(where, registry.keys(), what, _FOREIGN)
        return None if name is None else registry.get(name)

    def try_to_build(self, where: str, cls: type, problems_before: int) -> Any:
        """Make one of this package's own classes, whose constructors raise ValueError on what does not fit.

        Returns:
            It, on the meta device; None if it is not made.
        """
        if not cls.__module__.startswith("esc_basicsr.") or len(self.problems) > problems_before:
            return None
        options = {key: value for key, value in self.section(where).items() if key != "type"}
        for key, value in options.items():
            if is_whole(value) and value > schema.LARGEST_SIZE:
                self.add(f"{where}.{key}", f"got {value}, expected {schema.LARGEST_SIZE:,} at most.")
                return None
        blocks = math.prod(options.get(key, 5) for key in ("n_blocks", "conv_blocks"))
        if blocks > schema.MOST_BLOCKS:
            self.add(where, f"got {blocks} blocks in all, expected {schema.MOST_BLOCKS:,} at most.")
            return None
        try:
            with torch.device("meta"):  # takes no memory, and no random numbers from the run
                return cls(**options)
        except (ArithmeticError, RuntimeError, TypeError, UserError, ValueError) as error:
            self.add(where, str(error).partition("\n")[0])
            return None

    # The sections

    def check_top_level(self) -> None:
        from basicsr.models import MODEL_REGISTRY

        model_type = self.opt.get("model_type")
        is_registered = isinstance(model_type, str) and model_type in MODEL_REGISTRY
        # A mistyped model_type should not hide the rest.
        open_ended = is_registered and not self.is_known_model
        self.check_section("", schema.TOP_LEVEL, open_ended=open_ended)
        if isinstance(model_type, str) and not is_registered:
            near = hint(model_type, MODEL_REGISTRY.keys())
            self.add("model_type", " ".join(f"got '{model_type}', no known model. {near} {_FOREIGN}".split()))
        self.check_gpus()

    def check_gpus(self) -> None:
        wanted, here = self.opt.get("num_gpu"), torch.cuda.device_count()
        if is_whole(wanted) and wanted > here and (here == 0 or not self.is_launched):
            gpus = "1 GPU" if here == 1 else f"{here} GPUs"
            self.add("num_gpu", f"got {wanted}, but this machine has {gpus}. Write auto, or 0 for the CPU.")

    def check_network(self, where: str) -> None:
        from basicsr.archs import ARCH_REGISTRY

        if not self.has_section(where):
            return
        before = len(self.problems)
        name = self.section(where).get("type")
        variant = _variant_for(name)
        if variant is not None and name not in ARCH_REGISTRY:
            self.add(f"{where}.type", f"got '{name}', a variant: write {_how_to_write(variant)}.")
            return
        network = self.look_up_registered(where, ARCH_REGISTRY, "network")
        if network is None:
            return
        self.check_call(where, network)
        built = self.try_to_build(where, network, before)
        if where == "network_g" and self.is_known_model:
            self.network_g = built
            scale = self.opt.get("scale")
            for key in ("upscaling_factor", "upscale", "up_scale"):
                factor = self.section(where).get(key)
                if factor is not None and factor != scale:
                    self.add(
                        f"{where}.{key}",
                        f"got {_shown(factor)}, but scale is {_shown(scale)}. Make them equal.",
                    )

    def check_path(self) -> None:
        where = "path"
        self.check_section(where, schema.PATH, open_ended=not self.is_known_model)
        section = self.section(where)
        resumes = self.is_train and (self.resumes or section.get("resume_state") is not None)
        for key, value in section.items():
            is_weights = str(key).startswith("pretrain_network") and not resumes
            if not isinstance(value, str) or not (is_weights or (key == "resume_state" and self.is_train)):
                continue
            file = weights_file(value) if is_weights else expand(value)
            if not is_file(file):
                what = "checkpoint" if is_weights else "training state"
                remedy = (
                    "Train what it comes from first, or give another."
                    if is_weights
                    else "Give another, or ~."
                )
                self.add(f"{where}.{key}", f"there is no {what} '{value}'. {remedy}")
                self.note_paths()
            elif is_weights and self.opt.get("model_type") == "SRModel" and is_safetensors(file):
                self.add(
                    f"{where}.{key}",
                    f"{value} is a .safetensors file, and SRModel reads .pth alone. "
                    "With model_type: ESCModel it is read.",
                )
            elif key == "pretrain_network_g" and self.network_g is not None and is_weights:
                self.check_weights(f"{where}.{key}", file, self.network_g)

    def check_weights(self, where: str, file: Path, network: torch.nn.Module) -> None:
        section = self.section("path")
        key = section.get("param_key_g", "params")
        if not schema.PATH["param_key_g"].kind.accepts(key):
            return
        decay = self.section("train").get("ema_decay", 0)
        has_average = self.is_train and is_number(decay) and decay > 0
        try:
            # SRModel loads the average's network, too.
            for param_key in {key: None, **({"params_ema": None} if has_average else {})}:
                weights = read_weights(file, param_key)
                if section.get("strict_load_g", True):
                    check_fit(network, weights, file)
        except UserError as error:
            self.add(where, str(error))
            return
        scale, own_scale = (
            (infer_network_options(state) or {}).get("upscaling_factor")
            for state in (weights, network.state_dict())
        )
        if scale != own_scale and section.get("strict_load_g", True) and self.opt["model_type"] == "SRModel":
            self.add(
                where,
                f"{file} is of scale ×{scale}, network_g of ×{own_scale}, and SRModel does not convert it. "
                "With model_type: ESCModel it is converted.",
            )

    def check_train(self) -> None:
        where = "train"
        if not self.has_section(where):
            return
        self.check_section(where, schema.TRAIN, open_ended=not self.is_known_model)
        warmup, total = (self.section(where).get(key) for key in ("warmup_iter", "total_iter"))
        if is_number(warmup) and is_number(total) and warmup > total:
            logger.warning(
                "%s.warmup_iter is %s and total_iter is %s: the learning rate never gets as high as lr.",
                *(where, warmup, total),
            )
        self.check_optimizer()
        self.check_scheduler()
        self.check_losses()
        if self.opt.get("model_type") == "ESCModel":
            self.check_accumulation()
            self.check_single_device()
            self.check_kernels()

    def check_accumulation(self) -> None:
        where = "train.accumulate"
        pieces = self.section("train").get("accumulate", 1)
        data = self.section("datasets.train")
        wanted = data.get("global_batch_size")
        if wanted is not None:
            if pieces != 1:
                self.add(where, "not with datasets.train.global_batch_size, which chooses it. Leave one out.")
                return
            where = "datasets.train.global_batch_size"
        elif not COUNT.accepts(pieces) or pieces == 1:
            return
        batch = data.get("batch_size_per_gpu")
        if wanted is None and is_whole(batch) and batch % pieces:
            self.add(
                where,
                f"got {pieces}, expected a divisor of datasets.train.batch_size_per_gpu, {batch}, which is "
                "worked through in that many equal pieces.",
            )
        # A piece's loss is weighed by its share of the batch, which is right for means over images alone.
        for key, value in (("pixel_opt.reduction", "sum"), ("perceptual_opt.criterion", "fro")):
            name, option = key.split(".")
            if self.section(f"train.{name}").get(option) == value:
                self.add(
                    f"train.{key}",
                    f"got '{value}', which is no mean over images: {where} would change it. Leave one out.",
                )

    def check_kernels(self) -> None:
        for key in ("amp", "compile"):
            if self.opt.get("cpu_kernels") is True and self.section("train").get(key):
                self.add(
                    f"train.{key}", "does not go with cpu_kernels, which are for float32. Leave one out."
                )

    def check_single_device(self) -> None:
        """Without a launcher several GPUs are served by threads, which autocast and compile do not suit."""
        wanted = self.opt.get("num_gpu")
        devices = torch.cuda.device_count() if wanted == "auto" else wanted
        if not is_whole(devices) or devices < 2 or self.is_launched:
            return
        for key in ("amp", "compile"):
            if self.section("train").get(key):
                self.add(
                    f"train.{key}",
                    f"needs a process for each GPU, and num_gpu is {wanted} ({devices} GPUs) in one process. "
                    "Start it by torchrun with --launcher pytorch, or write num_gpu: 1.",
                )

    def check_optimizer(self) -> None:
        where = "train.optim_g"
        if not self.has_section(where):
            return
        model_type = str(self.opt.get("model_type"))
        # Another model may know more optimizers.
        names = schema.OPTIMIZERS.get(model_type)
        name = self.section(where).get("type")
        if names is not None:
            others = [other for other, optimizers in schema.OPTIMIZERS.items() if name in optimizers]
            remedy = f"With model_type: {others[0]} it is." if others else ""
            name = self.look_up(where, names, f"optimizer of {model_type}", remedy)
        optimizer = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}.get(str(name))
        if optimizer is not None:
            self.check_call(where, optimizer, ["params"], schema.OPTIM)
            if "lr" not in self.section(where):
                self.add(f"{where}.lr", f"missing; expected {schema.OPTIM['lr'].kind.expected}.")

    def check_scheduler(self) -> None:
        from basicsr.models import lr_scheduler

        where = "train.scheduler"
        section = self.section(where)
        if not self.has_section(where):
            return
        name = self.look_up(where, schema.SCHEDULERS, "scheduler of BasicSR")
        if name is None:
            return
        before = len(self.problems)
        self.check_call(
            where, getattr(lr_scheduler, schema.SCHEDULERS[name]), ["optimizer"], schema.SCHEDULER
        )
        if len(self.problems) > before:
            return
        milestones = section.get("milestones", [])
        total = self.section("train").get("total_iter")
        if milestones and is_number(total) and min(milestones) > total:
            logger.warning(
                "%s.milestones start at %s and total_iter is %s: the learning rate is never lowered.",
                *(where, min(milestones), total),
            )
        if any(later <= earlier for earlier, later in itertools.pairwise(milestones)):
            self.add(f"{where}.milestones", f"got {milestones}, expected increasing numbers of iterations.")
        counted = "periods" if "periods" in section else "restarts"
        counts = len(section.get(counted, [0])), len(section.get("restart_weights", [1]))
        if counts[0] != counts[1]:
            self.add(
                f"{where}.restart_weights",
                f"got {counts[1]} of them for {counts[0]} {counted}; expected as many.",
            )
        if "periods" in section and is_number(total) and sum(section["periods"]) < total - 1:
            self.add(
                f"{where}.periods",
                f"got {section['periods']}, {sum(section['periods'])} iterations in all, "
                f"less than total_iter, {total}. Make them cover the training.",
            )

    def check_losses(self) -> None:
        from basicsr.losses import LOSS_REGISTRY

        names = ("pixel_opt", "perceptual_opt")
        for name in names:
            where = f"train.{name}"
            if not self.section(where):
                continue
            before = len(self.problems)
            loss = self.look_up_registered(where, LOSS_REGISTRY, "loss")
            if loss is not None:
                self.check_call(where, loss, declared=schema.SECTIONS[where])
                self.try_to_build(where, loss, before)
        if self.is_known_model and not any(self.section("train").get(name) for name in names):
            self.add("train.pixel_opt", "missing; expected a section that names the loss, or perceptual_opt.")

    def check_val(self) -> None:
        from basicsr.metrics import METRIC_REGISTRY

        where = "val"
        section = self.section(where)
        if not self.has_section(where):
            if not self.is_train and "val" in self.opt:
                self.add(where, f"got {_shown(self.opt['val'])}, expected {SECTION.expected}.")
            return
        required = ["suffix"] if section.get("save_img") is True and not self.is_train else []
        self.check_section(where, schema.VAL, *required, open_ended=not self.is_known_model)
        for name, metric in self.section("val.metrics").items():
            metric_where = f"val.metrics.{name}"
            if not isinstance(metric, Mapping):
                self.add(metric_where, f"got {_shown(metric)}, expected {SECTION.expected}.")
                continue
            function = self.look_up_registered(metric_where, METRIC_REGISTRY, "metric")
            if function is None:
                continue
            # BasicSR's own metrics take **kwargs and use none of them.
            strict = function.__module__.startswith("basicsr.")
            self.check_call(metric_where, function, ["img", "img2"], schema.METRIC, strict)
            border, scale = metric.get("crop_border"), self.opt.get("scale")
            if is_whole(border) and self.is_known_model and border != scale:
                logger.warning(
                    "%s.crop_border is %s and scale is %s: published figures crop a border of scale pixels.",
                    *(metric_where, border, scale),
                )

    def check_logger(self) -> None:
        where = "logger"
        section = self.section(where)
        if not self.has_section(where):
            return
        self.check_section(where, schema.LOGGER, open_ended=not self.is_known_model)
        self.check_section("logger.wandb", schema.WANDB)
        if self.section("logger.wandb").get("project") and section.get("use_tb_logger") is not True:
            self.add("logger.use_tb_logger", "expected true with wandb, which sends what TensorBoard logs.")

    def check_datasets(self) -> None:
        phases = ("train", "val") if self.is_train else ("test", "val")
        datasets = self.section("datasets")
        for name, dataset in datasets.items():
            where = f"datasets.{name}"
            phase = str(name).split("_")[0]
            if phase not in phases or (phase == "train" and name != "train"):
                expected = "train, val or val_NAME" if self.is_train else "test_NAME or val_NAME"
                self.add(where, f"unknown phase; expected {expected}. {hint(name, phases)}".strip())
            elif not isinstance(dataset, Mapping):
                self.add(where, f"got {_shown(dataset)}, expected {SECTION.expected}.")
            else:
                self.check_dataset(where, dataset, phase)
        if not self.has_section("datasets"):
            return
        if self.is_train and "train" not in datasets:
            self.add("datasets.train", f"missing; expected {SECTION.expected}.")
        elif not datasets:
            self.add("datasets", "missing; expected at least one data set, such as test_1.")

    def check_dataset(self, where: str, dataset: Mapping[str, Any], phase: str) -> None:
        from basicsr.data import DATASET_REGISTRY

        is_training_set = phase == "train"
        if self.look_up_registered(where, DATASET_REGISTRY, "data set") is None:
            return
        kind = dataset["type"]
        table = {**schema.LOADER, **schema.DATASETS.get(kind, {})}
        self.check_section(where, table, open_ended=kind not in schema.DATASETS, is_train=is_training_set)
        if isinstance(dataset.get("io_backend"), Mapping):
            backend = self.look_up(f"{where}.io_backend", schema.IO_BACKENDS, "way to read images")
            self.check_keys(f"{where}.io_backend", {"type": TEXT}, open_ended=backend == "memcached")
        sources = dataset.get("sources") if kind == "DFLIPDataset" else None
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            self.check_source(f"{where}.sources[{index}]", source)
        prefetch = dataset.get("prefetch_mode") if is_training_set else None
        if prefetch == "cuda" and dataset.get("pin_memory") is not True:
            self.add(f"{where}.pin_memory", "expected true with prefetch_mode: cuda.")
        if dataset.get("global_batch_size") is not None and self.opt.get("model_type") == "SRModel":
            self.add(
                f"{where}.global_batch_size",
                "SRModel takes a batch in one pass only: with model_type: ESCModel it is known.",
            )
        if dataset.get("lq_on_device") is True and self.opt.get("model_type") == "SRModel":
            self.add(
                f"{where}.lq_on_device",
                "got true, but SRModel cannot make LR: with model_type: ESCModel it can.",
            )
        size, scale = dataset.get("gt_size"), self.opt.get("scale")
        if is_training_set and is_whole(size) and is_whole(scale) and scale > 0 and size % scale:
            self.add(f"{where}.gt_size", f"got {size}, expected a multiple of scale, {scale}.")
        if kind in schema.DATASETS:
            problems = [*data_problems(dataset, scale, is_training_set)]
            if problems:
                self.note_paths()
                self.notes[GUIDE] = None
            elif is_training_set:
                problems += batch_problems(dataset, self.opt)
            for key, message in problems:
                self.add(f"{where}.{key}", message)

    def check_source(self, where: str, source: Any) -> None:
        if isinstance(source, Mapping):
            self.check_section(where, schema.SOURCE, given=source)
        else:
            self.add(where, f"got {_shown(source)}, expected {SECTION.expected}.")


def _kind_of(parameter: inspect.Parameter) -> Kind:
    """Tell what a parameter accepts, as far as its annotation or its default say for certain."""
    kind = _ANNOTATED.get(parameter.annotation) if isinstance(parameter.annotation, (type, str)) else None
    if kind is not None:
        return kind
    return _NO_NUMBER_AS_TEXT if is_number(parameter.default) else ANYTHING


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _variant_for(name: Any) -> str | None:
    """Find the published variant that ``name`` is, however it is spelled: ESC-light, esc_light, ESCLight."""
    spelled = {re.sub("[-_ ]", "", variant).lower(): variant for variant in VARIANTS}
    return spelled.get(re.sub("[-_ ]", "", str(name)).lower())


def _how_to_write(variant: str) -> str:
    """Write the ``type`` of a variant, and the options that make it differ from the type's defaults."""
    from basicsr.archs import ARCH_REGISTRY

    options = VARIANTS[variant]
    defaults = inspect.signature(ARCH_REGISTRY.get(options["type"])).parameters
    others = [
        f"{key}: {value}"
        for key, value in options.items()
        if key != "type" and defaults[key].default != value
    ]
    return f"type: {options['type']}" + (f", with {', '.join(others)}" if others else "")


def _number_for(value: Any, kind: Kind) -> str | None:
    """Write the number that the text ``value`` shows, if ``kind`` accepts it; else None."""
    if not isinstance(value, str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if number == number // 1 and kind.accepts(int(number)):
        return str(int(number))
    if not kind.accepts(number):
        return None
    text = value.strip().lower()
    if not 1 <= abs(float(text.partition("e")[0])) < 10:
        text = repr(number)
    mantissa, e, exponent = text.partition("e")
    if "." not in mantissa:
        mantissa += ".0"
    if e and exponent[0] not in "+-":
        exponent = f"+{exponent}"
    return f"{mantissa}{e}{exponent}"


def _why_text(value: str) -> str:
    return "YAML 1.1 reads that as text" if "e" in value.lower() else "In quotes it is text"


def _shown(value: Any) -> str:
    """``value`` as an option file would hold it, and what it is where that could be overlooked."""
    if value is None:
        return "nothing (~)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        looks_otherwise = _number_for(value, NUMBER) is not None or value.lower() in ("true", "false")
        shown = value if value.isprintable() else repr(value)[1:-1]
        shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
        return f"the text '{shown}'" if looks_otherwise else f"'{shown}'"
    if isinstance(value, Mapping):
        return "a section"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
