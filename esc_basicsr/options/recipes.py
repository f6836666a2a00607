"""The shipped option files, from one source.

Each file is complete and flat, for BasicSR's own parser and for people to copy, edit and send on. Numbers
come from the tables below and from `VARIANTS`; the recipe is the release's (arXiv:2503.06671, Sec. 4.1).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from string import Template
from textwrap import indent
from typing import Any

from esc_basicsr.archs.variants import RELEASED, SCALES, VARIANTS
from esc_basicsr.options.baselines import BASELINES

_TEMPLATES = Path(__file__).with_name("templates")

PHOTOGRAPHS = "photographs"  # what the networks that ship were trained on (docs/models.md)
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
class Schedule:
    """A schedule of training, and its batches; the published one if nothing is given."""

    lr_patch: int = 64  # side of a training patch, in LR pixels
    batch: int = 64  # patches of a step, on all GPUs; published: 16 on each of 4
    batch_per_gpu: int = 16  # patches at a time
    enlarge: int = 1  # how often an epoch visits each image
    iterations: int = 500_000
    warmup: int = 20_000  # iterations in which the learning rate rises
    learning_rate: float = 5e-4  # the largest
    # when it is halved; if there are none it falls by half a cosine
    milestones: tuple[int, ...] = (250_000, 400_000, 450_000, 475_000, 490_000)
    ema_decay: float = 0.999
    every: int = 5_000  # iterations between checkpoints, and between validations


# For one to two hours on two CPU cores; a GPU has time for more (docs/models.md).
SHORT = Schedule(
    lr_patch=32,
    batch=4,
    batch_per_gpu=4,
    enlarge=100,
    iterations=25_000,
    warmup=300,
    learning_rate=1.5e-3,
    milestones=(),
    every=1_000,
)
# from the trained ×2
SHORTER = replace(SHORT, iterations=6_000, warmup=200, learning_rate=1e-3, ema_decay=0.998, every=500)

_GRAY = "color: y # luma; gray images to test on as they are"

# Our own choice: at ×1 a patch of 64 shows little beyond one window.
WHOLE_SIZE = Schedule(lr_patch=128, batch=16, batch_per_gpu=4)


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
    schedule: Schedule = Schedule()
    degradation: tuple[str, ...] = ()  # of images whose size is kept: what `DegradedDataset` does to them

    @property
    def name(self) -> str:
        """Stem of the files, ``name:`` in them, folder of the checkpoints."""
        return "_".join(part for part in (self.variant, f"x{self.scale}", self.data, self.row) if part)

    @property
    def folder(self) -> str:
        """Folder of the files, below ``train`` and ``test``."""
        return "ablation" if self.row in ABLATION else self.variant

    @property
    def title(self) -> str:
        """First line of the files, for people."""
        title = f"{self.variant} ×{self.scale}" + (f" trained on {self.data}" if self.data else "")
        kind = "Ablation: " if self.row in ABLATION else ""
        return f"{title}. {kind}{self.remark}" if self.remark else title


def recipes() -> list[Recipe]:
    """List all trained networks."""
    plain = [
        Recipe(variant, scale, "DIV2K", network) for variant, network in VARIANTS.items() for scale in SCALES
    ]
    dflip = [Recipe("ESC", scale, "DFLIP", VARIANTS["ESC"]) for scale in SCALES]
    dflip += [Recipe("ESC-XL", scale, "DF2K", RELEASED["ESC-XL"]) for scale in SCALES]
    ablation = [
        Recipe("ESC", 2, "DIV2K", {**VARIANTS["ESC"], **changes}, row, remark)
        for row, (changes, remark) in ABLATION.items()
    ]
    shipped = [
        Recipe("ESC-light", scale, PHOTOGRAPHS, VARIANTS["ESC-light"], schedule=schedule)
        for scale, schedule in ((2, SHORT), (4, SHORTER))
    ]
    return plain + dflip + ablation + shipped + same_size_recipes()


def degraded_recipes() -> list[Recipe]:
    """List what is trained on photographs with real damage: each network in two stages."""
    return [
        Recipe(variant, scale, "DIV2K", RELEASED[variant], stage, remark)
        for variant, scale in (("ESC-Real", 4), ("ESC-RealM", 2))
        for stage, remark in (
            ("MSE", "For photographs, the first stage: pixels alone"),
            ("GAN", "For photographs, the second stage: adversarial, from the first one's weights"),
        )
    ]


def same_size_recipes() -> list[Recipe]:
    """List what removes noise or JPEG artefacts, without a change of size."""
    networks = {
        "ESC": RELEASED["ESC"],
        "ESC-RealM": {**RELEASED["ESC-RealM"], "upsampler": "conv", "unshuffle_mod": False},
    }
    gray = {"in_channels": 1, "out_channels": 1}
    jpeg = "jpeg_quality: [10, 90]"
    tasks: list[tuple[str, tuple[str, ...], dict[str, Any], str]] = [
        (f"noise{sigma}", (f"noise_sigma: {sigma} # of 255",), {}, f"Removes Gaussian noise of sigma {sigma}")
        for sigma in (15, 25, 50)
    ]
    tasks += [
        ("jpeg", (jpeg,), {}, "Removes JPEG's artefacts"),
        ("jpeg_gray", (jpeg, _GRAY), gray, "Removes JPEG's artefacts from gray images, as published"),
    ]
    return [
        Recipe(
            *(variant, 1, "DIV2K", {**network, **changes}, row, remark),
            schedule=WHOLE_SIZE,
            degradation=degradation,
        )
        for variant, network in networks.items()
        for row, degradation, changes, remark in tasks
    ]


def ablation_rows() -> dict[str, Recipe]:
    """Return the rows of the paper's ablation by name: ESC itself first, then those of `ABLATION`."""
    return {
        recipe.row or recipe.variant: recipe
        for recipe in recipes()
        if (recipe.variant, recipe.scale, recipe.data) == ("ESC", 2, "DIV2K")
    }


