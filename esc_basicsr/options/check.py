"""Checking an option file before anything is built: every mistake at once, each with its key and a remedy.

What stock BasicSR 1.4.2 does with a mistake: a mistyped key is ignored or ends in a KeyError, a number that
YAML reads as text in a TypeError, a missing folder in a FileNotFoundError, each after everything before it
was set up, and a training set smaller than a batch trains for zero iterations without a word.
"""

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from esc_basicsr.archs.variants import RELEASED
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import is_file
from esc_basicsr.common.suggestion import hint
from esc_basicsr.options import schema
from esc_basicsr.options.contradictions import contradictions
from esc_basicsr.options.data_check import GUIDE, batch_problems, data_problems, expand, result_problems
from esc_basicsr.options.kinds import SECTION, as_written, is_whole
from esc_basicsr.options.schema import Option, lookup, sound
from esc_basicsr.options.sections import FOREIGN, SectionCheck, instead, keys_read, registered
from esc_basicsr.weights.fit import check_fit
from esc_basicsr.weights.read import read_weights
from esc_basicsr.weights.shipped import weights_file

_REPORTED = 30  # problems
_LONGEST = 2000  # characters of one, most of them from the file


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
        problems = [
            (problem if len(problem) <= _LONGEST else f"{problem[:_LONGEST]}...").replace("\n", "\n    ")
            for problem in check.problems[:_REPORTED]
        ]
        if len(check.problems) > _REPORTED:
            problems.append(f"... and {len(check.problems) - _REPORTED} more")
        lines = "\n  ".join([f"{path}: {count}", *problems])
        raise UserError("\n".join([lines, *check.notes]))


