"""Time a training step of ESC in its implementations, in turn, and compare their gradients.

    python docs/studies/training_step.py -o DIR
    python docs/studies/training_step.py --network ESC-light:kernels ESC-light:kernels-bf16
    python docs/studies/training_step.py --device cuda --network ESC:release-flex ESC --batch 64

A step is what BasicSR's train.py does with a batch: forward pass, RGB L1, backward pass, AdamW. The batch is
of crops of scikit-image's photographs. The learning rate is zero, so that each step of each form starts from
the same weights. Gradients are compared with the first form's of the same variant, parameter by parameter:
norm of the difference against norm. Writes training_step.json, training_step.md and training_step.png.
"""

import argparse
import sys

import numpy as np
import torch

from esc_basicsr.archs.variants import SCALES, VARIANTS
from esc_basicsr.commands.demo import TRAINING_PHOTOGRAPHS
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.degradation import make_pair
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.lab.measure.measure import (
    add_measuring_arguments,
    check_measuring_arguments,
)
from esc_basicsr.lab.measure.results import make_folder, publish
from esc_basicsr.lab.measure.training_step import draw, markdown, measure
from esc_basicsr.lab.networks.by_name import check_implementations, network_of

# autocast of the forward pass; weights stay float32
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--network",
        nargs="+",
        default=["ESC-light:release", "ESC-light", "ESC-light:kernels"],
        help="variants and their forms, named as for bench (default: ESC-light in three)",
    )
    parser.add_argument("--scale", type=int, choices=SCALES, default=2, help="upscaling factor (default: 2)")
    parser.add_argument("--batch", type=int, default=4, help="images (default: 4)")
    parser.add_argument("--patch", type=int, default=64, help="side of their LR (default: 64)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="bf16 is autocast (default: fp32)"
    )
    add_measuring_arguments(parser)


def crops(number: int, side: int) -> torch.Tensor:
    """Crop photographs at random, the same each time.

    Shape:
        Output: (number, 3, side, side), uint8.
    """
    photographs = [
        torch.from_numpy(load_sample_image(name)).permute(2, 0, 1) for name in TRAINING_PHOTOGRAPHS
    ]
    largest = min(min(image.shape[1:]) for image in photographs)
    if side > largest:
        raise UserError(
            f"--patch and --scale make crops of {side}, and the photographs have {largest} lines."
        )
    random = np.random.default_rng(0)
    images = []
    for index in range(number):
        image = photographs[index % len(photographs)]
        top, left = (int(random.integers(length - side + 1)) for length in image.shape[1:])
        images.append(image[:, top : top + side, left : left + side])
    return torch.stack(images)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write it down where asked."""
    device, dtype = check_measuring_arguments(args), PRECISIONS[args.precision]
    for name in args.network:
        if network_of(name) not in VARIANTS:
            raise UserError(f"--network {name}: expected {', '.join(VARIANTS)}, or a form of one.")
        if device.type == "cpu" and name.endswith(":release-flex"):
            raise UserError(f"--network {name}: Flex has no gradients on a CPU; leave it out here.")
    if min(args.batch, args.patch) < 1:
        raise UserError(f"--batch and --patch must be at least 1, got {args.batch} and {args.patch}.")
    check_implementations(args.network, device, dtype or torch.float32)
    make_folder(args.output)
    pair = make_pair(crops(args.batch, args.patch * args.scale), args.scale)
    lq, gt = pair["lq"].to(device), pair["gt"].to(device)
    rows = measure(args.network, args.scale, lq, gt, dtype, args.repeats, args.warmup)
    keys = ("scale", "batch", "patch", "precision", "repeats", "warmup")
    settings = {key: getattr(args, key) for key in keys}
    publish(args.output, "training_step", markdown(rows), settings, rows, device, lambda: draw(rows))
    return 0


if __name__ == "__main__":
    name = "training_step"
    sys.exit(run_command(name, sys.argv[1:], prog=f"python -m {name}"))
