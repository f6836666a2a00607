"""ESCModel: what it adds to BasicSR's SRModel."""

import copy
import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.models import build_model

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.degradation import make_pair
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.training import esc_model
from esc_basicsr.training.esc_model import ESCModel


@pytest.fixture
def build(options: Callable[..., dict[str, Any]]) -> Callable[..., ESCModel]:
    """Build a model to train on a CPU, as BasicSR does; keys `section__key` set options."""

    def make(**changes: Any) -> ESCModel:
        optimizer = {"type": "AdamW", "lr": 5e-4, "weight_decay": 0.25, "betas": [0.9, 0.8]}
        scheduler = {"type": "MultiStepLR", "milestones": [2], "gamma": 0.5}
        opt = copy.deepcopy(options({"optim_g": optimizer, "scheduler": scheduler}))
        for keys, value in changes.items():
            *sections, key = keys.split("__")
            section = opt
            for name in sections:
                section = section[name]
            section[key] = value
        return build_model(opt)

    return make


@pytest.mark.parametrize("size", [(13, 30), (16, 32), (3, 19)])
def test_release_evaluates_on_images_mirrored_to_multiples_of_the_window(
    build: Callable[..., ESCModel], size: tuple[int, int]
) -> None:
    """The release pads by reflection at bottom and right, runs, and crops."""
    model, plain = (build(scale=2, val={"pad_to_window": is_padded}) for is_padded in (True, False))
    plain.net_g_ema.load_state_dict(model.net_g_ema.state_dict())
    window = model.opt["network_g"]["window_size"]
    lq = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    edges = [(0, -side % window) for side in size]
    padded = torch.from_numpy(np.pad(lq.numpy(), [(0, 0), (0, 0), *edges], mode="reflect"))
    outputs = []
    for each, images in ((model, lq), (plain, padded), (plain, lq)):
        each.feed_data({"lq": images})
        each.test()
        assert each.lq.shape == images.shape
        outputs.append(each.output[..., : 2 * size[0], : 2 * size[1]])
    released, expected, unpadded = outputs
    assert released.shape[-2:] == (2 * size[0], 2 * size[1])
    torch.testing.assert_close(released, expected, rtol=0, atol=1e-6)
    is_multiple = not any(side % window for side in size)
    assert torch.allclose(released, unpadded, rtol=0, atol=1e-6) is is_multiple


def test_image_too_large_for_the_memory_is_validated_in_tiles(
    build: Callable[..., ESCModel], monkeypatch: pytest.MonkeyPatch, esc_log: list[str]
) -> None:
    model = build(scale=2)
    photo = torch.from_numpy(load_sample_image("chelsea")[:60, :72].copy()).permute(2, 0, 1)[None] / 255
    model.feed_data({"lq": photo})
    model.test()
    whole = model.output
    stock = ESCModel._infer  # where memory runs out

    def infer_in_little_memory(model: ESCModel) -> None:
        if model.lq.shape[-1] * model.lq.shape[-2] > 40**2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        stock(model)

    monkeypatch.setattr(ESCModel, "_infer", infer_in_little_memory)
    model.test()
    assert model.lq.shape == photo.shape
    assert "72 × 60 pixels are too many for the memory" in esc_log[-1]
    pair = [(output.clamp(0, 1) * 255).round() for output in (whole, model.output)]
    assert (pair[0] - pair[1]).square().mean() < 255**2 / 10**5  # 50 dB, by random weights


def test_memory_that_is_never_enough_ends_with_the_smallest_tiles(
    build: Callable[..., ESCModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(scale=2)
    model.feed_data({"lq": torch.rand(1, 3, 60, 72)})

    def infer(model: ESCModel) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ESCModel, "_infer", infer)
    monkeypatch.setattr(esc_model, "tile_side", lambda pixels, window: (2 if pixels == 1 else 3) * window)
    with pytest.raises(torch.OutOfMemoryError):
        model.test()


@pytest.fixture
def checkpoint(build: Callable[..., ESCModel], tmp_path: Path) -> Path:
    """A checkpoint whose EMA differs from its weights."""
    model = build()
    with torch.no_grad():
        for parameter in model.net_g_ema.parameters():
            parameter.add_(1)
    model.save(epoch=0, current_iter=7)
    return tmp_path / "net_g_7.pth"


def test_adamw_is_torchs_with_the_options_of_the_file(build: Callable[..., ESCModel]) -> None:
    optimizer = build().optimizer_g
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (5e-4, 0.25, (0.9, 0.8))


def test_other_optimizers_are_basicsrs(build: Callable[..., ESCModel]) -> None:
    assert type(build(train__optim_g={"type": "Adam", "lr": 1e-3}).optimizer_g) is torch.optim.Adam
    with pytest.raises(NotImplementedError, match="Lion"):
        build(train__optim_g={"type": "Lion", "lr": 1e-3})


def test_batch_of_hr_alone_gives_the_loaders_pairs_to_one_level(build: Callable[..., ESCModel]) -> None:
    photograph = torch.from_numpy(load_sample_image("coffee")[:96, :192]).permute(2, 0, 1)
    hr = torch.stack(photograph.split(96, dim=2))
    model = build(scale=3)
    model.feed_data({"gt": hr, "gt_path": ["a", "b"], "lq_path": ["a", "b"]})
    expected = make_pair(hr, 3)
    assert torch.equal(model.gt, expected["gt"])
    assert model.lq.dtype == torch.float32 and model.lq.shape == (2, 3, 32, 32)
    difference = ((model.lq - expected["lq"]) * 255).round().abs()
    assert difference.max() <= 1 and difference.count_nonzero() <= 6


def cosine(done: int) -> float:
    """Two periods, of 8 iterations and of 12, the second one half as high; 0.1 at the least."""
    start, period, weight = (0, 8, 1.0) if done <= 8 else (8, 12, 0.5)
    return 0.1 + weight * 0.45 * (1 + math.cos(math.pi * (done - start) / period))


SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    # Milestones during the warm-up, at its end and after it. A rate is relative to the initial one, and given
    # by the iterations done before.
    "MultiStepLR": (
        {"type": "MultiStepLR", "milestones": [2, 5, 9], "gamma": 0.5},
        lambda done: 0.5 ** sum(done >= milestone for milestone in (2, 5, 9)),
    ),
    "CosineAnnealingRestartLR": (
        {
            "type": "CosineAnnealingRestartLR",
            "periods": [8, 12],
            "restart_weights": [1, 0.5],
            "eta_min": 5e-5,
        },
        cosine,
    ),
}


