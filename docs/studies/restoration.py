"""Train small networks to remove noise, JPEG's artefacts and what ESC-Real is for; measure and draw them.

    python docs/studies/restoration.py -o docs
    python docs/studies/restoration.py -o docs --data datasets     # on Set5, too

Trains by shipped option files, made small, on photographs of scikit-image; measures on others of them. What
ESC-Real is for, Real-ESRGAN's model does to pairs once, and not anew in each step, which takes a CPU seconds.
Writes OUT/restoration.json and OUT/restoration.jpg, and prints a Markdown table.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mmengine
import numpy as np
import numpy.typing as npt
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from esc_basicsr.archs import Bicubic
from esc_basicsr.archs.variants import build_on_meta
from esc_basicsr.commands.demo import HELD_OUT_PHOTOGRAPHS, TRAINING_PHOTOGRAPHS, run_pipeline
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets
from esc_basicsr.data.degraded_dataset import DegradedDataset
from esc_basicsr.data.image_codec import encode_png
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.options.recipes import (
    Recipe,
    degraded_recipes,
    degraded_text,
    same_size_recipes,
    training_text,
)
from esc_basicsr.weights.read import read_weights

Pair = tuple[Tensor, Tensor]  # LR and HR, (1, C, H, W)

NETWORK = {"dim": 16, "pdim": 4, "n_blocks": 1, "conv_blocks": 2, "window_size": 16, "num_heads": 2}
PATCH, BATCH = 48, 4
LEARNING_RATE = 2e-3
TRAINING_PAIRS, TEST_PAIRS = 60, 12  # with real damage, of 256 HR pixels a side
LEFT, TOP, SIDE = 150, 60, 240  # of the part that is drawn, in pixels
CAPTION, GAP = 24, 6


class Row(NamedTuple):
    """What a network makes of a set; PSNR in dB."""

    network: str
    set: str
    before: float
    after: float


def recipes() -> list[Recipe]:
    """List what is trained: one network of each task."""
    wanted = ("ESC_x1_DIV2K_noise50", "ESC_x1_DIV2K_jpeg", "ESC_x1_DIV2K_jpeg_gray", "ESC-RealM_x2_DIV2K_MSE")
    return [recipe for recipe in (*same_size_recipes(), *degraded_recipes()) if recipe.name in wanted]


def options_of(recipe: Recipe, iterations: int) -> dict[str, Any]:
    """Make a shipped option file small, and have it train on the photographs."""
    is_real = not recipe.degradation
    config = mmengine.Config(yaml.safe_load((degraded_text if is_real else training_text)(recipe)))
    data: dict[str, Any] = {"sources": [{"dataroot_gt": "photographs_HR_sub.lmdb"}]}
    if is_real:
        pairs = {"dataroot_gt": "damaged/gt", "dataroot_lq": "damaged/lq", "io_backend": {"type": "disk"}}
        data = {"_delete_": True, "name": "damaged", "type": "PairedImageDataset", **pairs}
    loader = {"num_worker_per_gpu": 0, "persistent_workers": False, "pin_memory": False}
    crops = {"gt_size": PATCH * recipe.scale, "use_hflip": True, "use_rot": True}
    scheduler = {"type": "CosineAnnealingRestartLR", "periods": [iterations], "restart_weights": [1]}
    config.merge_from_dict(
        {
            **{"num_gpu": 0, "network_g": NETWORK, "val.val_freq": iterations + 1, "val.pbar": False},
            "datasets.train": {**data, **loader, **crops, "dataset_enlarge_ratio": 100},
            "datasets.train.batch_size_per_gpu": BATCH,
            **({"high_order_degradation": False} if is_real else {"datasets.train.global_batch_size": BATCH}),
            **{"train.total_iter": iterations, "train.warmup_iter": -1, "train.ema_decay": 0.99},
            "train.optim_g.lr": LEARNING_RATE,
            "train.scheduler": {"_delete_": True, **scheduler, "eta_min": 1e-6},
            **{"logger.print_freq": 10, "logger.save_checkpoint_freq": iterations},
            "logger.use_tb_logger": False,
        }
    )
    options: dict[str, Any] = config.to_dict()
    del options["datasets"]["val"]
    return options | {"val": None}


def train(recipe: Recipe, folder: Path, iterations: int) -> nn.Module:
    """Train the network of a recipe below ``folder``; return it with its averaged weights."""
    options = options_of(recipe, iterations)
    file = folder / f"{recipe.name}.yml"
    file.write_text(yaml.safe_dump(options, sort_keys=False))
    run_pipeline("train", file, iterations)
    net = build_on_meta({key: value for key, value in options["network_g"].items() if key != "attn_type"})
    net.to_empty(device="cpu")
    net.load_state_dict(
        read_weights(folder / f"experiments/{recipe.name}/models/net_g_latest.pth", "params_ema")
    )
    return net.eval()


def degraded(recipe: Recipe, images: Path, quality: int = 10) -> Iterator[Pair]:
    """Yield the images of a folder as the recipe's test file degrades them, JPEG by one quality."""
    what = yaml.safe_load("\n".join(recipe.degradation))
    if "jpeg_quality" in what:
        what["jpeg_quality"] = quality
    dataset = DegradedDataset(
        {"phase": "test", "scale": 1, "sources": [{"dataroot_gt": str(images)}], **what}
    )
    for index in range(len(dataset)):
        yield dataset[index]["lq"][None], dataset[index]["gt"][None]


