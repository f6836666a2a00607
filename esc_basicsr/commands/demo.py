"""Train a small ESC on embedded photographs for a few minutes, and compare it with bicubic upscaling.

Nothing is downloaded: the photographs come with scikit-image. They become an LMDB; BasicSR's pipelines train
and test by option files that lie in the output folder afterwards, to be read and changed. The photographs
that ESC is measured on are not among those that it is trained on, nor among those of the network that ships
with this package, which is measured beside it.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import mmengine
import numpy as np
import torch
import yaml
from tqdm import tqdm

from esc_basicsr.archs.bicubic_arch import Bicubic
from esc_basicsr.commands.benchmark_set import lay_out_benchmark
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets
from esc_basicsr.data.image_codec import encode_png
from esc_basicsr.data.image_folder import read_rgb
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.metrics.quality import Image, pairs_of_set, psnr_and_ssim, super_resolve
from esc_basicsr.options.recipes import Recipe, benchmark_text, training_text
from esc_basicsr.upscale import Upscaler

NAME = "ESC_demo_x2"
SCALE = 2
TRAINING_PHOTOGRAPHS = ("brick", "camera", "grass", "gravel", "motorcycle_left", "motorcycle_right", "rocket")
HELD_OUT_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
NETWORK = {
    "dim": 32,
    "pdim": 8,
    "n_blocks": 2,
    "conv_blocks": 2,
    "window_size": 16,
    "num_heads": 2,
}
ITERATIONS = 600
BATCH = 8
LR_PATCH = 32
SHIPPED = "ESC-light, as it ships"
METHODS = ("bicubic", "ESC", SHIPPED)
ZOOM = 80  # side of the detail in the pictures, in HR pixels
Figures = dict[str, dict[str, float]]  # by method, by metric


def write_option_files(folder: Path, iterations: int) -> tuple[Path, Path]:
    """Write the option files of the demonstration, train.yml and test.yml: the shipped recipe, made small."""
    recipe = Recipe("ESC", SCALE, "DFLIP", {"type": "ESC"})
    held_out = {
        "name": "photographs",
        "dataroot_gt": f"datasets/photographs/HR/X{SCALE}",
        "dataroot_lq": f"datasets/photographs/LR_bicubic/X{SCALE}",
    }
    train = mmengine.Config(yaml.safe_load(training_text(recipe)))
    train.merge_from_dict(
        {
            "name": NAME,
            "num_gpu": 1 if torch.cuda.is_available() else 0,
            "network_g": NETWORK,
            "datasets.train.name": "photographs",
            "datasets.train.sources": [{"dataroot_gt": "datasets/photographs_HR_sub.lmdb", "weight": 1.0}],
            "datasets.train.gt_size": LR_PATCH * SCALE,
            "datasets.train.global_batch_size": BATCH,
            "datasets.train.batch_size_per_gpu": BATCH,
            "datasets.train.num_worker_per_gpu": 1,
            "datasets.train.dataset_enlarge_ratio": 100,
            "datasets.val": held_out,
            "train.total_iter": iterations,
            "train.warmup_iter": iterations // 20,
            "train.ema_decay": 0.99,
            "train.optim_g.lr": 2e-3,
            "train.scheduler": {
                "_delete_": True,
                "type": "CosineAnnealingRestartLR",
                "periods": [iterations],
                "restart_weights": [1],
                "eta_min": 1e-6,
            },
            "logger.print_freq": 10,
            "logger.save_checkpoint_freq": iterations,
            "logger.use_tb_logger": False,
            "val.val_freq": iterations + 1,  # BasicSR validates at the end in any case
        }
    )
    test = mmengine.Config(yaml.safe_load(benchmark_text(recipe)))
    test.merge_from_dict(
        {
            "name": NAME,
            "num_gpu": train.num_gpu,
            "network_g": NETWORK,
            "datasets.test_1": held_out,
            "path.pretrain_network_g": f"experiments/{NAME}/models/net_g_latest.pth",
            "val.save_img": True,
            "val.pad_to_window": False,  # as in training: no published figure stands beside it
        }
    )
    test.datasets = {"test_1": test.datasets.test_1}
    files = folder / "train.yml", folder / "test.yml"
    for file, config in zip(files, (train, test), strict=True):
        text = yaml.safe_dump(config.to_dict(), sort_keys=False)
        file.write_text(
            f"# Written by: python -m esc_basicsr demo. Run it in this folder.\n{text}", encoding="utf-8"
        )
    return files


def prepare_data(folder: Path) -> None:
    """Make the training LMDB and the test set of held-out photographs below ``folder``."""
    images: dict[str, Path | Image] = {name: load_sample_image(name) for name in TRAINING_PHOTOGRAPHS}
    build_lmdb_sets(images, folder, "photographs", crop_size=240, step=120)
    lay_out_held_out(folder)


def lay_out_held_out(folder: Path) -> None:
    """Make the test set "photographs" of the held-out photographs below ``folder``."""
    originals = folder / "held_out"
    originals.mkdir()
    for name in HELD_OUT_PHOTOGRAPHS:
        (originals / f"{name}.png").write_bytes(encode_png(load_sample_image(name)[:, :, ::-1], 1))
    lay_out_benchmark(originals, folder / "photographs", [SCALE])


def run_pipeline(command: str, options: Path, iterations: int | None = None) -> None:
    """Run ``esc_basicsr.train`` or ``.test`` in the options' folder, a bar in place of its output.

    Raises:
        UserError: It failed; the message has its last lines.
    """
    package_parent = str(Path(__file__).resolve().parents[2])
    search_path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", f"esc_basicsr.{command}", "-opt", options.name],
        cwd=options.parent,
        env={**os.environ, "PYTHONPATH": search_path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    last_lines: deque[str] = deque(maxlen=20)
    assert process.stdout is not None
    with process, tqdm(total=iterations, desc=command, unit="it", disable=iterations is None) as bar:
        for line in process.stdout:
            last_lines.append(line.rstrip())
            progress = re.search(r"iter:\s*([\d,]+).*l_pix: (\S+)", line)
            if progress:
                bar.set_postfix_str(f"loss {progress[2]}", refresh=False)
                bar.update(int(progress[1].replace(",", "")) - bar.n)
    if process.returncode:
        raise UserError(f"esc_basicsr.{command} failed in {options.parent}:\n" + "\n".join(last_lines))


def draw(name: str, pictures: Mapping[str, Image], figures: Figures, path: Path) -> None:
    """Draw the photograph and, side by side, its most detailed part in each of ``pictures``."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    hr = pictures["HR"]
    edges = cv2.Laplacian(cv2.cvtColor(hr, cv2.COLOR_RGB2GRAY), cv2.CV_32F)
    detail = cv2.boxFilter(np.abs(edges), -1, (ZOOM, ZOOM))[ZOOM // 2 : -ZOOM // 2, ZOOM // 2 : -ZOOM // 2]
    top, left = (int(index) for index in np.unravel_index(detail.argmax(), detail.shape))
    figure = Figure(figsize=(3.2 * (1 + len(pictures)), 3.5))
    axes = figure.subplots(1, 1 + len(pictures))
    axes[0].imshow(hr)
    axes[0].add_patch(Rectangle((left, top), ZOOM, ZOOM, fill=False, edgecolor="red"))
    axes[0].set_title(name)
    for axis, (method, picture) in zip(axes[1:], pictures.items(), strict=True):
        axis.imshow(picture[top : top + ZOOM, left : left + ZOOM], interpolation="nearest")
        axis.set_title(f"{method}, {figures[method]['psnr']:.2f} dB" if method in figures else method)
    for axis in axes:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def compare(folder: Path) -> tuple[dict[str, Figures], list[Path]]:
    """Measure and draw bicubic, the ESC that was trained and the one that ships, on the held-out photographs.

    Returns:
        Figures by photograph, and the pictures' paths.
    """
    (folder / "pictures").mkdir()
    figures: dict[str, Figures] = {}
    paths = []
    bicubic, shipped = Bicubic(SCALE), Upscaler(scale=SCALE)
    for hr_file, lq_file in pairs_of_set(folder / "datasets", "photographs", SCALE):
        name, hr, lq = hr_file.stem, read_rgb(hr_file), read_rgb(lq_file)
        sr = read_rgb(folder / f"results/{NAME}/visualization/photographs/{lq_file.stem}_{NAME}.png")
        by_bicubic = super_resolve(bicubic, lq, torch.device("cpu"))
        pictures = {"bicubic": by_bicubic, "ESC": sr, SHIPPED: shipped(lq), "HR": hr}
        figures[name] = {method: psnr_and_ssim(pictures[method], hr, SCALE) for method in METHODS}
        paths.append(folder / "pictures" / f"{name}.png")
        draw(name, pictures, figures[name], paths[-1])
    return figures, paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("esc_demo"),
        help="new folder for everything (default: esc_demo)",
    )
    parser.add_argument(
        "--iterations", type=int, default=ITERATIONS, help=f"training iterations (default: {ITERATIONS})"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demonstration: 0 when ESC ends above bicubic, 1 when it does not."""
    folder: Path = args.output
    if args.iterations < 20:
        raise UserError(f"--iterations must be at least 20, got {args.iterations}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: remove it, or name another with -o.")
    importlib.import_module("basicsr")  # without it nothing should be begun
    (folder / "datasets").mkdir(parents=True, exist_ok=True)
    prepare_data(folder / "datasets")
    train_options, test_options = write_option_files(folder, args.iterations)
    run_pipeline("train", train_options, args.iterations)
    run_pipeline("test", test_options)
    return report(folder, args.iterations, *compare(folder))


def report(folder: Path, iterations: int, figures: Mapping[str, Figures], pictures: Sequence[Path]) -> int:
    """Print the table, the verdict and the paths, and write the figures to ``results.json``."""
    mean: Figures = {
        method: {
            key: float(np.mean([row[method][key] for row in figures.values()])) for key in ("psnr", "ssim")
        }
        for method in METHODS
    }
    lines = []
    for name, row in {**figures, "mean": mean}.items():
        bicubic, esc, shipped = (f"{row[key]['psnr']:.2f} dB / {row[key]['ssim']:.4f}" for key in METHODS)
        gain = row["ESC"]["psnr"] - row["bicubic"]["psnr"]  # the mean's is the last
        lines.append([name, bicubic, esc, f"{gain:+.2f} dB", shipped])
    results = {"iterations": iterations, "photographs": figures, "mean": mean}
    mmengine.dump(results, folder / "results.json", indent=1)
    verdict = f"{gain:.2f} dB above bicubic" if gain > 0 else f"NOT above bicubic: {-gain:.2f} dB below"
    print(f"\nHeld-out photographs, ×{SCALE}, on luma:\n")
    print(markdown_table(["photograph", "bicubic", "ESC", "gain", SHIPPED], lines))
    print(f"\nAfter {iterations} iterations ESC is {verdict} in PSNR on luma.")
    print("pictures:   " + "\n            ".join(map(str, pictures)))
    print(f"checkpoint: {folder / 'experiments' / NAME / 'models' / 'net_g_latest.pth'}")
    print(f"options:    {folder / 'train.yml'}, {folder / 'test.yml'}")
    return 0 if gain > 0 else 1
