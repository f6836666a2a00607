"""The shipped option files, from one source.

Each file is complete and flat, for BasicSR's own parser and for people to copy, edit and send on. Numbers
come from the tables below and from `VARIANTS`; the recipe is the release's (arXiv:2503.06671, Sec. 4.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from esc_basicsr.archs.variants import SCALES, VARIANTS
from esc_basicsr.rivals.variants import RIVALS

LR_PATCH = 64  # side of a training patch, in LR pixels
BATCH = 64  # published: 16 on each of 4 GPUs
BATCH_PER_GPU = 16
TOTAL_ITERATIONS = 500_000
WARMUP_ITERATIONS = 20_000
MILESTONES = (250_000, 400_000, 450_000, 475_000, 490_000)
EVERY = 5_000  # iterations between checkpoints, and between validations

BENCHMARKS = ("Set5", "Set14", "B100", "Urban100", "Manga109")
DFLIP_SOURCES = (
    "DIV2K/DIV2K_train_HR",
    "Flickr2K/Flickr2K_HR",
    "LSDIR/LSDIR_HR",
    "DiverSeg-IP/DiverSeg-IP_HR",
)

# The rows of the paper's ablation: name -> what differs from ESC, and what the row shows.
ABLATION: dict[str, tuple[dict[str, Any], str]] = {
    "attention_only": (
        {"token_mixer": "attention", "conv_blocks": 2},
        "window attention in place of each ConvAttn; fewer layers, as attention costs more",
    ),
    "conv_attention_only": (
        {"token_mixer": "conv_attention", "conv_blocks": 7},
        "no window attention; more ConvAttn layers for what it costs",
    ),
    "kernel9": ({"kernel_size": 9}, "a smaller large kernel"),
    "kernel17": ({"kernel_size": 17}, "a larger large kernel"),
    "no_dynamic_kernel": ({"dynamic_kernel": False}, "the large kernel alone, none made from the image"),
    "unshared_no_dynamic_kernel": (
        {"share_large_kernel": False, "dynamic_kernel": False},
        "a large kernel for each ConvAttn, none made from the image",
    ),
    "window16": (
        {"window_size": 16, "conv_blocks": 6},
        "smaller attention windows; more ConvAttn layers for what they save",
    ),
}


@dataclass(frozen=True)
class Recipe:
    """One network on one training set: a file to train by, a file to test by."""

    variant: str
    scale: int
    data: str
    network: Mapping[str, Any] = field(hash=False)
    row: str = ""
    remark: str = ""
    scale_key: str = "upscaling_factor"

    @property
    def name(self) -> str:
        """Stem of the files, ``name:`` in them, folder of the checkpoints."""
        return "_".join(part for part in (self.variant, f"x{self.scale}", self.data, self.row) if part)

    @property
    def folder(self) -> str:
        """Folder of the files, below ``train`` and ``test``."""
        return "ablation" if self.row else self.variant

    @property
    def title(self) -> str:
        """What the files are about, for people."""
        title = f"{self.variant} ×{self.scale}" + (f" trained on {self.data}" if self.data else "")
        return f"{title}. Ablation: {self.remark}" if self.remark else title


def recipes() -> list[Recipe]:
    """All trained networks."""
    plain = [
        Recipe(variant, scale, "DIV2K", network) for variant, network in VARIANTS.items() for scale in SCALES
    ]
    dflip = [Recipe("ESC", scale, "DFLIP", VARIANTS["ESC"]) for scale in SCALES]
    ablation = [
        Recipe("ESC", 2, "DIV2K", {**VARIANTS["ESC"], **changes}, row, remark)
        for row, (changes, remark) in ABLATION.items()
    ]
    return plain + dflip + ablation


def option_files() -> dict[PurePosixPath, str]:
    """Path below ``options/`` and text of every shipped file."""
    files = {}
    for recipe in recipes():
        files[PurePosixPath("train", recipe.folder, f"{recipe.name}.yml")] = training_text(recipe)
        files[PurePosixPath("test", recipe.folder, f"{recipe.name}.yml")] = benchmark_text(recipe)
    for scale in SCALES:
        baseline = Recipe("Bicubic", scale, "", {"type": "Bicubic"})
        files[PurePosixPath("test", baseline.folder, f"{baseline.name}.yml")] = benchmark_text(baseline)
        for variant, rival in RIVALS.items():
            other = Recipe(variant, scale, "DIV2K", rival.network, scale_key=rival.scale_key)
            files[PurePosixPath("test", other.folder, f"{other.name}.yml")] = benchmark_text(other)
    return files


def training_text(recipe: Recipe) -> str:
    """Text of the file to train ``recipe`` by."""
    data = _dflip(recipe.scale) if recipe.data == "DFLIP" else _div2k(recipe.scale)
    sections = [
        _head(recipe, "train"),
        f"datasets:\n{_indent(data)}\n\n{_indent(_benchmark('val', 'Set5', recipe.scale))}",
        _network(recipe.network),
        _start(recipe),
        _TRAINING,
        f"val:\n  val_freq: {EVERY}\n  save_img: false\n  pbar: true\n{_METRICS}",
        _LOGGER,
        _DISTRIBUTED,
    ]
    return "\n\n".join(sections) + "\n"


def benchmark_text(recipe: Recipe) -> str:
    """Text of the file to measure ``recipe`` on the benchmarks by."""
    sets = [
        _indent(_benchmark(f"test_{number}", name, recipe.scale)) for number, name in enumerate(BENCHMARKS, 1)
    ]
    checkpoint = f"experiments/{recipe.name}/models/net_g_latest.pth" if recipe.data else "~"
    if recipe.variant in RIVALS:
        checkpoint = f"experiments/pretrained_models/{recipe.name}.pth # as its authors released it"
    sections = [
        _head(recipe, "test"),
        "datasets:\n" + "\n\n".join(sets),
        _network(recipe.network, recipe.scale_key),
        _path(checkpoint),
        f"val:\n  save_img: false # true: into results/{recipe.name}/visualization\n"
        f"  suffix: ~ # of the images' names; ~: the name above\n  pbar: true\n{_METRICS}",
        _DISTRIBUTED,
    ]
    return "\n\n".join(sections) + "\n"


def _head(recipe: Recipe, command: str) -> str:
    file = f"options/{command}/{recipe.folder}/{recipe.name}.yml"
    return f"""\