def option_files() -> dict[PurePosixPath, str]:
    """Give path below ``options/`` and text of every shipped file."""
    files = {}
    for recipe in recipes():
        files[PurePosixPath("train", recipe.folder, f"{recipe.name}.yml")] = training_text(recipe)
        files[PurePosixPath("test", recipe.folder, f"{recipe.name}.yml")] = benchmark_text(recipe)
    for recipe in degraded_recipes():
        files[PurePosixPath("train", recipe.folder, f"{recipe.name}.yml")] = degraded_text(recipe)
        files[PurePosixPath("test", recipe.folder, f"{recipe.name}.yml")] = benchmark_text(recipe)
    for scale in SCALES:
        baseline = Recipe("Bicubic", scale, "", {"type": "Bicubic"})
        files[PurePosixPath("test", baseline.folder, f"{baseline.name}.yml")] = benchmark_text(baseline)
        for variant, published in BASELINES.items():
            other = Recipe(variant, scale, "DIV2K", published.network, scale_key=published.scale_key)
            files[PurePosixPath("test", other.folder, f"{other.name}.yml")] = benchmark_text(other)
    return files


def training_text(recipe: Recipe) -> str:
    """Write the file to train ``recipe`` with."""
    schedule, scale = recipe.schedule, recipe.scale
    if recipe.data in ("DFLIP", "DF2K"):  # the latter is the former's first two
        sources = DFLIP_SOURCES if recipe.data == "DFLIP" else DFLIP_SOURCES[:2]
        data = [
            "type: DFLIPDataset # LR is made of each HR patch on the fly",
            "sources: # weight: how often an epoch visits each image of the set",
            *(f"  - dataroot_gt: datasets/{name}_sub.lmdb\n    weight: 1.0" for name in sources),
        ]
    elif recipe.degradation:
        data = [
            "type: DegradedDataset # images are degraded on the fly",
            "sources:",
            "  - dataroot_gt: datasets/DIV2K/DIV2K_train_HR_sub.lmdb",
            *recipe.degradation,
        ]
    else:
        prefix = f"datasets/{recipe.data}/{'DIV2K_train' if recipe.data == 'DIV2K' else recipe.data}"
        data = [
            "type: PairedImageDataset",
            f"dataroot_gt: {prefix}_HR_sub.lmdb",
            f"dataroot_lq: {prefix}_LR_bicubic_X{scale}_sub.lmdb",
            "io_backend:",
            "  type: lmdb",
        ]
    start = ["pretrain_network_g: ~"]
    if scale > 2:
        first = replace(recipe, scale=2).name
        start = [
            f"# ×{scale} starts from the trained ×2; ~ trains from scratch.",
            f"pretrain_network_g: experiments/{first}/models/net_g_latest.pth",
        ]
    if schedule.milestones:
        fall = ["type: MultiStepLR", f"milestones: {[*schedule.milestones]}", "gamma: 0.5"]
    else:
        periods = f"periods: [{schedule.iterations}] # as total_iter"
        fall = ["type: CosineAnnealingRestartLR", periods, "restart_weights: [1]", "eta_min: 1.0e-6"]
    mantissa, _, exponent = f"{schedule.learning_rate:.1e}".partition("e")
    kernels = "cpu_kernels: true # without a GPU: three times as fast; needs a C++ compiler\n"
    values = {
        **asdict(schedule),
        "gt_size": schedule.lr_patch * scale,
        "learning_rate": f"{mantissa}e{int(exponent)}",
        "kernels": kernels if recipe.data == PHOTOGRAPHS else "",
        "training_set": _lines([f"name: {recipe.data}", *data], 4),
        "sets": _benchmark("val", "heldout" if recipe.data == PHOTOGRAPHS else "Set5", scale),
        "loss": _RGB if recipe.degradation else _LUMA,
        "metrics": _metrics(recipe),
        "start": _lines(start, 2),
        "scheduler": _lines(fall, 4),
    }
    if recipe.degradation:
        ((name, degradation), *_) = _degraded_sets(recipe)
        values["sets"] = _degraded("val", name, degradation)
    return _filled("train", recipe, values)


