"""Draw the picture at the top of README.md: LR, bicubic, the shipped ESC-light, and HR, side by side.

    python docs/studies/readme_picture.py -o docs/readme.png

The image comes with scikit-image and is not among those that the shipped networks were trained on.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from esc_basicsr.archs import Bicubic
from esc_basicsr.data.degradation import reduce_uint8
from esc_basicsr.metrics.quality import psnr_and_ssim, super_resolve
from esc_basicsr.upscale import Upscaler

SCALE = 4
TOP, LEFT, SIDE = 20, 140, 216  # of the part that is shown
GAP, CAPTION = 6, 24


def draw() -> Image.Image:
    """Draw four panels; captions have PSNR on Y of the whole image."""
    photograph = data.astronaut()
    height, width = (length - length % SCALE for length in photograph.shape[:2])
    hr = np.ascontiguousarray(photograph[:height, :width])
    lr = reduce_uint8(hr, SCALE)
    results = {
        "bicubic": super_resolve(Bicubic(SCALE), lr, torch.device("cpu")),
        "ESC-light (shipped)": Upscaler(scale=SCALE, precision="fp32")(lr),
    }
    panels = {"LR": lr.repeat(SCALE, axis=0).repeat(SCALE, axis=1)}
    for name, sr in results.items():
        panels[f"{name}: {psnr_and_ssim(sr, hr, SCALE)['psnr']:.2f} dB"] = sr
    panels["HR"] = hr
    sheet = Image.new("RGB", (len(panels) * (SIDE + GAP) - GAP, SIDE + CAPTION), "white")
    for number, (caption, panel) in enumerate(panels.items()):
        left = number * (SIDE + GAP)
        sheet.paste(Image.fromarray(panel[TOP : TOP + SIDE, LEFT : LEFT + SIDE]), (left, CAPTION))
        ImageDraw.Draw(sheet).text((left, 3), caption, "black", ImageFont.load_default(15))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/readme.png"))
    draw().save(parser.parse_args().output, optimize=True)
