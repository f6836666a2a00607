"""Quality is measured as the field does: on Y, borders cropped, of RGB images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esc_basicsr.archs import Bicubic
from esc_basicsr.archs.resize import imresize
from esc_basicsr.commands.benchmark_set import lay_out_benchmark
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.photos import load_photograph
from esc_basicsr.metrics.quality import measure_quality, pairs_of_set, psnr_and_ssim

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A test set of one photograph."""
    (tmp_path / "originals").mkdir()
    Image.fromarray(load_photograph("coffee")[:64, :81]).save(tmp_path / "originals" / "coffee.png")
    lay_out_benchmark(tmp_path / "originals", tmp_path / "Set5", [2])
    return tmp_path


def test_figures_are_of_luma_inside_the_border() -> None:
    gt = np.full((32, 40, 3), 100, np.uint8)
    sr = gt.copy()
    sr[2:-2, 2:-2, 0] += 20  # red, which luma weighs by 65.481 / 255
    sr[:2] = 255
    expected = 20 * math.log10(255 / (20 * 65.481 / 255))
    assert psnr_and_ssim(sr, gt, 2)["psnr"] == pytest.approx(expected, abs=1e-3)
    assert psnr_and_ssim(sr, gt, 0)["psnr"] < expected - 3
    assert psnr_and_ssim(gt, gt, 2) == {"psnr": float("inf"), "ssim": pytest.approx(1)}


def test_a_network_is_measured_on_what_it_makes_of_lr(data: Path) -> None:
    (pair,) = pairs_of_set(data, "Set5", 2)
    gt, lq = (np.asarray(Image.open(file)) for file in pair)
    assert gt.shape == (64, 80, 3) and lq.shape == (32, 40, 3)
    sr = imresize(torch.from_numpy(lq.copy()).permute(2, 0, 1).double(), 2).round().clamp(0, 255)
    expected = psnr_and_ssim(sr.byte().permute(1, 2, 0).numpy(), gt, 2)
    measured = measure_quality(Bicubic(2), [pair], 2, CPU, "bicubic")
    assert measured["psnr"] == pytest.approx(expected["psnr"], abs=1e-2)
    assert measured["ssim"] == pytest.approx(expected["ssim"], abs=1e-4)
    assert 20 < measured["psnr"] < 60


def test_what_is_missing_or_does_not_fit_is_told(data: Path) -> None:
    assert pairs_of_set(data, "Urban100", 2) == []
    lq = data / "Set5/LR_bicubic/X2/coffeex2.png"
    Image.new("RGB", (40, 31)).save(lq)
    with pytest.raises(UserError, match=r"coffee.png is of 64×80, .*coffeex2.png of 31×40"):
        pairs_of_set(data, "Set5", 2)
    lq.unlink()
    with pytest.raises(UserError, match=r"coffeex2.png is missing: 'benchmark-set' makes"):
        pairs_of_set(data, "Set5", 2)