_LUMA = """\
  # L1 on luma, with a light chroma term: luma alone leaves colours free, and edges get tints (docs/loss.md).
  pixel_opt: {type: YChannelL1Loss, chroma_weight: 0.2, loss_weight: 1.0, reduction: mean}
  # Instead, the paper's, luma alone:
  # pixel_opt: {type: YChannelL1Loss, loss_weight: 1.0, reduction: mean}
  # Instead, that of the authors' released files, RGB:
  # pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}"""
_RGB = "  pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}"
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
_NIQE = """
    niqe: # without HR; images of 96 pixels a side at least
      type: calculate_niqe
      crop_border: 0
      better: lower"""
_REAL_SETS = """\
  test_1:
    name: RealSRSet # photographs without HR: these, or your own
    type: SingleImageDataset
    dataroot_lq: datasets/RealSRSet
    io_backend:
      type: disk

  test_2:
    name: DIV2K_unknown # with HR; what reduced it is not published
    type: PairedImageDataset
    dataroot_gt: datasets/DIV2K/DIV2K_valid_HR
    dataroot_lq: datasets/DIV2K/DIV2K_valid_LR_unknown/X$scale
    filename_tmpl: '{}x$scale'
    io_backend:
      type: disk"""
_PIXELS = "pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}"
_FIRST_STAGE = f"""\
total_iter: 1000000
warmup_iter: -1

optim_g:
  type: AdamW
  lr: 5.0e-4
  weight_decay: 0
  betas: [0.9, 0.9]

scheduler:
  type: MultiStepLR
  milestones: [100000]
  gamma: 0.4

{_PIXELS}"""
_SECOND_STAGE = f"""\
total_iter: 400000
warmup_iter: -1
net_d_iters: 1
net_d_init_iters: 0

optim_g:
  type: Adam
  lr: 1.0e-4
  weight_decay: 0
  betas: [0.9, 0.99]

optim_d:
  type: Adam
  lr: 1.0e-4
  weight_decay: 0
  betas: [0.9, 0.99]

scheduler:
  type: MultiStepLR
  milestones: [400000]
  gamma: 0.5

{_PIXELS}
perceptual_opt: # by VGG19, whose weights it needs (datasets/README.md)
  type: PerceptualLoss
  layer_weights: {{conv1_2: 0.1, conv2_2: 0.1, conv3_4: 1, conv4_4: 1, conv5_4: 1}}
  vgg_type: vgg19
  use_input_norm: true
  range_norm: false
  perceptual_weight: 1.0
  style_weight: 0
  criterion: l1
gan_opt: {{type: GANLoss, gan_type: vanilla, real_label_val: 1.0, fake_label_val: 0.0, loss_weight: 0.1}}"""
_DISCRIMINATOR = """
network_d:
  type: UNetDiscriminatorSN
  num_in_ch: 3
  num_feat: 64
  skip_connection: true
"""


def degraded_text(recipe: Recipe) -> str:
    """Write the file to train a stage of ``recipe`` with, on images that the model degrades."""
    is_first = recipe.row == "MSE"
    usual = {"l1_gt_usm": True, "percep_gt_usm": True, "gan_gt_usm": False}
    sharpened = {"gt_usm": True} if is_first else usual
    first = replace(recipe, row="MSE").name
    start = ["pretrain_network_g: ~"]
    if not is_first:
        start = [
            f"pretrain_network_g: experiments/{first}/models/net_g_latest.pth",
            "param_key_g: params_ema",
        ]
    values = {
        "model": "RealESRNetModel" if is_first else "RealESRGANModel",
        "sharpening": "\n".join(f"{key}: {str(value).lower()}" for key, value in sharpened.items()),
        "sets": _benchmark("val", "Set5", recipe.scale),
        "discriminator": "" if is_first else _DISCRIMINATOR,
        "start": _lines(start, 2),
        "training": indent(_FIRST_STAGE if is_first else _SECOND_STAGE, "  "),
    }
    return _filled("degraded", recipe, values)


