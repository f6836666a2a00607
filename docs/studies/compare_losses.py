"""Train one small ESC with several pixel losses, on the same batches, and compare colours and luma.

    python docs/studies/compare_losses.py --train PHOTOS --val datasets/Set5 datasets/Set14 -o OUT

Writes OUT/loss_comparison.json and OUT/loss_comparison.jpg, and prints a Markdown table.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import mmengine
import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from esc_basicsr.archs import ESC, Bicubic
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.data.degradation import reduce_uint8
from esc_basicsr.data.image_folder import find_images, read_rgb
from esc_basicsr.metrics.quality import super_resolve
from esc_basicsr.training.y_channel_loss import RGB_TO_YCBCR, YChannelL1Loss

Image = npt.NDArray[np.uint8]

NETWORK: dict[str, Any] = {
    "dim": 32,
    "pdim": 8,
    "kernel_size": 13,
    "n_blocks": 1,
    "conv_blocks": 3,
    "window_size": 8,
    "num_heads": 2,
}
PATCH, BATCH = 24, 16
LEARNING_RATE = 1e-3


class Pair(NamedTuple):
    """A test image: its name, LR and HR, (H, W, 3) RGB."""

    name: str
    lq: Image
    gt: Image


def read_pairs(folder: Path, scale: int) -> list[Pair]:
    """Read a test set laid out as datasets/README.md says."""
    pairs = []
    hr_folder = folder / "HR" / f"X{scale}"
    for path in find_images(hr_folder, recursive=False):
        lq = folder / "LR_bicubic" / f"X{scale}" / f"{path.stem}x{scale}.png"
        pairs.append(Pair(f"{folder.name}/{path.stem}", read_rgb(lq), read_rgb(hr_folder / path)))
    return pairs


def to_tensor(images: Sequence[Image]) -> Tensor:
    """Stack (H, W, 3) images of one size to (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def batches(photos: Sequence[Image], scale: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless random crops and their reductions."""
    random = np.random.default_rng(seed)
    size = PATCH * scale
    while True:
        crops = []
        for _ in range(BATCH):
            photo = photos[int(random.integers(len(photos)))]
            top, left = (random.integers(side - size + 1) for side in photo.shape[:2])
            crop = np.rot90(photo[top : top + size, left : left + size], int(random.integers(4)))
            crops.append(np.ascontiguousarray(crop[:, :: random.choice((1, -1))]))
        yield to_tensor([reduce_uint8(crop, scale) for crop in crops]), to_tensor(crops)


def ycbcr(image: Image) -> npt.NDArray[np.float64]:
    """Convert to BT.601 studio swing in 8-bit units, unrounded."""
    return image.astype(np.float64) @ (np.array(RGB_TO_YCBCR).T / 255)


def figures_of(sr: Image, gt: Image, border: int) -> dict[str, float]:
    """Measure Y and RGB PSNR in dB, and the mean absolute chroma error in 8-bit units, borders cropped."""
    inner = (slice(border, -border), slice(border, -border))
    sr, gt = sr[inner], gt[inner]
    difference = np.abs(ycbcr(sr) - ycbcr(gt))
    rgb = sr.astype(np.float64) - gt.astype(np.float64)
    return {
        "psnr_y": float(10 * np.log10(255**2 / np.mean(difference[..., 0] ** 2))),
        "psnr_rgb": float(10 * np.log10(255**2 / np.mean(rgb**2))),
        "chroma_mae": float(difference[..., 1:].mean()),
        "chroma_p99": float(np.percentile(difference[..., 1:], 99)),
    }


def train(
    losses: dict[str, nn.Module], photos: Sequence[Image], scale: int, iterations: int, seed: int
) -> dict[str, nn.Module]:
    """Train one network for each loss: same start, same batches, one-cycle learning rate."""
    nets: dict[str, nn.Module] = {}
    steps: list[tuple[nn.Module, nn.Module, torch.optim.Optimizer, Any]] = []
    for name, loss in losses.items():
        torch.manual_seed(seed)
        nets[name] = ESC(scale, **NETWORK)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            nets[name].parameters(), LEARNING_RATE, betas=(0.9, 0.9), weight_decay=0
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=iterations)
        steps.append((nets[name], loss, optimizer, schedule))
    source = batches(photos, scale, seed)
    for _ in tqdm(range(iterations), unit="iteration"):
        lq, gt = next(source)
        for net, loss, optimizer, schedule in steps:
            optimizer.zero_grad()
            loss(net(lq), gt).backward()
            optimizer.step()
            schedule.step()
    return nets


def evaluate(method: Callable[[Image], Image], pairs: Sequence[Pair], border: int) -> dict[str, float]:
    """Average figures over a test set."""
    rows = [figures_of(method(pair.lq), pair.gt, border) for pair in pairs]
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def draw(
    methods: dict[str, Callable[[Image], Image]], pairs: Sequence[Pair], path: Path, crop: int = 96
) -> None:
    """Draw, for the images whose colours differ most, the same crop by every method, with chroma errors."""
    from matplotlib.figure import Figure

    worst = []
    for pair in pairs:
        results = {name: method(pair.lq) for name, method in methods.items()}
        errors = {name: np.abs(ycbcr(sr) - ycbcr(pair.gt))[..., 1:].mean(-1) for name, sr in results.items()}
        smooth = cv2.boxFilter(np.max(list(errors.values()), axis=0), -1, (crop, crop))
        inner = smooth[crop // 2 : -crop // 2, crop // 2 : -crop // 2]
        top, left = np.unravel_index(inner.argmax(), inner.shape)
        window = (slice(top, top + crop), slice(left, left + crop))
        worst.append((inner.max(), pair, window, results, errors))
    worst.sort(key=lambda item: -item[0])
    rows = worst[:3]
    names = ["HR", *methods]
    figure = Figure(figsize=(2.1 * len(names), 4.4 * len(rows)))
    axes = figure.subplots(2 * len(rows), len(names))
    for row, (_, pair, window, results, errors) in enumerate(rows):
        for column, name in enumerate(names):
            top_axis, bottom_axis = axes[2 * row, column], axes[2 * row + 1, column]
            top_axis.imshow((pair.gt if name == "HR" else results[name])[window])
            top_axis.set_title(name if row == 0 else "", fontsize=8)
            bottom_axis.axis("off")
            if name != "HR":
                bottom_axis.imshow(errors[name][window], vmin=0, vmax=16, cmap="magma")
            top_axis.set_xticks([])
            top_axis.set_yticks([])
        axes[2 * row, 0].set_ylabel(pair.name, fontsize=8)
    figure.suptitle("Each crop, and below it the chroma error (black 0, white 16 of 255)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 90})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--train", type=Path, required=True, help="folder of HR photographs to train on")
    parser.add_argument(
        "--val",
        type=Path,
        nargs="+",
        required=True,
        help="test sets, as in datasets/README.md; the picture shows images of the first",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), default=2)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--chroma-weights",
        type=float,
        nargs="+",
        default=[0.0, 0.1, 0.2, 0.3],
        help="YChannelL1Loss to try",
    )


def run(args: argparse.Namespace) -> int:
    """Train, measure, draw."""
    size = PATCH * args.scale
    photos = [read_rgb(args.train / path) for path in find_images(args.train, recursive=False)]
    photos = [photo for photo in photos if min(photo.shape[:2]) >= size]
    if not photos:
        raise UserError(f"{args.train}: no photograph is as large as a training crop, {size}×{size} pixels.")
    sets = {folder.name: read_pairs(folder, args.scale) for folder in args.val}
    losses: dict[str, nn.Module] = {"RGB L1": nn.L1Loss()}
    for weight in args.chroma_weights:
        losses[f"Y L1 + {weight:g} chroma"] = YChannelL1Loss(chroma_weight=weight)
    nets: dict[str, nn.Module] = {
        "bicubic": Bicubic(args.scale),
        **train(losses, photos, args.scale, args.iterations, args.seed),
    }

    def method(net: nn.Module) -> Callable[[Image], Image]:
        return lambda lq: super_resolve(net.eval(), lq, torch.device("cpu"))

    methods = {name: method(net) for name, net in nets.items()}
    table = {
        set_name: {name: evaluate(call, pairs, args.scale) for name, call in methods.items()}
        for set_name, pairs in sets.items()
    }
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {"network": NETWORK, "scale": args.scale, "iterations": args.iterations, "seed": args.seed}
    settings |= {"batch": BATCH, "patch": PATCH, "photographs": len(photos), "torch": torch.__version__}
    mmengine.dump({"settings": settings, "results": table}, args.output / "loss_comparison.json", indent=1)
    draw(methods, sets[args.val[0].name], args.output / "loss_comparison.jpg")
    head = ["set", "loss", "Y PSNR", "RGB PSNR", "chroma error, mean", "99th percentile"]
    keys = ("psnr_y", "psnr_rgb", "chroma_mae", "chroma_p99")
    lines = [
        [set_name, name, *(f"{row[key]:.3f}" for key in keys)]
        for set_name, rows in table.items()
        for name, row in rows.items()
    ]
    print(markdown_table(head, lines))
    return 0


if __name__ == "__main__":
    sys.exit(
        run_command(
            "compare_losses",
            sys.argv[1:],
            prog="python docs/studies/compare_losses.py",
        )
    )
