"""What ships is whole, says what it is, and reaches what the list says that it does."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from basicsr.metrics import calculate_psnr

from esc_basicsr.__main__ import main
from esc_basicsr.archs.resize import imresize
from esc_basicsr.archs.variants import VARIANTS
from esc_basicsr.commands.demo import HELD_OUT_PHOTOGRAPHS
from esc_basicsr.data.degradation import reduce_uint8
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.metrics.quality import super_resolve
from esc_basicsr.options.recipes import Recipe, benchmark_text
from esc_basicsr.upscale import Upscaler
from esc_basicsr.upscale.upscaler import BORDER, mirrored
from esc_basicsr.weights.read import read_safetensors_metadata
from esc_basicsr.weights.shipped import load_network, model_list, weights_file

TOLERANCE = 0.01  # dB
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", model_list())
def test_file_and_list_say_the_same(name: str) -> None:
    listed, file = model_list()[name], weights_file(name)
    about = read_safetensors_metadata(file)
    assert (about["variant"], about["scale"]) == (listed.variant, str(listed.scale))
    assert about["precision"] == "fp16"
    assert file.stat().st_size < 3 * 2**20
    trained = load_network(name)
    assert (trained.variant, trained.scale) == (listed.variant, listed.scale)
    assert name == f"{listed.variant}_x{listed.scale}"
    assert listed.data
    assert listed.licence


@pytest.mark.parametrize("name", model_list())
def test_photographs_are_upscaled_as_well_as_the_list_says(name: str) -> None:
    """As benchmarks measure it; by the Python interface as by the network on the mirrored image."""
    listed, upscale = model_list()[name], Upscaler(name, device="cpu")
    network, scale = load_network(name).network.eval(), listed.scale
    figures = []
    for photograph in HELD_OUT_PHOTOGRAPHS:
        hr = load_sample_image(photograph)
        hr = hr[: hr.shape[0] // scale * scale, : hr.shape[1] // scale * scale]
        lq = reduce_uint8(hr, scale)
        bicubic = imresize(torch.from_numpy(lq).permute(2, 0, 1).float(), scale).round().clamp(0, 255)
        edge = BORDER * scale
        enlarged = mirrored(torch.from_numpy(lq).permute(2, 0, 1)[None].float())[0].permute(1, 2, 0).byte()
        as_measured, whole = (super_resolve(network, image, CPU) for image in (lq, enlarged.numpy()))
        pictures = (
            *(as_measured, upscale(lq), whole[edge:-edge, edge:-edge]),
            bicubic.byte().permute(1, 2, 0).numpy(),
        )
        *results, truth = (np.ascontiguousarray(picture[..., ::-1]) for picture in (*pictures, hr))
        figures.append([calculate_psnr(sr, truth, crop_border=scale, test_y_channel=True) for sr in results])
    psnr, psnr_by_upscaler, psnr_mirrored, psnr_of_bicubic = np.mean(figures, 0)
    assert psnr == pytest.approx(listed.psnr["photographs"], abs=TOLERANCE)
    assert psnr_by_upscaler == pytest.approx(psnr_mirrored, abs=TOLERANCE)
    assert psnr_by_upscaler > psnr_of_bicubic + 0.5


@pytest.mark.parametrize("name", model_list())
def test_set5_is_upscaled_as_well_as_the_list_says(
    name: str, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ``esc_basicsr.test`` and its shipped option file."""
    listed = model_list()[name]
    recipe = Recipe(listed.variant, listed.scale, "photographs", VARIANTS[listed.variant])
    options = yaml.safe_load(benchmark_text(recipe))
    assert options["path"]["pretrain_network_g"] == name
    del options["datasets"]["test_2"]
    (tmp_path / "test.yml").write_text(yaml.safe_dump(options))
    (tmp_path / "datasets").symlink_to(data_root)
    monkeypatch.chdir(tmp_path)
    assert main(["test", "-opt", "test.yml", "--force_yml", "num_gpu=0"]) == 0
    text = (tmp_path / "results" / options["name"] / "results.csv").read_text()
    head, measured = (line.split(",") for line in text.splitlines()[:2])
    psnr = float(dict(zip(head, measured, strict=True))["Set5 psnr"])
    assert psnr == pytest.approx(listed.psnr["Set5"], abs=TOLERANCE)
