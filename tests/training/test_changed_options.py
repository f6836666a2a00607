"""Going on with other options than before: they hold from there on, or are refused; either is said."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esc_basicsr.common.errors import UserError
from esc_basicsr.training import checkpoints
from esc_basicsr.training.esc_model import ESCModel

ADAMW = {"type": "AdamW", "lr": 0.1, "weight_decay": 0, "betas": [0.5, 0.5], "eps": 1.0}


def cosine(*periods: int) -> dict[str, Any]:
    return {
        "type": "CosineAnnealingRestartLR",
        "periods": list(periods),
        "restart_weights": [1] * len(periods),
        "eta_min": 1e-4,
    }


def steps(*milestones: int, gamma: float = 0.5) -> dict[str, Any]:
    return {"type": "MultiStepLR", "milestones": list(milestones), "gamma": gamma}


def train(model: ESCModel, first: int, last: int) -> list[float]:
    """Take steps; give the learning rate of each."""
    rates = []
    for iteration in range(first, last + 1):
        model.update_learning_rate(iteration)
        model.feed_data({"lq": torch.rand(2, 3, 8, 8), "gt": torch.rand(2, 3, 16, 16)})
        model.optimize_parameters(iteration)
        rates.append(model.get_current_learning_rate()[0])
    return rates


def saved(model: ESCModel, iteration: int) -> dict[str, Any]:
    return {**model.training_state.collect(), "epoch": 0, "iter": iteration}


LONGER = {
    "cosine, its period raised": ({"scheduler": cosine(4)}, {"scheduler": cosine(12)}),
    "cosine, periods added": ({"scheduler": cosine(4)}, {"scheduler": cosine(4, 8)}),
    "steps moved": ({"scheduler": steps(2)}, {"scheduler": steps(3, 6, 10)}),
    "another factor": ({"scheduler": steps(2, 8)}, {"scheduler": steps(2, 8, gamma=0.1)}),
    "another rate": (
        {"scheduler": steps(2, 8)},
        {"scheduler": steps(2, 8), "optim_g": {**ADAMW, "lr": 0.01}},
    ),
    "steps made a cosine": ({"scheduler": steps(2)}, {"scheduler": cosine(12)}),
    "a cosine made steps": ({"scheduler": cosine(4)}, {"scheduler": steps(6)}),
}


@pytest.mark.parametrize("case", LONGER)
def test_another_schedule_is_where_it_would_be_had_it_been_there_from_the_start(
    case: str, build: Callable[..., ESCModel], esc_log: list[str]
) -> None:
    before, after = LONGER[case]
    model = build(train={**before, "total_iter": 4})
    train(model, 1, 4)
    longer = build(train={**after, "total_iter": 12})
    longer.resume_training(saved(model, 4))
    expected = train(build(train={**after, "total_iter": 12}), 1, 12)
    assert train(longer, 5, 12) == pytest.approx(expected[4:])
    (told,) = (message for message in esc_log if "differ from the state's; from here" in message)
    assert "train.total_iter: 4 -> 12" in told


def test_the_same_options_change_nothing_and_say_nothing(
    build: Callable[..., ESCModel], esc_log: list[str]
) -> None:
    model = build(train={"total_iter": 8})
    train(model, 1, 4)
    again = build(train={"total_iter": 8})
    again.resume_training(saved(model, 4))
    assert not any("differ" in message for message in esc_log)
    for one, other in zip(model.optimizers, again.optimizers, strict=True):
        assert str(one.state_dict()) == str(other.state_dict())


def test_settings_of_the_optimizer_are_the_options_and_its_moments_the_states(
    build: Callable[..., ESCModel],
) -> None:
    model = build()
    train(model, 1, 2)
    changed = build(train={"optim_g": {**ADAMW, "weight_decay": 0.3, "betas": [0.9, 0.99]}})
    changed.resume_training(saved(model, 2))
    group = changed.optimizer_g.param_groups[0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.3, (0.9, 0.99))
    old, new = (one.optimizer_g.state_dict()["state"][0]["exp_avg"] for one in (model, changed))
    assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train": {"ema_decay": 0.5}}, "train.ema_decay: 0.9 -> 0.5"),
        ({"train": {"pixel_opt": {"type": "MSELoss"}}}, "train.pixel_opt.type: L1Loss -> MSELoss"),
        ({"datasets": {"train": {"batch_size_per_gpu": 4}}}, "datasets.train.batch_size_per_gpu: 8 -> 4"),
    ],
)
def test_every_difference_is_named_with_old_and_new_value(
    changes: dict[str, Any], line: str, build: Callable[..., ESCModel], esc_log: list[str]
) -> None:
    state = saved(build(), 0)
    build(**changes).resume_training(state)
    assert any(line in message for message in esc_log)


def test_another_optimizer_is_refused_with_what_to_do(build: Callable[..., ESCModel]) -> None:
    model = build()
    train(model, 1, 2)
    other = build(train={"optim_g": {"type": "Adam", "lr": 0.1}})
    with pytest.raises(UserError, match=r"train\.optim_g\.type was AdamW and is Adam: .*pretrain_network_g"):
        other.resume_training(saved(model, 2))


def test_the_advice_after_a_divergence_works(build: Callable[..., ESCModel]) -> None:
    """It says: lower the learning rate, and go on."""
    model = build(train={"optim_g": {**ADAMW, "lr": 1.0}})
    train(model, 1, 2)
    lower = build(train={"optim_g": {**ADAMW, "lr": 1e-3}})
    lower.resume_training(saved(model, 2))
    assert train(lower, 3, 3) == [pytest.approx(1e-3)]


@pytest.mark.parametrize("text", ["no JSON", "[1]", '"x"'])
def test_damaged_record_of_options_is_refused(text: str, build: Callable[..., ESCModel]) -> None:
    state = {**saved(build(), 0), "options": text}
    with pytest.raises(UserError, match="does not fit these options"):
        build().resume_training(state)


# Files


def test_pruning_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Callable[..., dict[str, Any]]
) -> None:
    for iteration in (2, 4, 6, 8):
        (tmp_path / f"{iteration}.state").touch()
        (tmp_path / f"net_g_{iteration}.pth").touch()
    (tmp_path / "net_g_5.pth").touch()  # a user's own
    stock, calls = Path.unlink, []

    def ends_at_the_second(self: Path, *arguments: Any, **keywords: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        stock(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "unlink", ends_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.prune(options(), 2)
    monkeypatch.undo()
    checkpoints.prune(options(), 2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["6.state", "8.state", "net_g_5.pth", "net_g_6.pth", "net_g_8.pth"]


def test_networks_that_are_not_resumed_are_pruned_too(
    tmp_path: Path, options: Callable[..., dict[str, Any]]
) -> None:
    opt = options(network_d={})
    opt["path"]["ignore_resume_networks"] = ["network_d"]
    for name in ("2.state", "net_g_2.pth", "net_d_2.pth", "net_d_2.safetensors", "4.state", "net_d_4.pth"):
        (tmp_path / name).touch()
    checkpoints.prune(opt, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"4.state", "net_d_4.pth"}


def test_rates_are_finite_after_the_longest_schedule(build: Callable[..., ESCModel]) -> None:
    model = build(train={"scheduler": cosine(3, 3), "total_iter": 6})
    assert all(map(math.isfinite, train(model, 1, 6)))