def damaged(recipe: Recipe, images: Path, count: int) -> Iterator[Pair]:
    """Yield crops of an LMDB as Real-ESRGAN's model degrades them, the same each time."""
    from basicsr.data import build_dataset
    from basicsr.models import build_model

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    options = yaml.safe_load(degraded_text(recipe))
    data = {**options["datasets"]["train"], "dataroot_gt": str(images), "batch_size_per_gpu": 1}
    place = {"is_train": True, "dist": False, "rank": 0, "world_size": 1, "num_gpu": 0}
    options |= {**place, "queue_size": 1, "datasets": {"train": {**data, "phase": "train"}}}
    options["network_g"] |= NETWORK
    model, dataset = build_model(options), build_dataset(data)
    for index in tqdm(range(count), desc="pairs with real damage", unit="pair"):
        vars(model).pop("queue_lr", None)  # each image is an early one, not mixed with others
        item = dataset[index % len(dataset)]
        model.feed_data({key: value[None] for key, value in item.items() if isinstance(value, Tensor)})
        yield model.lq, model.gt


@torch.no_grad()
def mean_psnr(net: nn.Module, pairs: list[Pair], is_luma: bool, border: int) -> float:
    """Measure a network's mean PSNR in dB, of 8-bit images."""
    return float(np.mean([psnr(net(lq), gt, is_luma, border) for lq, gt in pairs]))


def psnr(sr: Tensor, gt: Tensor, is_luma: bool, border: int) -> float:
    """Measure PSNR in dB of (1, C, H, W) in [0, 1], as 8-bit images."""
    from basicsr.metrics import calculate_psnr

    images = (pixels(image)[..., ::-1] for image in (sr, gt))  # in OpenCV's order
    return float(calculate_psnr(*images, crop_border=border, test_y_channel=is_luma))


def pixels(image: Tensor) -> npt.NDArray[np.uint8]:
    """Convert (1, C, H, W) in [0, 1] to (H, W, C), RGB or gray."""
    return image[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()


def draw(net: nn.Module, lq: Tensor, gt: Tensor) -> Image.Image:
    """Draw a part of a photograph, damaged by JPEG, restored, and as it was; captions have PSNR of all."""
    with torch.no_grad():
        restored = net(lq)
    panels = {
        f"JPEG, quality 10: {psnr(lq, gt, True, 0):.2f} dB": lq,
        f"restored: {psnr(restored, gt, True, 0):.2f} dB": restored,
        "original": gt,
    }
    sheet = Image.new("RGB", (len(panels) * (2 * SIDE + GAP) - GAP, 2 * SIDE + CAPTION), "white")
    for number, (caption, panel) in enumerate(panels.items()):
        part = Image.fromarray(pixels(panel)[TOP : TOP + SIDE, LEFT : LEFT + SIDE])
        left = number * (2 * SIDE + GAP)
        sheet.paste(part.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST), (left, CAPTION))
        ImageDraw.Draw(sheet).text((left, 3), caption, "black", ImageFont.load_default(15))
    return sheet


def compare(folder: Path, data: Path | None, iterations: int) -> tuple[list[Row], Image.Image]:
    """Train and measure all networks; ``data`` has Set5, laid out as datasets/README.md says."""
    images = {name: load_sample_image(name) for name in TRAINING_PHOTOGRAPHS}
    build_lmdb_sets(images, folder, "photographs", crop_size=400, step=100)
    held_out = {name: load_sample_image(name) for name in HELD_OUT_PHOTOGRAPHS}
    (folder / "held_out").mkdir()
    for name, image in held_out.items():
        (folder / f"held_out/{name}.png").write_bytes(encode_png(image[:, :, ::-1], 1))
    sets = {"photographs": folder / "held_out"}
    if data is not None:
        sets["Set5"] = data / "Set5/HR/X2"
    build_lmdb_sets(held_out, folder, "held_out", crop_size=400, step=200)
    rows, sheet = [], None
    for recipe in recipes():
        if not recipe.degradation:
            for number, pair in enumerate(
                damaged(recipe, folder / "photographs_HR_sub.lmdb", TRAINING_PAIRS)
            ):
                for name, image in zip(("lq", "gt"), pair, strict=True):
                    file = folder / "damaged" / name / f"{number}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(encode_png(pixels(image)[:, :, ::-1], 1))
        net = train(recipe, folder, iterations)
        if recipe.degradation:
            is_luma = recipe.row == "jpeg"
            tests = {name: [*degraded(recipe, images)] for name, images in sets.items()}
            before: nn.Module = nn.Identity()
        else:
            is_luma = True
            tests = {"photographs": [*damaged(recipe, folder / "held_out_HR_sub.lmdb", TEST_PAIRS)]}
            before = Bicubic(recipe.scale)
        border = 0 if recipe.scale == 1 else recipe.scale
        for name, pairs in tests.items():
            figures = [mean_psnr(each, pairs, is_luma, border) for each in (before, net)]
            rows.append(Row(recipe.name, name, *figures))
        if recipe.row == "jpeg":
            sheet = draw(net, *tests["photographs"][HELD_OUT_PHOTOGRAPHS.index("chelsea")])
    assert sheet is not None
    return rows, sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of test sets, for Set5")
    parser.add_argument("--iterations", type=int, default=600, help="of each training; by default 600")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for what is written")


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows, sheet = compare(Path(folder), args.data and args.data.resolve(), args.iterations)
    args.output.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output / "restoration.jpg", quality=90)
    figures = {"iterations": args.iterations, "rows": [row._asdict() for row in rows]}
    (args.output / "restoration.json").write_text(json.dumps(figures, indent=1) + "\n")
    lines = [[row.network, row.set, f"{row.before:.2f}", f"{row.after:.2f}"] for row in rows]
    print(markdown_table(["network", "set", "degraded", "restored"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("restoration", sys.argv[1:], prog="python docs/studies/restoration.py"))
