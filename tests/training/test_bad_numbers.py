"""Losses and gradients that are not finite, and gradients that are too large."""

from collections.abc import Callable

import pytest
import torch

from esc_basicsr.common.errors import UserError
from esc_basicsr.training.esc_model import ESCModel


@pytest.fixture
def build_to_train(build: Callable[..., ESCModel]) -> Callable[..., ESCModel]:
    """Build a model to train on a CPU; keywords are options of the section train."""
    return lambda **train: build(train={"max_skipped": 2, **train})


def feed(model: ESCModel, spoil: float | None = None) -> None:
    """A batch of three samples, the second of whose HR may have a number that is none."""
    gt = torch.rand(3, 3, 16, 16)
    if spoil is not None:
        gt[1, 0, 0, 0] = spoil
    model.feed_data({"lq": torch.rand(3, 3, 8, 8), "gt": gt, "gt_path": ["a.png", "b.png", "c.png"]})


def weights(model: ESCModel) -> list[torch.Tensor]:
    return [value.clone() for net in (model.net_g, model.net_g_ema) for value in net.state_dict().values()]


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
@pytest.mark.parametrize("passes", [1, 3])
def test_step_is_skipped_and_its_sample_named(
    build_to_train: Callable[..., ESCModel], esc_log: list[str], spoil: float, passes: int
) -> None:
    """Infinity in HR makes an infinite loss with finite gradients: L1's are signs."""
    model = build_to_train(accumulate=passes)
    before = weights(model)
    feed(model, spoil)
    model.optimize_parameters(7)
    assert all(map(torch.equal, weights(model), before))
    assert model.optimizer_g.state == {}
    assert esc_log[-1] == (
        "Iteration 7: the loss is not finite; the step is skipped (1 in a row, 1 in all). Samples: b.png"
    )
    feed(model)
    model.optimize_parameters(8)
    assert not all(map(torch.equal, weights(model), before))
    assert model.get_current_log()["skipped"] == 1
    assert model.training_state.collect()["skipped"] == {"in_all": 1, "in_a_row": 0}


def test_gradient_that_is_not_finite_is_found_too(
    build_to_train: Callable[..., ESCModel], esc_log: list[str]
) -> None:
    model = build_to_train()
    model.net_g.proj.weight.register_hook(lambda gradient: gradient / 0)
    before = weights(model)
    feed(model)
    model.optimize_parameters(1)
    assert all(map(torch.equal, weights(model), before))
    assert "the gradient is not finite" in esc_log[-1]
    assert esc_log[-1].endswith("Samples: a.png, b.png, c.png")


def test_training_ends_after_so_many_in_a_row(build_to_train: Callable[..., ESCModel]) -> None:
    model = build_to_train()
    for spoil in (float("nan"), None, float("nan")):
        feed(model, spoil)
        model.optimize_parameters(1)
    feed(model, float("nan"))
    with pytest.raises(UserError, match=r"not finite for 2 steps in a row \(train\.max_skipped: 2\).*b\.png"):
        model.optimize_parameters(4)


def test_gradients_are_clipped_to_a_norm(build_to_train: Callable[..., ESCModel]) -> None:
    norms = []
    for limit in (None, 1e-3):
        torch.manual_seed(0)
        model = build_to_train(**({} if limit is None else {"clip_grad_norm": limit}))
        feed(model)
        model.optimize_parameters(1)
        norms.append(float(torch.stack([p.grad.norm() for p in model.net_g.parameters()]).norm()))
    assert norms[0] > 2e-3
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)
