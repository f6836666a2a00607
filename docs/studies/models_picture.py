"""Draw docs/models.png: what ships beside bicubic and the original, and held-out PSNR by hours of training.

    python docs/studies/models_picture.py
    python docs/studies/models_picture.py --add ESC-light_x2=experiments/ESC-light_x2_photographs

Curves are kept in docs/models.json; with --add an experiment's is put behind those of its network, as its
weights began where they ended. The picture comes with scikit-image.
"""

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib as mpl
import mmengine
import numpy as np
import torch

from esc_basicsr.archs import Bicubic
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.degradation import reduce_uint8
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.metrics.quality import super_resolve
from esc_basicsr.report.experiment import read_experiment
from esc_basicsr.upscale import Upscaler

mpl.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parents[1]
SET = "heldout"  # the validation set's name in the experiments
PHOTOGRAPH, EYE = "chelsea", (slice(60, 160), slice(85, 225))
SCALES = {"ESC-light_x2": 2, "ESC-light_x4": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--add", action="append", default=[], metavar="NETWORK=EXPERIMENT", help="another stretch"
    )


def run(args: argparse.Namespace) -> int:
    """Take up the experiments' curves, and draw."""
    curves = mmengine.load(DOCS / "models.json") if (DOCS / "models.json").exists() else {}
    for pair in args.add:
        network, _, folder = pair.partition("=")
        if network not in SCALES or not folder:
            raise UserError(f"--add takes NETWORK=EXPERIMENT, with one of {', '.join(SCALES)}; got {pair!r}.")
        stretch = _stretch(Path(folder))
        if stretch in curves.setdefault(network, []):
            raise UserError(f"{folder}: its curve is among those of {network} already.")
        curves[network].append(stretch)
    if args.add:
        mmengine.dump(curves, DOCS / "models.json", indent=1)
    _draw(curves)
    return 0


def _stretch(folder: Path) -> dict[str, object]:
    """Give hours, iterations and PSNR of the held-out photographs of an experiment."""
    experiment = read_experiment(folder)
    psnr = experiment.curves.get(f"metrics/{SET}/psnr")
    rate, batch = (
        experiment.curves.get("images_per_second"),
        experiment.options.get("datasets.train.global_batch_size"),
    )
    if not psnr or not rate or batch is None:
        raise UserError(f"{folder}: no PSNR of {SET!r}, no throughput, or no global_batch_size.")
    seconds = int(batch) / statistics.median(rate.values())
    iterations = sorted(psnr)
    return {
        "iterations": iterations,
        "hours": [round(iteration * seconds / 3600, 4) for iteration in iterations],
        "psnr": [round(psnr[iteration], 4) for iteration in iterations],
    }


def _draw(curves: dict[str, list[dict[str, list[float]]]]) -> None:
    figure = plt.figure(figsize=(8.8, 7.6), layout="constrained")
    rows = figure.subfigures(len(SCALES) + 1, 1, height_ratios=[*[1.0] * len(SCALES), 1.1])
    for row, (network, scale) in zip(rows, SCALES.items(), strict=False):
        photograph = load_sample_image(PHOTOGRAPH)
        height, width = (length - length % scale for length in photograph.shape[:2])
        hr = np.ascontiguousarray(photograph[:height, :width])
        lr = reduce_uint8(hr, scale)
        panels = {
            f"bicubic ×{scale}": super_resolve(Bicubic(scale), lr, torch.device("cpu")),
            network: Upscaler(scale=scale, precision="fp32")(lr),
            "original": hr,
        }
        for axes, (title, image) in zip(row.subplots(1, len(panels)), panels.items(), strict=True):
            axes.imshow(image[EYE])
            axes.set_title(title, fontsize=9)
            axes.set_axis_off()
    for axes, network in zip(rows[-1].subplots(1, len(SCALES)), SCALES, strict=True):
        hours = 0.0
        for stretch in curves.get(network, []):
            axes.plot([hours + hour for hour in stretch["hours"]], stretch["psnr"], marker=".", color="C0")
            hours += stretch["hours"][-1]
        axes.set(xlabel="hours", ylabel="held-out PSNR, dB")
        axes.set_title(network, fontsize=9)
        axes.grid(alpha=0.3)
    figure.savefig(DOCS / "models.png", dpi=100)


if __name__ == "__main__":
    sys.exit(run_command("models_picture", sys.argv[1:], prog="python docs/studies/models_picture.py"))
