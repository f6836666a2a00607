"""What an option file may hold: the keys that BasicSR 1.4.2 and this package read, and the values they take.

Plain tables, read by `esc_basicsr.options.check`. A key of a table is a key of that section; its value says
what it accepts. Keys of networks, losses, metrics, optimizers and schedulers stand in their signatures.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard


class Kind(NamedTuple):
    """What a value must be."""

    expected: str
    accepts: Callable[[Any], bool]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a finite number; true and false are not."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether ``value`` is an int; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_iteration(value: Any) -> bool:
    """Whether ``value`` is a number of iterations; BasicSR's own files write some as ``!!float 5e3``."""
    return is_number(value) and 0 <= value <= 10**12 and value == int(value)


def _is_folder_name(value: Any) -> bool:
    # with what is put before and behind it, a name has 255 bytes at most
    is_name = isinstance(value, str) and value.isprintable() and len(value.encode()) <= 200
    return is_name and value not in ("", ".", "..") and not set(value) & set("/\\")


def or_none(kind: Kind) -> Kind:
    """``kind``, or nothing."""
    return Kind(f"{kind.expected} or ~", lambda value: value is None or kind.accepts(value))


def one_of(*values: str | None) -> Kind:
    """One of ``values``."""
    names = ["~" if value is None else value for value in values]
    return Kind(f"one of {', '.join(names)}", lambda value: value in values)


def at_most(kind: Kind, limit: int) -> Kind:
    """``kind``, up to a limit beyond which a number is a mistake that would fill memory or time."""
    expected = f"{kind.expected}, and at most {limit:,}"
    return Kind(expected, lambda value: kind.accepts(value) and value <= limit)


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """A list whose items are all of ``kind``."""
    count = "" if length is None else f"{length} items, "
    return Kind(
        f"a list, {count}each {kind.expected}",
        lambda value: (
            isinstance(value, list) and length in (None, len(value)) and all(map(kind.accepts, value))
        ),
    )


