"""Images of the size they had: noise and JPEG artefacts are what the field makes, and can be learned away."""

import json
import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_psnr
from PIL import Image
from tiny_training import checkpoint, live, training_options, write, write_images

from esc_basicsr.data.degraded_dataset import DegradedDataset


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", count=3, height=64, width=48)
    return tmp_path / "images"


def degraded(source: Path, phase: str = "val", **options: Any) -> DegradedDataset:
    crops = {"gt_size": 32, "use_hflip": True, "use_rot": True}
    sources = [{"dataroot_gt": str(source)}]
    return DegradedDataset(
        {"name": "Set", "phase": phase, "scale": 1, "sources": sources, **crops, **options}
    )


def rgb(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


def test_noise_to_test_on_is_that_of_swinirs_script(images: Path) -> None:
    image = cv2.imread(str(images / "hr" / "1.png")).astype(np.float32) / 255
    np.random.seed(seed=0)
    image += np.random.normal(0, 25 / 255, image.shape)
    item = degraded(images / "hr", noise_sigma=25)[1]
    expected = torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy())
    torch.testing.assert_close(item["lq"], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(
        item["gt"].mul(255).round().byte().permute(1, 2, 0), rgb(images / "hr/1.png")
    )
    assert item["lq"].min() < 0 and item["lq"].max() > 1
    assert item["lq_path"] == item["gt_path"] == str(images / "hr" / "1.png")


def test_artefacts_are_those_of_the_quality(images: Path, tmp_path: Path) -> None:
    for quality in (10, 90):
        item = degraded(images / "hr", jpeg_quality=quality)[2]
        Image.open(images / "hr" / "2.png").save(tmp_path / "a.jpg", quality=quality)  # another encoder's
        ours = item["lq"].mul(255).round().byte().permute(1, 2, 0).numpy()
        assert calculate_psnr(ours, rgb(tmp_path / "a.jpg"), 0) > 40
        assert not np.array_equal(ours, rgb(images / "hr" / "2.png"))


def test_gray_images_are_degraded_in_gray(tmp_path: Path) -> None:
    Image.fromarray(np.arange(0, 256, 4, np.uint8)[None].repeat(48, 0)).save(tmp_path / "gray.png")
    item = degraded(tmp_path, jpeg_quality=10)[0]
    assert (item["lq"][0] - item["lq"]).abs().max() == 0 and not torch.equal(item["lq"], item["gt"])


def test_luma_is_degraded_as_swinirs_script_does_it(images: Path, tmp_path: Path) -> None:
    """Gray files as they are, of 0 to 255; MATLAB's luma, of 16 to 235, of others; one channel either way."""
    gray = np.arange(0, 256, 4, np.uint8)[None].repeat(48, 0)
    Image.fromarray(gray).save(images / "hr" / "gray.png")
    dataset = degraded(images / "hr", jpeg_quality=10, color="y")
    items = {Path(item["gt_path"]).name: item for item in (dataset[i] for i in range(len(dataset)))}
    red, green, blue = rgb(images / "hr" / "0.png").astype(np.float64).transpose(2, 0, 1) / 255
    luma = np.round(16 + 65.481 * red + 128.553 * green + 24.966 * blue).astype(np.uint8)
    for name, image in (("gray.png", gray), ("0.png", luma)):
        found = {key: items[name][key].mul(255).round().byte() for key in ("gt", "lq")}
        np.testing.assert_array_equal(found["gt"], image[None])
        Image.fromarray(image).save(tmp_path / "a.jpg", quality=10)  # another encoder's
        assert calculate_psnr(found["lq"][0].numpy(), np.asarray(Image.open(tmp_path / "a.jpg")), 0) > 40
        assert not torch.equal(found["lq"], found["gt"])


def test_luma_of_a_crop_does_not_depend_on_what_else_is_in_it(tmp_path: Path) -> None:
    write_images(tmp_path / "images", count=1, height=64, width=48)
    white = np.full((64, 48, 3), 255, np.uint8)
    dataset = degraded(tmp_path / "images" / "hr.lmdb", "train", jpeg_quality=10, color="y")
    dataset._read_crop = lambda images, index: white
    assert dataset[0]["gt"].mul(255).round().unique().tolist() == [235]


@pytest.mark.parametrize("degradation", [{"noise_sigma": 25}, {"jpeg_quality": [10, 90]}])
def test_training_draws_crops_and_noise_anew_from_the_seed(images: Path, degradation: dict[str, Any]) -> None:
    dataset = degraded(images / "hr.lmdb", "train", **degradation)
    seen = []
    for seed in (0, 0, 1):
        random.seed(seed)
        np.random.seed(seed)
        seen.append(dataset[0])
    assert seen[0]["gt"].shape == seen[0]["lq"].shape == (3, 32, 32)
    assert torch.equal(seen[0]["lq"], seen[1]["lq"])
    assert not torch.equal(seen[0]["lq"] - seen[0]["gt"], seen[2]["lq"] - seen[2]["gt"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "degradation"), [("ESCRealM", {"noise_sigma": 50}), ("ESC", {"jpeg_quality": 10})]
)
def test_a_tiny_network_learns_to_remove_it(
    images: Path, tmp_path: Path, network: str, degradation: dict[str, Any]
) -> None:
    data = {"type": "DegradedDataset", **degradation}
    train = {"sources": [{"dataroot_gt": str(images / "hr.lmdb")}], "gt_size": 32}
    opt = training_options(
        {"name": "Train", **data, **train, "use_hflip": True, "use_rot": True},
        {"name": "Val", **data, "sources": [{"dataroot_gt": str(images / "hr")}]},
    )
    opt |= {"scale": 1}
    opt["network_g"] |= {"type": network, "upscaling_factor": 1}
    if network == "ESCRealM":
        opt["network_g"] |= {"upsampler": "conv", "unshuffle_mod": False}
    optimizer = {"type": "AdamW", "lr": 5e-3, "betas": [0.9, 0.9]}
    opt["train"] |= {"total_iter": 80, "optim_g": optimizer, "pixel_opt": {"type": "L1Loss"}}
    opt["train"]["scheduler"] = {"type": "MultiStepLR", "milestones": [60], "gamma": 0.2}
    opt["val"] |= {"val_freq": 80, "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 0}}}
    opt["logger"] |= {"save_checkpoint_freq": 80, "print_freq": 50}
    opt["datasets"]["train"] |= {"num_worker_per_gpu": 0, "persistent_workers": False}
    opt["datasets"]["train"] |= {"dataset_enlarge_ratio": 10}
    write(tmp_path / "train.yml", opt)
    (life,) = live(tmp_path, [{"arguments": []}])
    assert life["codes"] == [0], json.dumps(life, indent=1).replace("\\n", "\n")
    (measured,) = checkpoint(tmp_path / "experiments" / "single", 80)["state"]["metrics"]["history"]
    dataset = degraded(images / "hr", **degradation)
    inputs = [
        calculate_psnr(
            *(dataset[i][key].clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy() for key in ("lq", "gt")),
            0,
        )
        for i in range(len(dataset))
    ]
    assert measured["psnr"] > np.mean(inputs) + 0.3