# Generated by: python -m esc_basicsr options --write options. Copy it under another name to change it.
# {recipe.title}.
# python -m esc_basicsr {command} -opt {file}
# datasets/README.md says how to get the data.

name: {recipe.name}
model_type: ESCModel
scale: &scale {recipe.scale}
num_gpu: auto # all GPUs there are; 0: the CPU
manual_seed: 0"""


def _div2k(scale: int) -> str:
    return f"""\
train:
  name: DIV2K
  type: PairedImageDataset
  dataroot_gt: datasets/DIV2K/DIV2K_train_HR_sub.lmdb
  dataroot_lq: datasets/DIV2K/DIV2K_train_LR_bicubic_X{scale}_sub.lmdb
  io_backend:
    type: lmdb
{_indent(_patches(scale))}"""


def _dflip(scale: int) -> str:
    sources = "\n".join(
        f"    - dataroot_gt: datasets/{source}_sub.lmdb\n      weight: 1.0" for source in DFLIP_SOURCES
    )
    return f"""\
train:
  name: DFLIP
  type: DFLIPDataset # LR is made of each HR patch on the fly
  sources: # weight: how often an epoch visits each image of the set
{sources}
{_indent(_patches(scale))}"""


def _patches(scale: int) -> str:
    return f"""\
gt_size: {LR_PATCH * scale} # {LR_PATCH} × scale
use_hflip: true
use_rot: true
global_batch_size: {BATCH} # on any number of GPUs that divides it
batch_size_per_gpu: {BATCH_PER_GPU} # at a time: less needs less memory, the steps are the same
num_worker_per_gpu: 8
persistent_workers: true
pin_memory: true
prefetch_mode: ~
dataset_enlarge_ratio: 1"""


def _benchmark(phase: str, name: str, scale: int) -> str:
    return f"""\
{phase}:
  name: {name}
  type: PairedImageDataset
  dataroot_gt: datasets/{name}/HR/X{scale}
  dataroot_lq: datasets/{name}/LR_bicubic/X{scale}
  filename_tmpl: '{{}}x{scale}'
  io_backend:
    type: disk"""


def _network(network: Mapping[str, Any], scale_key: str = "upscaling_factor") -> str:
    options = {"type": network["type"], scale_key: "*scale", **network}
    lines = [f"  {key}: {_scalar(value)}" for key, value in options.items()]
    if network["type"] in ("ESC", "ESCFP"):
        lines.append("  attn_type: auto # or Naive, SDPA, Flex: other speed and memory, same results")
    return "\n".join(["network_g:", *lines])


def _start(recipe: Recipe) -> str:
    if recipe.scale == 2:
        return f"{_path('~')}\n{_RESUME}"
    first = Recipe(recipe.variant, 2, recipe.data, recipe.network, recipe.row)
    comment = f"  # ×{recipe.scale} starts from the trained ×2; ~ trains from scratch."
    path = _path(f"experiments/{first.name}/models/net_g_latest.pth")
    return path.replace("path:\n", f"path:\n{comment}\n") + f"\n{_RESUME}"


def _path(checkpoint: str) -> str:
    return f"""\
path:
  pretrain_network_g: {checkpoint}
  param_key_g: params_ema
  strict_load_g: true"""


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" if line else line for line in text.split("\n"))


_RESUME = "  resume_state: ~"

_TRAINING = f"""\
train:
  total_iter: {TOTAL_ITERATIONS}
  warmup_iter: {WARMUP_ITERATIONS} # -1: none
  ema_decay: 0.999

  optim_g:
    type: AdamW
    lr: 5.0e-4
    weight_decay: 0
    betas: [0.9, 0.9]

  scheduler:
    type: MultiStepLR
    milestones: [{", ".join(map(str, MILESTONES))}]
    gamma: 0.5

  pixel_opt:
    # L1 on luma, plus a light chroma term that keeps edges free of tints (chroma_weight: 0 is the paper's).
    # For L1 on RGB, as in the authors' released files, write here: type: L1Loss
    type: YChannelL1Loss
    loss_weight: 1.0
    reduction: mean"""

_METRICS = """\
  metrics: # on luma, a border of scale pixels cropped
    psnr:
      type: calculate_psnr
      crop_border: *scale
      test_y_channel: true
      better: higher
    ssim:
      type: calculate_ssim
      crop_border: *scale
      test_y_channel: true
      better: higher"""

_LOGGER = f"""\
logger:
  print_freq: 100
  save_checkpoint_freq: {EVERY}
  keep_checkpoints: ~ # all; a number: the newest ones
  safetensors: true # beside each .pth, its EMA weights
  use_tb_logger: true
  wandb:
    project: ~
    resume_id: ~"""

_DISTRIBUTED = """\
dist_params:
  backend: nccl
  port: 29500"""
