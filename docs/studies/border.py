"""Measure what mirroring an image at its edges gains: PSNR on Y near the edges, with it and without.

python docs/studies/border.py --data DIR [--model ESC-light_x2 ESC-light_x4] [--set Set14]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from esc_basicsr import fast
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.data.image_folder import read_rgb
from esc_basicsr.metrics.quality import pairs_of_set
from esc_basicsr.upscale.upscaler import BORDER, mirrored
from esc_basicsr.weights.shipped import load_network

WIDTH = 8  # of the frame that is looked at, in LR pixels
_Y = np.array([65.481, 128.553, 24.966]) / 255  # BT.601


def frame_error(sr: np.ndarray, hr: np.ndarray, width: int) -> float:
    """Return the mean squared error on Y, in 8-bit levels, over a frame of ``width`` pixels."""
    difference = np.rint(sr * 255).clip(0, 255) @ _Y - hr.astype(float) @ _Y
    inner = difference[width:-width, width:-width]
    total = (difference**2).sum() - (inner**2).sum()
    return float(total / (difference.size - inner.size))


def main() -> None:
    """Print a row for each network: PSNR of the frame without and with the mirror image, over all images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the test set's folder")
    parser.add_argument("--set", default="Set14")
    parser.add_argument("--model", nargs="+", default=["ESC-light_x2", "ESC-light_x4"])
    args = parser.parse_args()
    rows = []
    for model in args.model:
        trained = load_network(model)
        network, scale = fast.prepare(trained.network), trained.scale
        errors = []
        pairs = pairs_of_set(args.data, args.set, scale)
        for hr_path, lr_path in tqdm(pairs, desc=model):
            lq = torch.from_numpy(read_rgb(lr_path).astype(np.float32) / 255).permute(2, 0, 1)[None]
            edge = BORDER * scale
            with torch.no_grad():
                images = network(lq), network(mirrored(lq))[:, :, edge:-edge, edge:-edge]
            errors.append(
                [
                    frame_error(sr[0].permute(1, 2, 0).numpy(), read_rgb(hr_path), WIDTH * scale)
                    for sr in images
                ]
            )
        psnr = 10 * np.log10(255**2 / np.array(errors)).mean(0)
        rows.append([model, f"{psnr[0]:.2f} dB", f"{psnr[1]:.2f} dB", f"{psnr[1] - psnr[0]:+.2f} dB"])
    print(markdown_table(["network", "zeros", "mirrored", "gain"], rows))


if __name__ == "__main__":
    main()
