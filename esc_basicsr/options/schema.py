"""The options of a file: each key once, with what it takes, its default, its unit and its meaning.

From here come the check (`esc_basicsr.options.check`), typed access with the defaults filled in (`filled`),
docs/options.md and options/schema.json (`esc_basicsr.options.reference`). It covers what BasicSR 1.4.2 and
this package read; options of networks and of other packages' classes are declared by their signatures.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from esc_basicsr.options.kinds import (
    AMP,
    ANYTHING,
    BOOL,
    COUNT,
    FOLDER_NAME,
    FRACTION,
    GPUS,
    INTEGER,
    ITERATIONS,
    LABEL,
    NAMES,
    NOT_NEGATIVE,
    NUMBER,
    POSITIVE,
    PROBABILITY,
    QUALITY,
    RESTARTS,
    SECONDS,
    SECTION,
    SOURCES,
    TEMPLATE,
    TEXT,
    WARMUP,
    WHOLE,
    Kind,
    at_most,
    list_of,
    one_of,
    or_none,
)

if TYPE_CHECKING:
    from mmengine.config import ConfigDict

UNSET = object()  # there is no default: left out, the key is not there

# when a key must be given
ALWAYS, IN_TRAINING, IN_TEST = "always", "in training", "in testing"
IN_KNOWN_MODELS = "by the models of this page"


class Option(NamedTuple):
    """A key of an option file."""

    kind: Kind
    doc: str
    default: Any = UNSET
    unit: str = ""
    required: str = ""  # one of the above
    models: tuple[str, ...] = ()  # the only ones that read it; all, if there are none


# Models whose every key is known. Other models may read more: what they add is left alone.
DEGRADING_MODELS = ("RealESRNetModel", "RealESRGANModel")
KNOWN_MODELS = ("SRModel", "ESCModel", *DEGRADING_MODELS)

# type -> the class of basicsr.models.lr_scheduler that BaseModel.setup_schedulers makes
SCHEDULERS = {
    "MultiStepLR": "MultiStepRestartLR",
    "MultiStepRestartLR": "MultiStepRestartLR",
    "CosineAnnealingRestartLR": "CosineAnnealingRestartLR",
}

# Of this package's networks, far above what trains in any memory.
LARGEST_SIZE = 4096  # of any whole number
LARGEST_SCALE = 64
MOST_BLOCKS = 500  # n_blocks × conv_blocks

_ESC = ("ESCModel",)
_GAN = ("RealESRGANModel",)


def _by_basicsr(*keys: str) -> dict[str, Option]:
    return {key: Option(ANYTHING, "Set by BasicSR; what a file says is overwritten.") for key in keys}


def _degradation(kind: Kind, doc: str) -> Option:
    return Option(kind, doc, models=DEGRADING_MODELS)


# of an image to train with, by RealESRNetModel and RealESRGANModel; each twice, the second with a 2 behind it
_DEGRADATION = {
    "resize_prob": _degradation(list_of(NOT_NEGATIVE, 3), "Chances to enlarge, to reduce, to keep the size."),
    "resize_range": _degradation(list_of(POSITIVE, 2), "Smallest and largest factor of the size."),
    "gaussian_noise_prob": _degradation(PROBABILITY, "Chance of Gaussian noise; else it is Poisson's."),
    "noise_range": _degradation(list_of(NOT_NEGATIVE, 2), "Standard deviation of Gaussian noise, of 255."),
    "poisson_scale_range": _degradation(list_of(NOT_NEGATIVE, 2), "Factor of Poisson noise."),
    "gray_noise_prob": _degradation(PROBABILITY, "Chance that noise is the same in all channels."),
    "jpeg_range": _degradation(list_of(NOT_NEGATIVE, 2), "Quality of JPEG."),
}

TOP_LEVEL = {
    "name": Option(FOLDER_NAME, "Name of the experiment, and of its folder.", required=ALWAYS),
    "model_type": Option(TEXT, "ESCModel, or another model of BasicSR's registry.", required=ALWAYS),
    "scale": Option(
        at_most(COUNT, LARGEST_SCALE), "How many times larger SR is than LR.", required=IN_KNOWN_MODELS
    ),
    "num_gpu": Option(GPUS, "GPUs of one process; auto: all there are, 0: the CPU.", required=ALWAYS),
    "manual_seed": Option(
        or_none(at_most(WHOLE, 4 * 10**9)), "Seed of weights, order, crops and flips; ~: by chance.", None
    ),
    "channels_last": Option(BOOL, "Keep images and weights in channels-last layout.", False, models=_ESC),
    "cpu_kernels": Option(
        BOOL, "Without a GPU, run by C++ kernels, which need a C++ compiler.", False, models=_ESC
    ),
    "find_unused_parameters": Option(
        BOOL, "With several processes, look for weights that took no part in a step.", False
    ),
    "datasets": Option(SECTION, "Data sets: train, and val_NAME or test_NAME.", required=ALWAYS),
    "network_g": Option(
        SECTION, "The network: its type, and the options of that class.", required=IN_KNOWN_MODELS
    ),
    "network_d": Option(SECTION, "The discriminator: its type, and the options of that class.", models=_GAN),
    "gt_size": _degradation(at_most(COUNT, 400), "Side of an HR crop, in pixels; it is taken from 400."),
    "queue_size": Option(
        COUNT,
        "Pairs that wait to be mixed into other batches, a multiple of a process's samples of a step.",
        180,
        "pairs",
        models=DEGRADING_MODELS,
    ),
    "high_order_degradation": Option(
        BOOL, "Degrade images here; false: train on the pairs of the data set.", True, models=DEGRADING_MODELS
    ),
    **_DEGRADATION,
    "second_blur_prob": _degradation(PROBABILITY, "Chance of the second blur."),
    **{f"{key}2": option for key, option in _DEGRADATION.items()},
    "gt_usm": Option(BOOL, "Sharpen HR images.", models=("RealESRNetModel",)),
    "l1_gt_usm": Option(BOOL, "Sharpen HR images for the loss of pixels.", models=_GAN),
    "percep_gt_usm": Option(BOOL, "Sharpen HR images for the perceptual loss.", models=_GAN),
    "gan_gt_usm": Option(BOOL, "Sharpen HR images for the discriminator.", models=_GAN),
    "path": Option(SECTION, "Weights and states to start from.", required=ALWAYS),
    "train": Option(SECTION, "How to train.", required=IN_TRAINING),
    "val": Option(or_none(SECTION), "How to validate and test.", None, required=IN_TEST),
    "logger": Option(SECTION, "What is printed and saved, and how often.", required=IN_TRAINING),
    "dist_params": Option(SECTION, "How processes meet, with a launcher.", {}),
    **_by_basicsr("dist", "rank", "world_size", "auto_resume", "is_train", "root_path", "seed_is_drawn"),
}

PATH = {
    "pretrain_network_g": Option(
        or_none(TEXT), "Weights to start from: a file, or a network that ships with this package.", None
    ),
    "param_key_g": Option(
        or_none(TEXT), "Which weights of the file: params, or params_ema, their average.", "params"
    ),
    "strict_load_g": Option(BOOL, "Refuse weights that lack some or have others.", True),
    "pretrain_network_d": Option(
        or_none(TEXT), "A file with weights for the discriminator to start from.", None, models=_GAN
    ),
    "param_key_d": Option(or_none(TEXT), "Which weights of that file.", "params", models=_GAN),
    "strict_load_d": Option(BOOL, "Refuse weights that lack some or have others.", True, models=_GAN),
    "resume_state": Option(or_none(TEXT), "A training state to go on from.", None),
    "ignore_resume_networks": Option(NAMES, "Networks whose weights are not taken from there.", None),
    **_by_basicsr("experiments_root", "models", "training_states", "log", "visualization", "results_root"),
}

TRAIN = {
    "total_iter": Option(ITERATIONS, "Steps of the training.", unit="iterations", required=ALWAYS),
    "warmup_iter": Option(WARMUP, "Steps in which the learning rate rises to lr.", -1, "iterations"),
    "ema_decay": Option(FRACTION, "Of the averaged weights; 0: no average.", 0),
    "amp": Option(AMP, "Compute in half precision where autocast deems that safe.", False),
    "accumulate": Option(COUNT, "Pieces in which a batch is worked through: less memory, the same step.", 1),
    "compile": Option(BOOL, "Train network_g through torch.compile.", False),
    "clip_grad_norm": Option(
        or_none(POSITIVE), "Scale each network's gradients down to this norm; ~: never.", None
    ),
    "max_skipped": Option(
        COUNT,
        "Steps in a row whose loss or gradient is not finite, after which training ends.",
        10,
        "steps",
    ),
    "optim_g": Option(SECTION, "The optimizer: its type and options.", required=IN_KNOWN_MODELS),
    "scheduler": Option(SECTION, "How the learning rate falls.", required=IN_KNOWN_MODELS),
    "pixel_opt": Option(or_none(SECTION), "The loss of pixels: its type and options.", None),
    "perceptual_opt": Option(or_none(SECTION), "BasicSR's perceptual loss, by itself or beside it.", None),
    "optim_d": Option(SECTION, "The discriminator's optimizer.", models=_GAN),
    "gan_opt": Option(SECTION, "The adversarial loss: its type and options.", models=_GAN),
    "ldl_opt": Option(or_none(SECTION), "The loss of pixels that are likely artefacts.", None, models=_GAN),
    "net_d_iters": Option(COUNT, "The network is trained every so many steps.", 1, "steps", models=_GAN),
    "net_d_init_iters": Option(
        WHOLE, "Steps at the beginning that train the discriminator alone.", 0, "steps", models=_GAN
    ),
}

# Narrower than what torch's signatures say.
OPTIM = {
    "lr": Option(at_most(POSITIVE, 1000), "Largest learning rate.", required=ALWAYS),
    "weight_decay": Option(at_most(NOT_NEGATIVE, 1000), "Decay of the weights."),
    "betas": Option(list_of(FRACTION, 2), "Decay of the averages of gradient and squared gradient."),
    "eps": Option(at_most(NOT_NEGATIVE, 1000), "Added to the denominator."),
}

SCHEDULER = {
    "milestones": Option(list_of(ITERATIONS), "When the learning rate is lowered.", unit="iterations"),
    "gamma": Option(at_most(POSITIVE, 1000), "Factor of the learning rate at each."),
    "periods": Option(list_of(ITERATIONS), "Lengths of the falls by half a cosine.", unit="iterations"),
    "restarts": Option(list_of(RESTARTS), "When the learning rate starts anew.", unit="iterations"),
    "restart_weights": Option(
        list_of(at_most(NUMBER, 1000)), "Factor of the learning rate of each restart or period."
    ),
    "eta_min": Option(at_most(NOT_NEGATIVE, 1000), "Smallest learning rate."),
    "last_epoch": Option(INTEGER, "Set by BasicSR when it resumes."),
}

PIXEL_LOSS = {
    # none leaves no single number to descend
    "reduction": Option(one_of("mean", "sum"), "How the losses of pixels become one."),
    "loss_weight": Option(NUMBER, "Factor of the loss."),
    "chroma_weight": Option(
        NOT_NEGATIVE, "YChannelL1Loss: factor of its chroma term; by default 0, luma alone."
    ),
}

PERCEPTUAL_LOSS = {
    # for l2 BasicSR calls what PyTorch does not have
    "criterion": Option(one_of("l1", "fro"), "Distance of features."),
    "perceptual_weight": Option(NUMBER, "Factor of the perceptual term."),
    "style_weight": Option(NUMBER, "Factor of the style term."),
}

VAL = {
    "val_freq": Option(ITERATIONS, "Steps between validations.", unit="iterations", required=IN_TRAINING),
    "save_img": Option(BOOL, "Save the upscaled images.", required=ALWAYS),
    "suffix": Option(or_none(TEXT), "Put behind their names; ~: the experiment's name.", None),
    "pbar": Option(BOOL, "Show progress.", False),
    "metrics": Option(or_none(SECTION), "Metrics by a name of your own: their types and options.", None),
    "amp": Option(AMP, "Validate and test in half precision.", False, models=_ESC),
    "pad_to_window": Option(
        BOOL,
        "Mirror LR at bottom and right to multiples of window_size, and crop, as the release evaluates.",
        False,
        models=_ESC,
    ),
    "batch_size": Option(COUNT, "Most images of one size that go through the network together.", 1, "images"),
}

METRIC = {
    "better": Option(one_of("higher", "lower"), "Which value is the better one.", "higher"),
    "crop_border": Option(WHOLE, "Border that is not compared; scale, in published figures.", unit="pixels"),
    "test_y_channel": Option(BOOL, "Compare luma alone, as published figures do."),
    "input_order": Option(one_of("HWC"), "Order of an image's axes, which is always this."),
    "convert_to": Option(one_of("y", "gray"), "What NIQE is measured on."),
}

LOGGER = {
    "print_freq": Option(ITERATIONS, "Steps between log lines.", unit="iterations", required=ALWAYS),
    "save_checkpoint_freq": Option(
        ITERATIONS, "Steps between checkpoints.", unit="iterations", required=ALWAYS
    ),
    "keep_checkpoints": Option(
        or_none(COUNT), "How many of the newest are kept; ~: all.", None, "checkpoints"
    ),
    "safetensors": Option(BOOL, "Write the averaged weights as .safetensors, too, beside each .pth.", False),
    "use_tb_logger": Option(BOOL, "Log to TensorBoard.", required=ALWAYS),
    "wandb": Option(or_none(SECTION), "Weights & Biases, which takes what TensorBoard logs.", None),
}

WANDB = {
    "project": Option(or_none(TEXT), "Project to log to; ~: none.", None),
    "resume_id": Option(or_none(TEXT), "Run to go on with.", None),
}

DIST_PARAMS = {
    "backend": Option(one_of("nccl", "gloo", "mpi"), "How processes exchange; gloo on CPUs.", "nccl"),
    "port": Option(or_none(at_most(COUNT, 65535)), "Where processes meet, with --launcher slurm.", None),
    "timeout": Option(
        at_most(SECONDS, 10**6), "A rank that gives no sign of life so long ends the others.", 60, "seconds"
    ),
}

# Keys of a data set that BasicSR's pipelines and loaders read, whatever its type.
LOADER = {
    "name": Option(LABEL, "Name in logs, tables and of the results' folder.", required=ALWAYS),
    "type": Option(TEXT, "A data set of BasicSR's registry.", required=ALWAYS),
    **_by_basicsr("phase", "scale"),
    "batch_size_per_gpu": Option(
        at_most(COUNT, 10**6), "Samples at a time on each GPU.", unit="samples", required=IN_TRAINING
    ),
    "global_batch_size": Option(
        or_none(at_most(COUNT, 10**6)),
        "Samples of a step, on any number of processes that divides it; ~: batch_size_per_gpu on each.",
        None,
        "samples",
    ),
    "num_worker_per_gpu": Option(
        at_most(WHOLE, 1000), "Processes that read for each GPU.", unit="processes", required=IN_TRAINING
    ),
    "dataset_enlarge_ratio": Option(at_most(POSITIVE, 10**6), "How often an epoch visits each image.", 1),
    "max_unreadable": Option(
        WHOLE, "Unreadable images that a process passes over before training ends.", 10, "images"
    ),
    "prefetch_mode": Option(
        one_of(None, "cpu", "cuda"), "Fetch batches ahead, in memory or on the GPU.", None
    ),
    "num_prefetch_queue": Option(at_most(COUNT, 1000), "Batches ahead, with cpu.", 1, "batches"),
    "pin_memory": Option(BOOL, "Keep batches in memory that GPUs copy from faster.", False),
    "persistent_workers": Option(BOOL, "Keep the reading processes from epoch to epoch.", False),
    # BasicSR's own option files have it.
    "use_shuffle": Option(BOOL, "Nothing reads it: training sets are shuffled."),
}

IO_BACKEND = {
    "type": Option(one_of("disk", "lmdb", "memcached"), "Where images lie.", required=ALWAYS),
    "server_list_cfg": Option(TEXT, "Of memcached: list of its servers."),
    "client_cfg": Option(TEXT, "Of memcached: settings of its client."),
    "sys_path": Option(or_none(TEXT), "Of memcached: where its Python client lies."),
}

_IMAGES = {
    "io_backend": Option(SECTION, "How images are read.", required=ALWAYS),
    "mean": Option(or_none(list_of(NUMBER)), "Subtracted from each channel.", None),
    "std": Option(or_none(list_of(NUMBER)), "Divides each channel.", None),
    "color": Option(or_none(TEXT), "y: luma alone.", None),
    "meta_info_file": Option(
        or_none(TEXT), "A list of the images to take."
    ),  # BasicSR asks whether it is there
}
_LQ = {"dataroot_lq": Option(TEXT, "Folder or LMDB of LR images.", required=ALWAYS)}
_CROPS = {
    "gt_size": Option(COUNT, "Side of an HR crop.", unit="pixels", required=IN_TRAINING),
    "use_hflip": Option(BOOL, "Flip crops left to right, by chance.", required=IN_TRAINING),
    "use_rot": Option(BOOL, "Turn crops upside down and by 90°, each by chance.", required=IN_TRAINING),
}

# of RealESRGANDataset; each twice, the second with a 2 behind it
_BLUR = {
    "blur_kernel_size": Option(COUNT, "Largest side of a kernel, which is always 21.", required=ALWAYS),
    "kernel_list": Option(ANYTHING, "Kinds of kernels.", required=ALWAYS),
    "kernel_prob": Option(list_of(NOT_NEGATIVE), "Chance of each.", required=ALWAYS),
    "sinc_prob": Option(PROBABILITY, "Chance of a sinc filter in their place.", required=ALWAYS),
    "blur_sigma": Option(list_of(POSITIVE, 2), "Standard deviation of a kernel, in pixels.", required=ALWAYS),
    "betag_range": Option(list_of(POSITIVE, 2), "Exponents of generalised Gaussians.", required=ALWAYS),
    "betap_range": Option(list_of(POSITIVE, 2), "Exponents of plateau kernels.", required=ALWAYS),
}

# type of data set -> its own keys; one that is not here belongs to someone else, who knows its keys
DATASETS = {
    "PairedImageDataset": {
        "dataroot_gt": Option(TEXT, "Folder or LMDB of HR images.", required=ALWAYS),
        **_LQ,
        "filename_tmpl": Option(TEMPLATE, "Name of the LR image of an HR image.", "{}"),
        **_CROPS,
        **_IMAGES,
    },
    "SingleImageDataset": {**_LQ, **_IMAGES},
    "RealESRGANDataset": {
        "dataroot_gt": Option(TEXT, "Folder or LMDB of HR images.", required=ALWAYS),
        "io_backend": Option(SECTION, "How images are read.", required=ALWAYS),
        "meta_info": Option(
            or_none(TEXT), "A list of the images to take of a folder, a path on each line; LMDBs need none."
        ),
        "use_hflip": Option(BOOL, "Flip images left to right, by chance.", required=ALWAYS),
        "use_rot": Option(BOOL, "Turn images upside down and by 90°, each by chance.", required=ALWAYS),
        "gt_size": Option(COUNT, "Nothing reads it: the model crops."),
        **_BLUR,
        **{f"{key}2": option for key, option in _BLUR.items()},
        "final_sinc_prob": Option(PROBABILITY, "Chance of a last sinc filter.", required=ALWAYS),
    },
    "DFLIPDataset": {
        "sources": Option(SOURCES, "LMDBs of HR images, a section each.", required=ALWAYS),
        **_CROPS,
        "lq_on_device": Option(BOOL, "Make LR of whole batches, on the GPU, in the model.", False),
    },
    "DegradedDataset": {
        "sources": Option(SOURCES, "LMDBs of HR images, or folders to test on.", required=ALWAYS),
        **_CROPS,
        "noise_sigma": Option(or_none(POSITIVE), "Standard deviation of Gaussian noise, of 255.", None),
        "jpeg_quality": Option(
            or_none(QUALITY),
            "Quality of JPEG; in training also the least and the largest to draw from.",
            None,
        ),
        "color": Option(or_none(one_of("y")), "y: JPEG of luma, for networks of one channel.", None),
    },
}

SOURCE = {
    "dataroot_gt": Option(TEXT, "LMDB of HR images.", required=ALWAYS),
    "weight": Option(at_most(POSITIVE, 10**6), "How often an epoch visits each of its images.", 1),
}

# where a section is -> its keys; data sets and metrics have names of the user's own
SECTIONS: dict[str, dict[str, Option]] = {
    "": TOP_LEVEL,
    "path": PATH,
    "train": TRAIN,
    "train.optim_g": OPTIM,
    "train.scheduler": SCHEDULER,
    "train.pixel_opt": PIXEL_LOSS,
    "train.perceptual_opt": PERCEPTUAL_LOSS,
    "val": VAL,
    "val.metrics.NAME": METRIC,
    "logger": LOGGER,
    "logger.wandb": WANDB,
    "dist_params": DIST_PARAMS,
    "datasets.NAME": LOADER,
    "datasets.NAME.io_backend": IO_BACKEND,
    "datasets.NAME.sources[]": SOURCE,
}
# sections that a function is called with, whose signature knows their other keys and their defaults
CALLED = (
    *("network_g", "network_d", "train.optim_g", "train.optim_d", "train.scheduler"),
    *("train.pixel_opt", "train.perceptual_opt", "train.gan_opt", "train.ldl_opt"),
)
_FILLED = ("", "path", "train", "val", "logger", "logger.wandb", "dist_params")


def required_keys(table: Mapping[str, Option], is_train: bool, is_known_model: bool) -> list[str]:
    """List the keys of a section that must be given."""
    now = {ALWAYS: True, IN_TRAINING: is_train, IN_TEST: not is_train, IN_KNOWN_MODELS: is_known_model}
    return [key for key, option in table.items() if now.get(option.required)]


def lookup(opt: Mapping[str, Any], where: str) -> Any:
    """Return the value at ``where``, such as ``train.optim_g.lr``; None if there is none."""
    value: Any = opt
    for name in where.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def sound(section: Any, table: Mapping[str, Option]) -> dict[str, Any]:
    """Give what of a section is as it is declared, or its default; the rest is reported elsewhere."""
    section = section if isinstance(section, Mapping) else {}
    values = {key: section.get(key, option.default) for key, option in table.items()}
    return {key: value for key, value in values.items() if table[key].kind.accepts(value)}


def filled(opt: Mapping[str, Any]) -> "ConfigDict":
    """Copy checked options and give every key that was left out its default: ``opt.train.clip_grad_norm``.

    Sections that a class is constructed by are as they were: their defaults are in its signature.
    """
    from mmengine.config import ConfigDict

    full = ConfigDict(opt)
    fill_defaults(full)
    return full


def fill_defaults(opt: dict[str, Any]) -> None:
    """Give every key that was left out its default, as `filled` does, in ``opt`` itself."""
    for where in _FILLED:
        section: Any = opt
        for name in where.split(".") if where else ():
            section = None if section is None else section.get(name)
        if section is not None:
            _fill(section, SECTIONS[where], opt.get("model_type"))
    for dataset in opt.get("datasets", {}).values():
        _fill(dataset, {**LOADER, **DATASETS.get(dataset.get("type"), {})}, opt.get("model_type"))
        for source in dataset.get("sources") or ():
            _fill(source, SOURCE, opt.get("model_type"))


def _fill(section: Any, table: Mapping[str, Option], model: Any) -> None:
    for key, option in table.items():
        # Known models refuse the keys of others; a model derived from ESCModel has its.
        is_read = model in option.models if model in KNOWN_MODELS else "ESCModel" in option.models
        if option.default is not UNSET and (is_read or not option.models):
            section.setdefault(key, copy.deepcopy(option.default))  # a list is not for all to change
