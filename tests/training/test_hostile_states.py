"""Training states that hold what this training cannot go on from are refused before it does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_speed import step

from esc_basicsr.common.errors import UserError
from esc_basicsr.training.esc_model import ESCModel


def spoil(state: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A state with another value at a place."""
    state = copy.deepcopy(state)
    *keys, last = [int(key) if key.isdecimal() else key for key in place.split("/")]
    section: Any = state
    for key in keys:
        section = section[key]
    if value is None:
        del section[last]
    else:
        section[last] = value
    return state


@pytest.fixture
def state(build: Callable[..., ESCModel], tmp_path: Path) -> dict[str, Any]:
    """Saved after some steps."""
    model = build()
    step(model)
    model.save(epoch=0, current_iter=3)
    return torch.load(tmp_path / "3.state", weights_only=True)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("optimizers/0/param_groups/0/lr", float("nan")),
        ("optimizers/0/param_groups/0/lr", "x"),
        ("optimizers/0/param_groups/0/lr", None),
        ("optimizers/0/param_groups/0/params", torch.zeros(1 << 40, device="meta")),
        ("optimizers/0/param_groups", 0),
        ("optimizers/0/state/0/exp_avg", "x"),
        ("optimizers/0/state/0/exp_avg", None),
        ("optimizers/0/state/0/exp_avg_sq", torch.zeros(2, 3)),
        ("optimizers/0/state/0/exp_avg_sq", torch.eye(3).to_sparse()),
        ("optimizers/0/state/0/exp_avg_sq", torch.zeros(1).expand(1 << 40)),
        ("optimizers/0/state/0/step", torch.tensor(float("nan"))),
        ("optimizers/0/state/0/step", torch.zeros(3)),
        ("optimizers/0/state/0", []),
        ("optimizers/0", None),
        ("schedulers/0/last_epoch", "x"),
        ("schedulers/0/get_lr", 1),
        ("schedulers/0/milestones", {3: "x"}),
        ("schedulers/0", 5),
        ("random/0/python", 7),
        ("random/0/numpy/2", 10**6),
        ("random/0/torch", torch.zeros(3, dtype=torch.uint8)),
    ],
)
def test_state_of_another_form_is_a_users_mistake(
    build: Callable[..., ESCModel],
    state: dict[str, Any],
    place: str,
    value: Any,
) -> None:
    model = build(path={"resume_state": "3.state"})
    with pytest.raises(UserError, match=r"3\.state does not fit these options"):
        model.resume_training(spoil(state, place, value))


def test_state_as_it_was_saved_is_gone_on_from(
    build: Callable[..., ESCModel],
    state: dict[str, Any],
) -> None:
    build(path={"resume_state": "3.state"}).resume_training(state)
