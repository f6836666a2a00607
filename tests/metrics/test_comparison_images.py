"""ComparisonImages of bicubic, SR and GT."""

from typing import Any

import numpy as np
import pytest
import torch
from basicsr.utils import tensor2img

from esc_basicsr.archs.resize import imresize
from esc_basicsr.metrics.comparison_images import CAPTION, SIDE, ComparisonImages, cut


class Written(dict[str, np.ndarray]):
    def add_image(self, tag: str, comparison: np.ndarray, iteration: int, dataformats: str) -> None:
        assert (dataformats, iteration, comparison.dtype) == ("HWC", 8, np.uint8)
        self[tag] = comparison


def written(*images: Any, scale: int = 2) -> Written:
    comparisons, result = ComparisonImages(scale), Written()
    for image in images:
        comparisons.add(*image)
    comparisons.write(result, "Set5", 8)
    return result


def image(height: int, width: int, channels: int = 3) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """LR, and SR and GT of twice its size."""
    rng = np.random.default_rng(0)
    lr = torch.from_numpy(rng.random((channels, height, width), dtype=np.float32))
    shape = (2 * height, 2 * width, 3)[: 3 if channels == 3 else 2]
    sr, gt = rng.integers(0, 256, (2, *shape), dtype=np.uint8)
    return lr, sr, gt


def test_sheet_holds_its_panels_and_a_caption() -> None:
    lr, sr, gt = image(30, 40)
    ((tag, comparison),) = written(("baby", lr, sr, gt, {"psnr": 33.123456})).items()
    assert tag == "bicubic_SR_GT/Set5/baby"
    panels = dict(cut(comparison, tag.split("/")[0]))
    assert list(panels) == ["bicubic", "SR", "GT"]
    np.testing.assert_array_equal(panels["SR"], sr[:, :, ::-1])
    np.testing.assert_array_equal(panels["GT"], gt[:, :, ::-1])
    np.testing.assert_array_equal(panels["bicubic"], tensor2img([imresize(lr, 2)[None]])[:, :, ::-1])
    assert np.ptp(comparison[: CAPTION // 2]) > 100


def test_of_a_large_picture_the_middle_is_shown_as_it_is_in_the_whole() -> None:
    lr, sr, gt = image(200, 151)
    (comparison,) = written(("baby", lr, sr, gt, {})).values()
    bicubic, panel, _ = (panel.image for panel in cut(comparison, "bicubic_SR_GT"))
    assert panel.shape == (SIDE, SIDE, 3)
    top, left = (400 - SIDE) // 2, 2 * ((151 - SIDE // 2) // 2)
    window = slice(top, top + SIDE), slice(left, left + SIDE)
    np.testing.assert_array_equal(panel, sr[window][:, :, ::-1])
    whole = tensor2img([imresize(lr, 2)[None]])[window][:, :, ::-1]
    assert np.abs(bicubic.astype(int) - whole).max() <= 1  # rounding


@pytest.mark.parametrize("reference", [None, np.zeros((10, 10, 3), np.uint8)])
def test_without_a_reference_of_its_size_a_sheet_has_two_panels(reference: np.ndarray | None) -> None:
    lr, sr, _ = image(30, 40)
    ((tag, comparison),) = written(("baby", lr, sr, reference, {})).items()
    assert tag == "bicubic_SR/Set5/baby"
    np.testing.assert_array_equal(cut(comparison, "bicubic_SR")[1].image, sr[:, :, ::-1])


def test_gray_images_and_names_of_any_bytes_are_drawn() -> None:
    lr, sr, gt = image(30, 40, channels=1)
    ((tag, comparison),) = written(("b\udce9b\u00e9", lr, sr, gt, {})).items()
    assert tag == "bicubic_SR_GT/Set5/b\\udce9b\u00e9"
    np.testing.assert_array_equal(cut(comparison, "bicubic_SR_GT")[1].image, np.stack([sr] * 3, axis=-1))


def test_there_are_three_at_most_and_none_of_another_scale() -> None:
    entries = [(str(number), *image(8, 8), {}) for number in range(5)]
    assert len(written(*entries)) == 3
    assert not written(*entries, scale=3)
