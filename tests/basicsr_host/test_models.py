"""Models of BasicSR train ESC as ESCModel does: start from weights, stop, and go on exactly."""

import copy
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.models import build_model
from tiny_training import checkpoint, live, paired, same, training_options, write, write_images

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
    **{"second_blur_prob": 0.8, "gt_size": 32, "queue_size": 2},
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


@pytest.fixture
def options_of(tmp_path: Path, options: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """Give options for one of `MODELS`, with the data set that it needs."""

    def make(model: str) -> dict[str, Any]:
        more = MODELS[model]
        opt = {**options, "model_type": model, **more, "train": {**options["train"], **more.get("train", {})}}
        if model.startswith("Real"):
            names = "".join(f"{number}.png\n" for number in range(4))
            (tmp_path / "names.txt").write_text(names)
            loader = {key: value for key, value in opt["datasets"]["train"].items() if "_lq" not in key}
            real = {
                **{"type": "RealESRGANDataset", "meta_info": str(tmp_path / "names.txt")},
                "final_sinc_prob": 0.8,
            }
            twice = {**KERNELS, **{f"{key}2": value for key, value in KERNELS.items()}}
            opt["datasets"] = {**opt["datasets"], "train": {**loader, **real, **twice}}
        return opt

    return make


@pytest.mark.parametrize("model", MODELS)
def test_models_of_basicsr_start_from_weights_save_and_go_on_exactly(
    model: str, tmp_path: Path, options_of: Callable[[str], dict[str, Any]]
) -> None:
    write(tmp_path / "train.yml", options_of(model))
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


# What ends a training of 6 iterations, with checkpoints every 2 and validations every 3.
ENDS: list[dict[str, Any]] = [
    {"at": "step", "count": 4, "signal": "SIGKILL"},
    {"at": "step", "count": 3, "signal": "SIGTERM"},  # in iteration 5, which has no checkpoint
    {"at": "test", "count": 1, "signal": "SIGINT"},  # in the validation of iteration 6
]


def test_a_model_of_basicsr_that_is_killed_and_stopped_ends_as_one_that_was_not(
    tmp_path: Path, options_of: Callable[[str], dict[str, Any]]
) -> None:
    opt = options_of("RealESRGANModel")
    opt["train"] |= {"total_iter": 6, "warmup_iter": 3, "amp": "bf16"}
    opt["datasets"]["train"] |= {"batch_size_per_gpu": 1, "global_batch_size": 2}  # in two pieces
    opt["val"] |= {"val_freq": 3}
    write(tmp_path / "train.yml", opt)
    resume: dict[str, Any] = {"arguments": ["--auto_resume"], "model": "RealESRGANModel"}
    peaceful = {"arguments": ["--force_yml", "name=peaceful"]}
    lives = live(tmp_path, [peaceful, *({**resume, **end} for end in ENDS), resume])
    codes = [0, -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT, 0]
    assert [life["codes"] for life in lives] == [[code] for code in codes], lives
    stopped = [re.findall(r"Stopped at iteration (\d+) by (\w+)", life["output"]) for life in lives]
    assert stopped == [[], [], [("5", "SIGTERM")], [("6", "SIGINT")], []], lives
    state = assert_same_end(tmp_path / "experiments", 6)
    assert [len(optimizer["state"]) > 0 for optimizer in state["optimizers"]] == [True, True]
    assert state["sha256"].keys() == {"net_g_6.pth", "net_d_6.pth"}
    assert state["pools"][0]["filled"] == 2 and state["random"]


def test_two_ranks_of_a_degrading_model_stop_together_and_go_on_exactly(
    tmp_path: Path, options_of: Callable[[str], dict[str, Any]]
) -> None:
    opt = options_of("RealESRGANModel")
    opt["datasets"]["train"]["batch_size_per_gpu"] = 1
    write(tmp_path / "train.yml", opt)
    resume: dict[str, Any] = {"arguments": ["--auto_resume"], "model": "RealESRGANModel", "ranks": 2}
    peaceful = {"arguments": ["--force_yml", "name=peaceful"], "ranks": 2}
    end = {"at": "step", "count": 3, "signal": "SIGTERM", "rank": 1}  # in the first with a full pool
    lives = live(tmp_path, [peaceful, {**resume, **end}, resume])
    assert [life["codes"] for life in lives] == [[0, 0], [143, 143], [0, 0]], lives
    assert lives[1]["output"].count("Stopped at iteration 3") == 1
    first, second = assert_same_end(tmp_path / "experiments", 4)["pools"]
    assert first["filled"] == second["filled"] == 2 and not same(first["lq"], second["lq"])


@pytest.mark.parametrize(
    ("changes", "is_taken"),
    [
        ({}, True),
        ({"filled": 2}, True),
        ({"filled": 1}, False),  # no multiple of the batch
        ({"filled": 6}, False),
        ({"gt": torch.zeros(4, 3, 16, 16)}, False),  # of another gt_size
        ({"lq": torch.full((4, 3, 16, 16), torch.nan)}, False),
        (None, False),
    ],
)
def test_a_pool_of_pairs_is_taken_if_it_fits(
    options_of: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    esc_log: list[str],
    changes: dict[str, Any] | None,
    is_taken: bool,
) -> None:
    opt = options_of("RealESRNetModel") | {"queue_size": 4, "val": None}
    opt |= {"is_train": True, "dist": False, "rank": 0, "world_size": 1}
    opt["path"] |= {"training_states": str(tmp_path), "models": str(tmp_path)}
    opt["datasets"]["train"]["batch_size_per_gpu"] = 2
    first, second = (build_model(copy.deepcopy(opt)) for _ in range(2))
    if changes is not None:
        first.queue_lr, first.queue_gt = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 32, 32)
        first.queue_ptr = 4
    first.save_training_state(0, 1)
    state = torch.load(tmp_path / "1.state", weights_only=True)
    if changes is not None:
        state["pools"][0] |= changes
    esc_log.clear()
    second.resume_training(state)
    assert hasattr(second, "queue_lr") == is_taken
    assert any("filled anew" in line for line in esc_log) != is_taken
    if is_taken:
        assert torch.equal(second.queue_lr, first.queue_lr) and torch.equal(second.queue_gt, first.queue_gt)
        assert second.queue_ptr == state["pools"][0]["filled"]