class _Check(SectionCheck):
    """One pass over the options."""

    def __init__(self, opt: Mapping[str, Any], is_train: bool, resumes: bool) -> None:
        super().__init__(opt, is_train)
        self.resumes = is_train and (resumes or lookup(opt, "path.resume_state") is not None)
        self.notes: dict[str, None] = {}  # written once, after the problems, in this order
        self.model: Any = None  # the class that model_type names
        self.channels: int | None = None  # that network_g takes, if that is known
        self.network_g: torch.nn.Module | None = None  # on the meta device, if sound and of this package

    def run(self) -> None:
        self.check_sections()
        self.check_gpus()
        for name, section in self.opt.items():
            if str(name).startswith("network_") and isinstance(section, Mapping):
                self.check_network(str(name), section)
        self.check_path()
        if self.is_train:
            self.check_model()
            self.check_losses_and_optimizers()
            self.check_scheduler()
        self.check_metrics()
        self.check_datasets()
        for where, message in contradictions(self.opt, self.is_train, self.model):
            self.add(where, message)

    def note_paths(self) -> None:
        self.notes[f"Relative paths start at the working directory, {Path.cwd()}."] = None

    def check_sections(self) -> None:
        """Check the sections whose keys are declared, but for those of the user's own names."""
        from basicsr.models import MODEL_REGISTRY

        models, model_type = registered(MODEL_REGISTRY), self.opt.get("model_type")
        if isinstance(model_type, str):
            self.model = models.get(model_type)
            if self.model is None:
                meant = instead(model_type, models, FOREIGN)
                self.add("model_type", f"got '{model_type}', no known model. {meant}")
        # A mistyped model_type should not hide the rest.
        self.check_section("", self.opt, schema.TOP_LEVEL, self.model is not None and not self.is_known_model)
        for where in ("path", "train", "val", "logger", "logger.wandb", "dist_params"):
            section = self.section(where)
            is_read = self.is_train or where not in ("train", "logger", "logger.wandb")
            if is_read and section is not None:
                is_open = where not in ("logger.wandb", "dist_params") and not self.is_known_model
                self.check_section(where, section, schema.SECTIONS[where], is_open)

    def check_gpus(self) -> None:
        wanted, here = self.opt.get("num_gpu"), torch.cuda.device_count()
        # Each process of a launcher takes one GPU, whatever num_gpu is.
        is_launched = "WORLD_SIZE" in os.environ or "SLURM_PROCID" in os.environ
        if is_whole(wanted) and wanted > here and (here == 0 or not is_launched):
            gpus = "1 GPU" if here == 1 else f"{here} GPUs"
            self.add("num_gpu", f"got {wanted}, but this machine has {gpus}. Write auto, or 0 for the CPU.")

    def check_network(self, where: str, section: Mapping[str, Any]) -> None:
        from basicsr.archs import ARCH_REGISTRY

        name = section.get("type")
        variant = _variant_for(name)
        if variant is not None and name not in ARCH_REGISTRY:
            options = ", ".join(f"{key}: {value}" for key, value in RELEASED[variant].items())
            self.add(f"{where}.type", f"got '{name}', a variant: write {options}.")
            return
        network = self.check_class(where, section, ARCH_REGISTRY, "network")
        if where == "network_g":
            cls = registered(ARCH_REGISTRY).get(str(name))
            self.channels = None if cls is None else _channels_of(section, cls)
            self.network_g = network if self.knows("load_network") is not None else None

    def check_path(self) -> None:
        for key, value in (self.section("path") or {}).items():
            where = f"path.{key}"
            if not isinstance(value, str):
                continue
            if key == "resume_state" and self.is_train and not is_file(expand(value)):
                self.add(where, f"there is no training state '{value}'. Give another, or ~.")
                self.note_paths()
            if not key.startswith("pretrain_network") or self.resumes:
                continue
            file = weights_file(value)
            if not is_file(file):
                remedy = "Train what it comes from first, or give another."
                self.add(where, f"there is no checkpoint '{value}'. {remedy}")
                self.note_paths()
            elif key == "pretrain_network_g" and self.network_g is not None:
                self.check_weights(where, file, self.network_g)

    def check_weights(self, where: str, file: Path, network: torch.nn.Module) -> None:
        path, train = (sound(self.opt.get(name), schema.SECTIONS[name]) for name in ("path", "train"))
        is_strict = path.get("strict_load_g")
        has_average = self.is_train and train.get("ema_decay", 0) > 0
        try:
            # SRModel loads the average's network, too.
            for param_key in dict.fromkeys([path.get("param_key_g"), *(["params_ema"] * has_average)]):
                weights = read_weights(file, param_key)
                if is_strict:
                    check_fit(network, weights, file)
        except UserError as error:
            self.add(where, str(error))

    def knows(self, method: str) -> set[str] | None:
        """Collect the texts in a method of the model and of its parents; None if a third party wrote it."""
        functions = [vars(cls)[method] for cls in getattr(self.model, "__mro__", ()) if method in vars(cls)]
        if not functions or not functions[0].__module__.startswith(("basicsr.", "esc_basicsr.")):
            return None
        return {text for each in functions for text in each.__code__.co_consts if isinstance(text, str)}

    def check_model(self) -> None:
        """Report sections that a model of BasicSR reads in training and that are not there."""
        read = {
            text for name in ("init_training_settings", "setup_optimizers") for text in self.knows(name) or ()
        }
        for where in ("network_d", "train.optim_d", "train.gan_opt"):
            if where.removeprefix("train.") in read and self.section(where) is None:
                self.add(where, f"missing; expected {SECTION.expected}.")
        feed = inspect.unwrap(getattr(self.model, "feed_data", None) or dict)
        if feed.__module__.startswith("basicsr.") and self.opt.get("high_order_degradation", True):
            for key in sorted(keys_read(feed) - self.opt.keys()):
                self.add(key, f"missing; {self.model.__name__} reads it to degrade images.")

    def check_optimizer(self, where: str, section: Mapping[str, Any]) -> None:
        name, known = section.get("type"), self.knows("get_optimizer")
        if known is not None:
            # One that names none looks them up in torch.optim.
            names = {text for text in known if hasattr(torch.optim, text)} or {*dir(torch.optim)}
            what = f"optimizer of {self.opt['model_type']}"
            name = self.look_up(where, section, names, what)
        optimizer = getattr(torch.optim, name, None) if isinstance(name, str) else None
        if isinstance(optimizer, type):
            if "lr" not in section:
                self.add(f"{where}.lr", f"missing; expected {schema.OPTIM['lr'].kind.expected}.")
            self.check_and_make(where, section, optimizer, {"params": [_parameter()]}, schema.OPTIM)

    def check_and_make(
        self,
        where: str,
        section: Mapping[str, Any],
        cls: type,
        supplied: Mapping[str, Any],
        declared: Mapping[str, Option],
    ) -> None:
        """Check the arguments of a class that BasicSR calls with more, and what it raises."""
        before = len(self.problems)
        self.check_call(where, section, cls, [*supplied], declared)
        if len(self.problems) == before:
            options = {key: value for key, value in section.items() if key != "type"}
            self.attempt(where, cls, lambda: cls(**supplied, **options))

    def check_scheduler(self) -> None:
        from basicsr.models import lr_scheduler

        where = "train.scheduler"
        section = self.section(where)
        if section is None or (self.model is not None and self.knows("setup_schedulers") is None):
            return
        name = self.look_up(where, section, schema.SCHEDULERS, "scheduler of BasicSR")
        if name is not None:
            scheduler = getattr(lr_scheduler, schema.SCHEDULERS[name])
            self.check_and_make(where, section, scheduler, {"optimizer": _optimizer()}, schema.SCHEDULER)

    def check_losses_and_optimizers(self) -> None:
        from basicsr.losses import LOSS_REGISTRY

        is_basicsrs = self.knows("init_training_settings") is not None
        for key, section in (self.section("train") or {}).items():
            where = f"train.{key}"
            if not isinstance(section, Mapping) or not section:
                continue
            name = section.get("type")
            if str(key).startswith("optim_"):
                self.check_optimizer(where, section)
            elif key in ("pixel_opt", "perceptual_opt") or (str(key).endswith("_opt") and is_basicsrs):
                self.check_class(where, section, LOSS_REGISTRY, "loss", schema.SECTIONS.get(where))
                if name == "PerceptualLoss" and registered(LOSS_REGISTRY)[name].__module__.startswith(
                    "basicsr."
                ):
                    self.check_vgg(where, section.get("vgg_type", "vgg19"))
                if name in ("YChannelL1Loss", "PerceptualLoss") and self.channels not in (None, 3):
                    message = f"compares RGB images, and network_g gives {self.channels} channels"
                    self.add(f"{where}.type", f"{name} {message}. Write L1Loss, or leave it out.")

    def check_vgg(self, where: str, name: Any) -> None:
        """Report weights that BasicSR's perceptual loss would download while the training is set up."""
        from basicsr.archs.vgg_arch import NAMES, VGG_PRETRAIN_PATH
        from torchvision.models import get_model_weights

        if not isinstance(name, str) or name.removesuffix("_bn") not in NAMES:
            self.add(f"{where}.vgg_type", f"got {as_written(name)}. {instead(name, NAMES, '')}".rstrip())
            return
        url = get_model_weights(name).DEFAULT.url
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
        own = Path(VGG_PRETRAIN_PATH) if Path(VGG_PRETRAIN_PATH).name == cached.name else cached
        if not (is_file(own) or is_file(cached)):
            self.add(
                where,
                f"there are no weights '{own}', which PerceptualLoss needs. Download them from {url}, or "
                "leave the loss out.",
            )
            self.note_paths()

    def check_metrics(self) -> None:
        from basicsr.metrics import METRIC_REGISTRY

        if not self.is_train and "val" in self.opt:
            self.is_section("val", self.opt["val"])
        for name, metric in (self.section("val.metrics") or {}).items():
            where = f"val.metrics.{name}"
            if self.is_section(where, metric):
                function = self.find(where, metric, METRIC_REGISTRY, "metric")
                if function is None:
                    continue
                if function.__name__.endswith("_pt") and function.__module__.startswith("basicsr."):
                    other = function.__name__.removesuffix("_pt")
                    self.add(f"{where}.type", f"is for tensors, and results are arrays. Write {other}.")
                self.check_call(where, metric, function, ["img", "img2"], schema.METRIC)

    def niqe_border(self) -> int | None:
        """Tell what NIQE crops on each side of an image; None if it is not measured."""
        metrics = [m for m in (self.section("val.metrics") or {}).values() if isinstance(m, Mapping)]
        borders = [m.get("crop_border") for m in metrics if m.get("type") == "calculate_niqe"]
        return max((border for border in borders if is_whole(border)), default=None)

    def check_datasets(self) -> None:
        phases = ("train", "val") if self.is_train else ("test", "val")
        datasets = self.section("datasets")
        if datasets is None:
            return
        for name, dataset in datasets.items():
            where, phase = f"datasets.{name}", str(name).split("_")[0]
            if phase not in phases or (phase == "train" and name != "train"):
                expected = "train, val or val_NAME" if self.is_train else "test_NAME or val_NAME"
                self.add(where, f"unknown phase; expected {expected}. {hint(name, phases)}")
            elif self.is_section(where, dataset):
                self.check_dataset(where, dataset, phase == "train")
        if self.is_train and "train" not in datasets:
            self.add("datasets.train", f"missing; expected {SECTION.expected}.")
        elif not datasets:
            self.add("datasets", "missing; expected at least one data set, such as test_1.")

    def check_reading(self, where: str, dataset: Mapping[str, Any], cls: Any, is_training_set: bool) -> None:
        """Report what another data set of BasicSR reads and is not there."""
        if cls.__module__.startswith("basicsr."):
            own = [vars(each) for each in cls.__mro__ if each.__module__.startswith("basicsr.")]
            read = keys_read(*(each["__init__"] for each in own if "__init__" in each), cls.__getitem__)
            # declared with the others, or for crops
            read -= {*schema.LOADER, *(() if is_training_set else ("gt_size", "use_hflip", "use_rot"))}
            for key in sorted(read - dataset.keys()):
                self.add(f"{where}.{key}", f"missing; {cls.__name__} reads it.")

    def check_dataset(self, where: str, dataset: Mapping[str, Any], is_training_set: bool) -> None:
        from basicsr.data import DATASET_REGISTRY

        cls = self.find(where, dataset, DATASET_REGISTRY, "data set")
        if cls is None:
            return
        own = schema.DATASETS.get(dataset["type"])
        self.check_section(where, dataset, {**schema.LOADER, **(own or {})}, own is None, is_training_set)
        backend = dataset.get("io_backend")
        if isinstance(backend, Mapping):
            self.check_section(f"{where}.io_backend", backend, schema.IO_BACKEND)
        if own is None:
            self.check_reading(where, dataset, cls, is_training_set)
            return
        sources = dataset.get("sources") if "sources" in own else None
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            if self.is_section(f"{where}.sources[{index}]", source):
                self.check_section(f"{where}.sources[{index}]", source, schema.SOURCE)
        scale = self.opt.get("scale")
        problems = [*data_problems(dataset, scale, is_training_set)]
        if problems:
            self.note_paths()
            self.notes[GUIDE] = None
        elif is_training_set:
            problems += batch_problems(dataset, self.opt)
        else:
            saves_images = lookup(self.opt, "val.save_img") is True
            problems += result_problems(dataset, scale, saves_images, self.niqe_border())
        channels = 1 if dataset.get("color") == "y" else 3
        if self.channels not in (None, channels):
            images = "luma alone, 1 channel" if channels == 1 else "colours, 3 channels"
            message = (
                f"gives {images}, and network_g takes {self.channels}. Change color or network_g's channels."
            )
            problems.append(("color" if "color" in own else "type", message))
        for key, message in problems:
            self.add(f"{where}.{key}", message)


def _channels_of(section: Mapping[str, Any], network: Any) -> int | None:
    """Tell how many channels a network of this package or of BasicSR takes, if its options say so."""
    if not network.__module__.startswith(("basicsr.", "esc_basicsr.")):
        return None
    defaults = {name: p.default for name, p in inspect.signature(network).parameters.items()}
    name = next((name for name in ("in_channels", "num_in_ch", "in_chans") if name in defaults), None)
    channels = None if name is None else section.get(name, defaults[name])
    return channels if is_whole(channels) else None


def _parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1))


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([_parameter()], lr=1)


def _variant_for(name: Any) -> str | None:
    """Find the published variant that ``name`` is, however it is spelled: ESC-light, esc_light, ESCLight."""
    spelled = {re.sub("[-_ ]", "", variant).lower(): variant for variant in RELEASED}
    return spelled.get(re.sub("[-_ ]", "", str(name)).lower())
