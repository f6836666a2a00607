"""The loss comparison trains every network alike and measures what it says."""

import argparse
import json

import compare_losses
import cv2
import numpy as np
import pytest
import torch
from compare_losses import batches, figures_of, train

from esc_basicsr.commands.benchmark_set import lay_out_benchmark
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.sample_images import load_sample_image


@pytest.fixture
def folders(tmp_path):
    """A folder to train on, and a test set."""
    for name, photograph, size in (("train", "coffee", 96), ("originals", "chelsea", 128)):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / "photo.png"), load_sample_image(photograph)[:size, :size, ::-1])
    lay_out_benchmark(tmp_path / "originals", tmp_path / "Set", [2])
    return tmp_path


def arguments(folders, *more):
    parser = argparse.ArgumentParser()
    compare_losses.add_arguments(parser)
    paths = ["--train", folders / "train", "--val", folders / "Set", "-o", folders / "out"]
    return parser.parse_args([*map(str, paths), *more])


def test_comparison_writes_figures_of_every_loss_and_a_picture(folders, capsys):
    assert compare_losses.run(arguments(folders, "--iterations", "2", "--chroma-weights", "0", "0.5")) == 0
    results = json.loads((folders / "out/loss_comparison.json").read_text())
    assert results["settings"]["iterations"] == 2
    assert list(results["results"]["Set"]) == ["bicubic", "RGB L1", "Y L1 + 0 chroma", "Y L1 + 0.5 chroma"]
    assert cv2.imread(str(folders / "out/loss_comparison.jpg")) is not None
    bicubic = results["results"]["Set"]["bicubic"]
    assert f"| Set | bicubic | {bicubic['psnr_y']:.3f} |" in capsys.readouterr().out


def test_missing_photographs_are_told(folders):
    args = arguments(folders)
    args.train = folders / "Set"
    with pytest.raises(UserError, match="holds no images"):
        compare_losses.run(args)


def test_y_psnr_is_that_of_basicsr():
    from basicsr.metrics import calculate_psnr

    rng = np.random.default_rng(0)
    gt = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
    sr = np.clip(gt + rng.normal(0, 5, gt.shape), 0, 255).astype(np.uint8)
    figures = figures_of(sr, gt, border=2)
    bgr = [np.ascontiguousarray(image[:, :, ::-1]) for image in (sr, gt)]
    assert figures["psnr_y"] == pytest.approx(calculate_psnr(*bgr, 2, test_y_channel=True), abs=1e-3)
    assert figures["psnr_rgb"] == pytest.approx(calculate_psnr(*bgr, 2), abs=1e-3)


def test_networks_start_alike_and_see_the_same_batches():
    photos = [load_sample_image("coffee")]
    losses = {"first": torch.nn.L1Loss(), "second": torch.nn.L1Loss()}
    first, second = train(losses, photos, 2, iterations=2, seed=0).values()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_are_8_bit_reductions_of_their_crops():
    lq, gt = next(batches([load_sample_image("coffee")], 2, seed=0))
    assert gt.shape[-1] == 2 * lq.shape[-1]
    assert torch.equal((lq * 255).round() / 255, lq)
    assert (torch.nn.functional.avg_pool2d(gt, 2) - lq).abs().mean() < 0.02
