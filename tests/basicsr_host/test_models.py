"""Models of BasicSR train ESC as ESCModel does: start from weights, stop, and go on exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import checkpoint, live, paired, training_options, write, write_images

from esc_basicsr.archs import ESC
from esc_basicsr.weights.write import write_safetensors

KERNELS = {
    **{"blur_kernel_size": 21, "kernel_list": ["iso", "aniso"], "kernel_prob": [0.5, 0.5], "sinc_prob": 0.1},
    **{"blur_sigma": [0.2, 3], "betag_range": [0.5, 4], "betap_range": [1, 2]},
}
NOISE = {
    **{"resize_prob": [0.2, 0.7, 0.1], "resize_range": [0.5, 1.5], "gaussian_noise_prob": 0.5},
    **{"noise_range": [1, 30], "poisson_scale_range": [0.05, 3], "gray_noise_prob": 0.4},
    "jpeg_range": [30, 95],
}
DEGRADED: dict[str, Any] = {
    **NOISE,
    **{f"{key}2": value for key, value in NOISE.items()},
    **{"second_blur_prob": 0.8, "gt_size": 32, "queue_size": 180},
}
GAN = {
    "gan_opt": {"type": "GANLoss", "gan_type": "vanilla", "real_label_val": 1.0, "loss_weight": 0.1},
    **{"optim_d": {"type": "SGD", "lr": 1e-4, "momentum": 0.9}, "net_d_iters": 1, "net_d_init_iters": 0},
}
DISCRIMINATOR = {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 4}
MODELS: dict[str, dict[str, Any]] = {
    "SRModel": {},
    "SRGANModel": {"network_d": DISCRIMINATOR, "train": GAN},
    "ESRGANModel": {"network_d": DISCRIMINATOR, "train": GAN},
    "RealESRNetModel": {**DEGRADED, "gt_usm": True},
    "RealESRGANModel": {
        **{"network_d": DISCRIMINATOR, "train": GAN, **DEGRADED},
        **{"l1_gt_usm": True, "percep_gt_usm": True, "gan_gt_usm": False},
    },
}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    write_images(tmp_path / "train", count=4, height=32, width=32)
    write_images(
        tmp_path / "val", count=2, height=32, width=40
    )  # which Real-ESRGAN sharpens with a radius of 25
    crops = {"gt_size": 16, "use_hflip": True, "use_rot": True}
    opt = training_options(paired("Train", tmp_path / "train", **crops), paired("Val", tmp_path / "val"))
    opt["train"] |= {"optim_g": {"type": "AdamW", "lr": 1e-3}}
    opt["datasets"]["train"] |= {"num_worker_per_gpu": 0, "persistent_workers": False}
    torch.manual_seed(0)
    network = {key: value for key, value in opt["network_g"].items() if key != "type"}
    write_safetensors(tmp_path / "start.safetensors", ESC(**network).state_dict(), {"param_key": "params"})
    opt["path"]["pretrain_network_g"] = str(tmp_path / "start.safetensors")
    opt["logger"]["use_tb_logger"] = False
    return {**opt, "num_gpu": 0}


@pytest.mark.parametrize("model", MODELS)
def test_models_of_basicsr_start_from_weights_save_and_go_on_exactly(
    model: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    more = MODELS[model]
    opt = {**options, "model_type": model, **more, "train": {**options["train"], **more.get("train", {})}}
    if model.startswith("Real"):
        names = "".join(f"{number}.png\n" for number in range(4))
        (tmp_path / "names.txt").write_text(names)
        loader = {key: value for key, value in opt["datasets"]["train"].items() if "_lq" not in key}
        real = {"type": "RealESRGANDataset", "meta_info": str(tmp_path / "names.txt"), "final_sinc_prob": 0.8}
        twice = {**KERNELS, **{f"{key}2": value for key, value in KERNELS.items()}}
        opt["datasets"] = {**opt["datasets"], "train": {**loader, **real, **twice}}
    write(tmp_path / "train.yml", opt)
    halves = ["--force_yml", "name=halves"]
    lives = live(
        tmp_path,
        [
            {"arguments": []},
            {"arguments": [*halves, "train:total_iter=2"]},
            {"arguments": ["--auto_resume", *halves]},
        ],
    )
    assert [each["codes"] for each in lives] == [[0]] * 3, json.dumps(lives, indent=1).replace("\\n", "\n")
    assert "Resuming training from epoch: 0, iter: 2." in lives[2]["output"]
    whole, resumed = (checkpoint(tmp_path / "experiments" / name, 4) for name in ("single", "halves"))
    for key in ("params", "params_ema"):
        torch.testing.assert_close(resumed["weights"][key], whole["weights"][key], rtol=0, atol=0)
    assert resumed["state"]["metrics"]["history"] == whole["state"]["metrics"]["history"]
    assert [entry["iter"] for entry in whole["state"]["metrics"]["history"]] == [2, 4]
    assert "psnr" in (tmp_path / "experiments" / "single" / "metrics" / "Val.csv").read_text()
