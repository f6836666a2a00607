"""Measure what `upscale --ensemble` gains, and in which light what was upscaled is to be reduced.

python docs/studies/upscale_options.py --data DIR [--set Set5] [--model ESC-light_x2 ESC-light_x4]
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from esc_basicsr.common.tables import markdown_table
from esc_basicsr.data.image_folder import read_rgb
from esc_basicsr.metrics.quality import pairs_of_set, psnr_and_ssim
from esc_basicsr.upscale import Upscaler
from esc_basicsr.upscale.output_size import reduced


def in_linear_light(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Reduce 8-bit sRGB as `reduced` does, but by the light that its values stand for."""
    values = image / 255
    light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    light = reduced(np.rint(light * 65535).astype(np.uint16), size) / 65535
    values = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(values * 255).astype(np.uint8)


def main() -> None:
    """Print a row for each network: means over the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the test set's folder")
    parser.add_argument("--set", default="Set5")
    parser.add_argument("--model", nargs="+", default=["ESC-light_x2", "ESC-light_x4"])
    args = parser.parse_args()
    rows = []
    for model in args.model:
        single, ensemble = Upscaler(model), Upscaler(model, ensemble=True)
        figures = []
        for hr_path, lr_path in tqdm(pairs_of_set(args.data, args.set, single.scale), desc=model):
            hr, lr = read_rgb(hr_path), read_rgb(lr_path)
            sr, size = single(lr), lr.shape[:2]
            figures.append(
                [
                    *(psnr_and_ssim(result, hr, single.scale)["psnr"] for result in (sr, ensemble(lr))),
                    *(
                        psnr_and_ssim(small, lr, 0)["psnr"]
                        for small in (reduced(sr, size), in_linear_light(sr, size))
                    ),
                ]
            )
        one, mean, encoded, linear = np.mean(figures, 0)
        rows.append(
            [model, *(f"{value:.3f} dB" for value in (one, mean)), f"{mean - one:+.3f} dB"]
            + [f"{value:.2f} dB" for value in (encoded, linear)]
        )
    heads = ["network", "once", "ensemble", "gain", "reduced as encoded", "in linear light"]
    print(markdown_table(heads, rows))


if __name__ == "__main__":
    main()
