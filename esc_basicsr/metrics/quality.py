"""PSNR and SSIM as the field measures them: on Y, by BasicSR's metrics, of 8-bit images, borders cropped."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.image_folder import read_rgb
from esc_basicsr.data.source_image import source_image_size

Image = npt.NDArray[np.uint8]


def psnr_and_ssim(sr: Image, gt: Image, border: int) -> dict[str, float]:
    """Measure ``psnr`` in dB and ``ssim`` of (H, W, 3) RGB images, ``border`` pixels of each side cropped."""
    from basicsr.metrics import calculate_psnr, calculate_ssim

    # BGR, as BasicSR reads images
    pair = [np.ascontiguousarray(image[:, :, ::-1]) for image in (sr, gt)]
    return {
        "psnr": float(calculate_psnr(*pair, crop_border=border, test_y_channel=True)),
        "ssim": float(calculate_ssim(*pair, crop_border=border, test_y_channel=True)),
    }


def pairs_of_set(data: Path, name: str, scale: int) -> list[tuple[Path, Path]]:
    """List HR and LR files of a test set, laid out as datasets/README.md says; none if it does not exist.

    Raises:
        UserError: An LR image is missing, or of a size that does not go with its HR image.
    """
    files = sorted((data / name / "HR" / f"X{scale}").glob("*.png"))
    lq_folder = data / name / "LR_bicubic" / f"X{scale}"
    pairs = [(file, lq_folder / f"{file.stem}x{scale}.png") for file in files]
    for file, lq in pairs:
        if not lq.is_file():
            raise UserError(f"{lq} is missing: 'benchmark-set' makes the LR images of {name}.")
        (height, width), (lq_height, lq_width) = map(_size, (file, lq))
        if (lq_height * scale, lq_width * scale) != (height, width):
            raise UserError(
                f"{file} is of {height}×{width}, {lq} of {lq_height}×{lq_width}: ×{scale} does not make the "
                "one of the other. 'benchmark-set' crops and reduces them."
            )
    return pairs


def _size(file: Path) -> tuple[int, int]:
    with file.open("rb") as data:
        return source_image_size(data, str(file))


def super_resolve(net: nn.Module, lq: Image, device: torch.device) -> Image:
    """Run a network on an (H, W, 3) RGB image."""
    x = torch.from_numpy(lq).to(device).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        return net(x)[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()


def measure_quality(
    net: nn.Module, pairs: Sequence[tuple[Path, Path]], scale: int, device: torch.device, description: str
) -> dict[str, float]:
    """Measure a network's mean ``psnr`` and ``ssim`` over HR and LR files, borders of ``scale`` cropped."""
    figures = [
        psnr_and_ssim(super_resolve(net, read_rgb(lq), device), read_rgb(gt), scale)
        for gt, lq in tqdm(pairs, desc=description, unit="image", leave=False)
    ]
    return {kind: float(np.mean([row[kind] for row in figures])) for kind in ("psnr", "ssim")}