@pytest.mark.parametrize(
    ("model", "is_made_up"), [("SRModel", True), ("RealESRNetModel", True), ("VideoBaseModel", False)]
)
def test_a_missed_validation_is_made_up_for_where_it_is_ours(
    options_of: Callable[[str], dict[str, Any]], model: str, is_made_up: bool
) -> None:
    opt = options_of("RealESRNetModel" if model in MODELS else "SRModel") | {"model_type": model}
    opt |= {"is_train": True, "dist": False, "rank": 0, "world_size": 1, "high_order_degradation": False}
    built = build_model(opt)
    calls = []
    built.training_state.restore = lambda state: None
    built.shared_validation.missed = lambda iteration: [f"the loader of {iteration}"]
    built.validation = lambda loader, *others: calls.append(loader)
    built.resume_training({"iter": 4})
    assert calls == ["the loader of 4"] * is_made_up


def assert_same_end(experiments: Path, iteration: int) -> dict[str, Any]:
    """Compare all that two trainings have at the end; return one's state."""
    folders = [experiments / name for name in ("single", "peaceful")]
    resumed, whole = (checkpoint(folder, iteration)["state"] for folder in folders)
    for key in whole.keys() - {"sha256", "options"}:
        assert same(resumed[key], whole[key]), key
    for name in (f"net_g_{iteration}.pth", f"net_d_{iteration}.pth"):
        assert same(*(torch.load(folder / "models" / name, weights_only=True) for folder in folders)), name
    return whole