def benchmark_text(recipe: Recipe) -> str:
    """Write the file to measure ``recipe`` on the benchmarks with."""
    names = BENCHMARKS[:2] if recipe.data == PHOTOGRAPHS else BENCHMARKS
    sets = [_benchmark(f"test_{number}", name, recipe.scale) for number, name in enumerate(names, 1)]
    checkpoint = f"experiments/{recipe.name}/models/net_g_latest.pth" if recipe.data else "~"
    if recipe.variant in BASELINES:
        released = "BasicSR's model zoo has it" if recipe.variant == "RCAN" else "its authors released it"
        checkpoint = f"experiments/pretrained_models/{recipe.name}.pth # as {released}"
    if recipe.data == PHOTOGRAPHS:
        checkpoint = f"{recipe.variant}_x{recipe.scale} # ships with this package; or experiments/..."
    is_esc = (
        recipe.network["type"] in ("ESC", "ESCFP") and recipe.data != PHOTOGRAPHS and not recipe.degradation
    )
    padding = "true # as the published figures are measured" if is_esc else "false"
    if recipe.degradation:
        sets = [_degraded(f"test_{number}", *each) for number, each in enumerate(_degraded_sets(recipe), 1)]
    is_real = recipe.row in ("MSE", "GAN")
    if is_real:
        sets = [_REAL_SETS.replace("$scale", str(recipe.scale))]
    if recipe.variant == "ESC-Real":
        checkpoint += f" # or the release's, ESC_Real_X4_{recipe.row}.pth"
    results = "into results/$name/visualization".replace("$name", recipe.name)
    values = {
        "saved": f"true # {results}" if is_real else f"false # true: {results}",
        "sets": "\n\n".join(sets),
        "checkpoint": checkpoint,
        "padding": padding,
        "metrics": _metrics(recipe),
    }
    return _filled("test", recipe, values)


def _filled(kind: str, recipe: Recipe, values: Mapping[str, Any]) -> str:
    """Fill a template; what has several lines comes with its indentation."""
    options = {"type": recipe.network["type"], recipe.scale_key: "*scale", **recipe.network}
    network = [f"{k}: {str(v).lower() if isinstance(v, bool) else v}" for k, v in options.items()]
    if options["type"].startswith("ESC"):
        network.append("attn_type: auto # or Naive, SDPA, Flex: other speed and memory, same results")
    head = {key: getattr(recipe, key) for key in ("name", "title", "folder", "scale")}
    template = Template((_TEMPLATES / f"{kind}.yml").read_text(encoding="utf-8"))
    return template.substitute(head, network=_lines(network, 2), **values)


def _metrics(recipe: Recipe) -> str:
    if recipe.row in ("MSE", "GAN"):
        return _METRICS + _NIQE
    if not recipe.degradation:
        return _METRICS
    is_luma = recipe.row == "jpeg"
    told = "all of RGB, to the border"
    if is_luma:
        told = "luma, to the border: 1.32 dB above PSNR of gray images (docs/restoration.md)"
    elif _GRAY in recipe.degradation:
        told = "gray images, to the border, as published"
    return (
        _METRICS.replace("luma, a border of scale pixels cropped", told)
        .replace("*scale", "0")
        .replace("test_y_channel: true", f"test_y_channel: {str(is_luma).lower()}")
    )


def _degraded_sets(recipe: Recipe) -> list[tuple[str, Sequence[str]]]:
    """List the sets that a degradation is measured on, by name, and how their images are degraded."""
    if "noise" in recipe.row:
        return [(f"{name}_{recipe.row}", recipe.degradation) for name in ("McMaster", "CBSD68", "Kodak24")]
    is_gray = _GRAY in recipe.degradation
    return [
        (f"{name}{'_gray' * is_gray}_quality{quality}", [f"jpeg_quality: {quality}", *[_GRAY] * is_gray])
        for name in ("Classic5", "LIVE1")
        for quality in (10, 20, 30, 40)
    ]


def _degraded(phase: str, name: str, degradation: Sequence[str]) -> str:
    return f"""\
  {phase}:
    name: {name}
    type: DegradedDataset
    sources:
      - dataroot_gt: datasets/{name.partition("_")[0]}
{_lines(degradation, 4)}"""


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


def _lines(lines: Iterable[str], indentation: int) -> str:
    return indent("\n".join(lines), " " * indentation)