ANYTHING = Kind("anything", lambda value: True)
TEXT = Kind("text", lambda value: isinstance(value, str) and value != "")
TEMPLATE = Kind("text with {} for the HR name", lambda value: isinstance(value, str) and "{}" in value)
FOLDER_NAME = Kind("a name fit for a folder, without slashes", _is_folder_name)
BOOL = Kind("true or false", lambda value: isinstance(value, bool))
INTEGER = Kind("a whole number", is_whole)
COUNT = Kind("a whole number of at least 1", lambda value: is_whole(value) and value >= 1)
WHOLE = Kind("a whole number of at least 0", lambda value: is_whole(value) and value >= 0)
ITERATIONS = Kind("a whole number of at least 1", lambda value: is_iteration(value) and value >= 1)
WARMUP = Kind("a whole number, -1 for no warm-up", lambda value: value == -1 or is_iteration(value))
NUMBER = Kind("a number", is_number)
NOT_NEGATIVE = Kind("a number of at least 0", lambda value: is_number(value) and value >= 0)
POSITIVE = Kind("a number above 0", lambda value: is_number(value) and value > 0)
SECONDS = Kind("a number of seconds of at least 1", lambda value: is_number(value) and value >= 1)
FRACTION = Kind("a number from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1)
AMP = Kind("bf16 or fp16, or false", lambda value: value in ("bf16", "fp16") or value in (None, False))
GPUS = Kind("auto, or a whole number of at least 0", lambda value: value == "auto" or WHOLE.accepts(value))
SOURCES = Kind("a list of sections", lambda value: isinstance(value, list) and len(value) > 0)
SECTION = Kind("a section of 'key: value' lines", lambda value: isinstance(value, dict))

# Models whose every key is known. Other models may read more: what they add is left alone.
KNOWN_MODELS = ("SRModel", "ESCModel")

# Stock BasicSR has Adam alone (BaseModel.get_optimizer).
OPTIMIZERS = {"SRModel": ("Adam",), "ESCModel": ("Adam", "AdamW")}

# type -> the class of basicsr.models.lr_scheduler that BaseModel.setup_schedulers makes
SCHEDULERS = {
    "MultiStepLR": "MultiStepRestartLR",
    "MultiStepRestartLR": "MultiStepRestartLR",
    "CosineAnnealingRestartLR": "CosineAnnealingRestartLR",
}

# Set by BasicSR from the command line; a file may hold them, they are overwritten.
RUNTIME = dict.fromkeys(("dist", "rank", "world_size", "auto_resume", "is_train", "root_path"), ANYTHING)

TOP_LEVEL = {
    "name": FOLDER_NAME,
    "model_type": TEXT,
    "scale": COUNT,
    "num_gpu": GPUS,
    "manual_seed": or_none(at_most(WHOLE, 10**9)),
    "find_unused_parameters": BOOL,
    "datasets": SECTION,
    "network_g": SECTION,
    "path": SECTION,
    "train": SECTION,
    "val": or_none(SECTION),
    "logger": SECTION,
    "dist_params": SECTION,
    **RUNTIME,
}
TOP_LEVEL_REQUIRED = ("name", "model_type", "num_gpu", "datasets", "path")
TOP_LEVEL_REQUIRED_IN_KNOWN_MODELS = ("scale", "network_g")
TOP_LEVEL_REQUIRED_IN_TRAINING = ("train", "logger")
TOP_LEVEL_REQUIRED_IN_TEST = ("val",)

PATH = {
    "pretrain_network_g": or_none(TEXT),
    "param_key_g": or_none(TEXT),
    "strict_load_g": BOOL,
    "resume_state": or_none(TEXT),
    "ignore_resume_networks": ANYTHING,
    # Set by BasicSR.
    "experiments_root": TEXT,
    "models": TEXT,
    "training_states": TEXT,
    "log": TEXT,
    "visualization": TEXT,
    "results_root": TEXT,
}

TRAIN = {
    "total_iter": ITERATIONS,
    "warmup_iter": WARMUP,
    "ema_decay": FRACTION,
    "optim_g": SECTION,
    "scheduler": SECTION,
    "pixel_opt": or_none(SECTION),
    "perceptual_opt": or_none(SECTION),
}
# Keys that ESCModel has beyond SRModel's, by section.
ESC_MODEL = {
    "": {"channels_last": BOOL, "cpu_kernels": BOOL},
    "train": {
        "amp": AMP,
        "accumulate": COUNT,
        "compile": BOOL,
        "clip_grad_norm": or_none(POSITIVE),
        "max_skipped": COUNT,
    },
    "logger": {"keep_checkpoints": or_none(COUNT), "safetensors": BOOL},
    "val": {"amp": AMP, "batch_size": COUNT},
}

TRAIN_REQUIRED = ("total_iter",)
TRAIN_REQUIRED_IN_KNOWN_MODELS = ("optim_g", "scheduler")

# Narrower than what torch's signatures say.
OPTIM = {"lr": POSITIVE, "weight_decay": NOT_NEGATIVE, "betas": list_of(FRACTION, 2), "eps": NOT_NEGATIVE}

SCHEDULER = {
    "milestones": list_of(ITERATIONS),
    "gamma": POSITIVE,
    "periods": list_of(ITERATIONS),
    "restarts": list_of(Kind("a whole number of at least 0", is_iteration)),
    "restart_weights": list_of(NUMBER),
    "eta_min": NOT_NEGATIVE,
    "last_epoch": INTEGER,
}

LOSS = {
    "reduction": one_of("mean", "sum"),  # none leaves no single number to descend
    "criterion": one_of("l1", "fro"),  # for l2 BasicSR calls what PyTorch does not have
    "loss_weight": NUMBER,
    "perceptual_weight": NUMBER,
    "style_weight": NUMBER,
}

VAL = {
    "val_freq": ITERATIONS,
    "save_img": BOOL,
    "suffix": or_none(TEXT),
    "pbar": BOOL,
    "metrics": or_none(SECTION),
}
VAL_REQUIRED = ("save_img",)
VAL_REQUIRED_IN_TRAINING = ("val_freq",)

METRIC = {"better": one_of("higher", "lower"), "crop_border": WHOLE, "test_y_channel": BOOL}

LOGGER = {
    "print_freq": ITERATIONS,
    "save_checkpoint_freq": ITERATIONS,
    "use_tb_logger": BOOL,
    "wandb": or_none(SECTION),
}
LOGGER_REQUIRED = ("print_freq", "save_checkpoint_freq", "use_tb_logger")

WANDB = {"project": or_none(TEXT), "resume_id": or_none(TEXT)}

DIST_PARAMS = {
    "backend": one_of("nccl", "gloo", "mpi"),
    "port": or_none(at_most(COUNT, 65535)),
    "timeout": at_most(SECONDS, 10**6),
}

# Keys of a data set that BasicSR's pipelines and loaders read, whatever its type.
LOADER = {
    "name": TEXT,
    "type": TEXT,
    "phase": TEXT,
    "scale": COUNT,
    "batch_size_per_gpu": at_most(COUNT, 10**6),
    "num_worker_per_gpu": at_most(WHOLE, 1000),
    "dataset_enlarge_ratio": at_most(POSITIVE, 10**6),
    "global_batch_size": at_most(COUNT, 10**6),
    "max_unreadable": WHOLE,
    "prefetch_mode": one_of(None, "cpu", "cuda"),
    "num_prefetch_queue": at_most(COUNT, 1000),
    "pin_memory": BOOL,
    "persistent_workers": BOOL,
    # Nothing in 1.4.2 reads it, but BasicSR's own option files have it.
    "use_shuffle": BOOL,
}
LOADER_REQUIRED = ("name", "type")
LOADER_REQUIRED_IN_TRAINING = ("batch_size_per_gpu", "num_worker_per_gpu")

_IMAGES = {
    "mean": or_none(list_of(NUMBER)),
    "std": or_none(list_of(NUMBER)),
    "color": or_none(TEXT),
    "meta_info_file": or_none(TEXT),
}

# type of data set -> its own keys; one that is not here belongs to someone else, who knows its keys
DATASETS = {
    "PairedImageDataset": {
        "dataroot_gt": TEXT,
        "dataroot_lq": TEXT,
        "io_backend": SECTION,
        "filename_tmpl": TEMPLATE,
        "gt_size": COUNT,
        "use_hflip": BOOL,
        "use_rot": BOOL,
        **_IMAGES,
    },
    "SingleImageDataset": {"dataroot_lq": TEXT, "io_backend": SECTION, **_IMAGES},
    "DFLIPDataset": {
        "sources": SOURCES,
        "gt_size": COUNT,
        "use_hflip": BOOL,
        "use_rot": BOOL,
        "lq_on_device": BOOL,
    },
}
DATASETS_REQUIRED = {
    "PairedImageDataset": ("dataroot_gt", "dataroot_lq", "io_backend"),
    "SingleImageDataset": ("dataroot_lq", "io_backend"),
    "DFLIPDataset": ("sources",),
}
DATASETS_REQUIRED_IN_TRAINING = {
    "PairedImageDataset": ("gt_size", "use_hflip", "use_rot"),
    "DFLIPDataset": ("gt_size", "use_hflip", "use_rot"),
}

SOURCE = {"dataroot_gt": TEXT, "weight": at_most(POSITIVE, 10**6)}
SOURCE_REQUIRED = ("dataroot_gt",)

# Of this package's networks, far above what trains in any memory.
LARGEST_SIZE = 4096  # of any whole number
MOST_BLOCKS = 500  # n_blocks × conv_blocks

IO_BACKENDS = ("disk", "lmdb", "memcached")