@pytest.mark.parametrize("resumed_after", [None, 1, 4, 5, 6, 12])
@pytest.mark.parametrize("warmup", [-1, 1, 2, 6])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_rises_during_the_warm_up_and_is_the_schedules_from_then_on(
    build: Callable[..., ESCModel], tmp_path: Path, schedule: str, warmup: int, resumed_after: int | None
) -> None:
    scheduler, expected = SCHEDULES[schedule]
    model = build(train__scheduler=scheduler)
    rates = []
    for iteration in range(1, 21):
        model.update_learning_rate(iteration, warmup_iter=warmup)
        model.optimizer_g.step()
        rates.append(model.get_current_learning_rate()[0] / 5e-4)
        if iteration == resumed_after:
            model.save_training_state(0, iteration)
            model = build(train__scheduler=scheduler)
            model.resume_training(torch.load(tmp_path / f"{iteration}.state", weights_only=True))
    assert rates == pytest.approx([i / warmup if i < warmup else expected(i - 1) for i in range(1, 21)])


def test_network_starts_from_params_and_ema_from_params_ema(
    build: Callable[..., ESCModel], checkpoint: Path
) -> None:
    stored = torch.load(checkpoint, weights_only=True)
    model = build(path__pretrain_network_g=str(checkpoint), path__strict_load_g=True)
    torch.testing.assert_close(dict(model.net_g.state_dict()), dict(stored["params"]), rtol=0, atol=0)
    torch.testing.assert_close(dict(model.net_g_ema.state_dict()), dict(stored["params_ema"]), rtol=0, atol=0)


def test_checkpoint_of_another_scale_starts_this_one(
    build: Callable[..., ESCModel],
    checkpoint: Path,
    tiny_network: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("basicsr"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="basicsr"):
        model = build(
            network_g={**tiny_network, "upscaling_factor": 3},
            path__pretrain_network_g=str(checkpoint),
            path__param_key_g="params_ema",
        )
    assert "×2; to_img is converted to ×3" in caplog.text
    assert model.net_g.to_img.weight.shape[0] == 27
    stored = torch.load(checkpoint, weights_only=True)["params_ema"]
    torch.testing.assert_close(model.net_g.state_dict()["proj.weight"], stored["proj.weight"])


def test_checkpoint_that_does_not_fit_is_a_users_mistake(
    build: Callable[..., ESCModel], checkpoint: Path, tiny_network: dict[str, Any]
) -> None:
    wider = {**tiny_network, "dim": 24}
    with pytest.raises(UserError, match=r"net_g_7.pth does not fit ESC"):
        build(network_g=wider, path__pretrain_network_g=str(checkpoint))
    # not strictly: what does not fit keeps its value
    build(network_g=wider, path__pretrain_network_g=str(checkpoint), path__strict_load_g=False)


def test_truncated_checkpoint_is_named(build: Callable[..., ESCModel], checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"net_g_7.pth: not a readable checkpoint"):
        build(path__pretrain_network_g=str(checkpoint))


def test_step_moves_weights_by_adamw_and_ema_by_its_decay(build: Callable[..., ESCModel]) -> None:
    model = build()
    before = {key: value.clone() for key, value in model.net_g.state_dict().items()}
    model.feed_data({"lq": torch.rand(2, 3, 9, 7), "gt": torch.rand(2, 3, 18, 14)})
    loss = torch.nn.functional.l1_loss(model.net_g(model.lq), model.gt)
    expected = copy.deepcopy(model.net_g)
    oracle = torch.optim.AdamW(expected.parameters(), lr=5e-4, weight_decay=0.25, betas=(0.9, 0.8))
    torch.nn.functional.l1_loss(expected(model.lq), model.gt).backward()
    oracle.step()
    model.optimize_parameters(1)
    assert model.get_current_log()["l_pix"] == pytest.approx(loss.item())
    after, ema = model.net_g.state_dict(), model.net_g_ema.state_dict()
    torch.testing.assert_close(dict(after), dict(expected.state_dict()))
    for key, value in before.items():
        torch.testing.assert_close(ema[key], 0.9 * value + 0.1 * after[key])


def test_model_is_freed_with_its_last_reference(build: Callable[..., ESCModel]) -> None:
    """A cycle would hold a GPU's memory and, for several processes, their threads until Python ends."""
    model = build()
    network = weakref.ref(model.net_g)
    del model
    assert network() is None
