"""Models of BasicSR take their steps in pieces and in half precision, as ESCModel does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from basicsr.models import MODEL_REGISTRY, build_model
from torch import nn

from esc_basicsr.common.errors import UserError
from esc_basicsr.fast.precision import HALF_PRECISIONS
from esc_basicsr.options.sections import has_ours

NETWORK = {"type": "MSRResNet", "num_feat": 4, "num_block": 1, "upscale": 2}
OPTIMIZER = {"type": "AdamW", "lr": 0.1, "weight_decay": 0, "betas": [0.5, 0.5], "eps": 1.0}
GAN = {"optim_d": dict(OPTIMIZER), "gan_opt": {"type": "GANLoss", "gan_type": "vanilla", "loss_weight": 0.1}}
SHARPENED = {"l1_gt_usm": True, "percep_gt_usm": True, "gan_gt_usm": False}
MODELS = ("SRModel", "SRGANModel", "ESRGANModel", "RealESRNetModel", "RealESRGANModel")


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Options to train a model on a CPU on pairs; ``train`` is added to that section."""

    def make(model: str, train: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
        is_gan = "GAN" in model
        return {
            **{"model_type": model, "num_gpu": 0, "is_train": True, "scale": 2},
            **{"dist": False, "rank": 0, "world_size": 1, "high_order_degradation": False},
            "datasets": {"train": {"batch_size_per_gpu": 8}},
            "logger": {},
            "network_g": NETWORK,
            # one without normalisation, whose step does not depend on how often it ran
            **({"network_d": NETWORK, **SHARPENED} if is_gan else {"gt_usm": False}),
            "path": {"models": str(tmp_path), "training_states": str(tmp_path)},
            "train": {
                **{"ema_decay": 0.9, "optim_g": OPTIMIZER, **(GAN if is_gan else {})},
                "scheduler": {"type": "MultiStepLR", "milestones": [100], "gamma": 0.5},
                "pixel_opt": {"type": "L1Loss"},
                **(train or {}),
            },
            "val": {},
            **sections,
        }

    return make


@pytest.fixture
def build(options: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """Build a model by such options, from the same weights each time."""

    def make(model: str, train: dict[str, Any] | None = None, **sections: Any) -> Any:
        torch.manual_seed(0)
        return build_model(copy.deepcopy(options(model, train, **sections)))

    return make


def step(model: Any, steps: int = 2, take: Callable[..., None] | None = None, part: int = 0) -> list[Any]:
    """Train on random images, the same each time, or on one of the two halves of each batch.

    Returns:
        What is logged.
    """
    random = torch.Generator().manual_seed(1)
    logs = []
    for iteration in range(1, steps + 1):
        lq, gt = (torch.rand(8, 3, side, side, generator=random) for side in (14, 28))  # sharpening needs 26
        halves = slice(None) if not model.opt["dist"] else slice(4 * part, 4 * part + 4)
        model.feed_data({"lq": lq[halves], "gt": gt[halves]})
        (take or type(model).optimize_parameters)(model, iteration)
        logs.append(dict(model.get_current_log()))
    return logs


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Copy the weights of all networks."""
    networks = {name: net for name, net in vars(model).items() if name.startswith("net_") and net is not None}
    return {
        f"{name}.{key}": value.clone()
        for name, net in networks.items()
        if isinstance(net, nn.Module)
        for key, value in model.get_bare_model(net).state_dict().items()
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_step_in_one_piece_is_that_of_stock_basicsr(build: Callable[..., Any], model: str) -> None:
    ours, stock = build(model), build(model)
    logs, expected = step(ours), step(stock, take=type(stock).optimize_parameters.__wrapped__)
    assert logs == [pytest.approx(log, rel=1e-6) for log in expected]
    assert [*logs[0]] == [*expected[0]]
    torch.testing.assert_close(weights(ours), weights(stock), rtol=0, atol=0)
    before, after = weights(build(model)), weights(ours)
    moved = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key.partition(".")[0] for key in before}


@pytest.mark.parametrize("model", sorted({*MODELS} - {"ESRGANModel"}))
@pytest.mark.parametrize(
    "pieces",
    [
        {"train": {"accumulate": 3}},  # of 3, 3 and 2 images
        {"datasets": {"train": {"batch_size_per_gpu": 2, "global_batch_size": 8}}},
    ],
    ids=str,
)
def test_pieces_of_a_batch_take_the_step_of_the_whole(
    build: Callable[..., Any], model: str, pieces: dict[str, Any]
) -> None:
    whole, ours = build(model), build(model, **pieces)
    seen: list[int] = []
    ours.net_g.register_forward_pre_hook(lambda net, inputs: seen.append(len(inputs[0])))
    logs = step(ours)
    assert seen == ([3, 3, 2] if "train" in pieces else [2] * 4) * 2
    assert logs == [pytest.approx(log, rel=1e-4) for log in step(whole)]
    torch.testing.assert_close(weights(ours), weights(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_both_networks_compute_in_half_and_losses_in_float32(build: Callable[..., Any], amp: str) -> None:
    plain, ours = build("RealESRGANModel"), build("RealESRGANModel", {"amp": amp, "accumulate": 2})
    computed: dict[str, set[torch.dtype]] = {"net_g": set(), "net_d": set()}
    compared = set()
    for name, dtypes in computed.items():
        first = getattr(ours, name).conv_first
        first.register_forward_hook(lambda net, inputs, output, dtypes=dtypes: dtypes.add(output.dtype))
    for loss in (ours.cri_pix, ours.cri_gan):
        loss.register_forward_pre_hook(lambda net, inputs: compared.add(inputs[0].dtype))
    logs, expected = step(ours), step(plain)
    assert computed == {name: {HALF_PRECISIONS[amp]} for name in computed}
    assert compared == {torch.float32}
    assert logs == [pytest.approx(log, rel=2e-2, abs=1e-2) for log in expected]
    for name in computed:
        pairs = (getattr(model, name).parameters() for model in (ours, plain))
        for mine, theirs in zip(*pairs, strict=True):
            assert mine.dtype == torch.float32
            # scaled by 2 to the 16th within a network, and neither outside nor twice
            assert (mine.grad - theirs.grad).norm() < 0.05 * theirs.grad.norm() + 1e-4


def test_gradients_of_fp16_are_scaled_within_a_network(build: Callable[..., Any]) -> None:
    found = []
    for train in ({}, {"amp": "fp16"}):
        model = build("SRGANModel", train)
        norms: list[float] = []

        def watch(net: nn.Module, inputs: Any, output: torch.Tensor, norms: list[float] = norms) -> None:
            output.register_hook(lambda gradient: norms.append(float(gradient.norm())))

        model.net_d.conv_hr.register_forward_hook(watch)
        step(model, steps=1)
        found.append(norms)
    assert [large / small for small, large in zip(*found, strict=True)] == pytest.approx(
        [2**16] * 3, rel=0.05
    )


def test_a_step_of_numbers_that_are_none_is_skipped_for_all_networks(
    build: Callable[..., Any], esc_log: list[str]
) -> None:
    model = build("RealESRGANModel", {"amp": "fp16"})
    step(model, steps=1)
    scaler, before = model.training_step.scaler, weights(model)
    scale = scaler.get_scale()
    gt = torch.rand(2, 3, 28, 28)
    model.feed_data({"lq": torch.full((2, 3, 14, 14), torch.inf), "gt": gt, "gt_path": ["a.png", "b.png"]})
    model.optimize_parameters(2)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert scaler.get_scale() == scale / 2
    assert "the loss is not finite; the step is skipped (1 in a row, 1 in all)" in esc_log[-1]
    assert model.get_current_log()["skipped"] == 1
    assert model.training_state.collect().keys() >= {"grad_scaler", "skipped"}


def test_pieces_of_a_batch_are_not_normalised_each_by_itself(build: Callable[..., Any]) -> None:
    for pieces in (
        {"train": {"accumulate": 2}},
        {"datasets": {"train": {"batch_size_per_gpu": 4, "global_batch_size": 8}}},
    ):
        model = build("SRGANModel", **pieces)
        step(model, steps=1)
        model.net_d.norm = nn.BatchNorm2d(4)
        before = weights(model)
        with pytest.raises(UserError, match=r"(accumulate|global_batch_size): net_d normalises over a whole"):
            step(model, steps=1)
        torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
        model.net_d.norm.eval()  # by what it has learned
        step(model, steps=1)
    whole = build("SRGANModel")
    whole.net_d.norm = nn.BatchNorm2d(4)
    step(whole, steps=1)


def test_gradients_of_each_network_are_clipped(build: Callable[..., Any]) -> None:
    model = build("SRGANModel", {"clip_grad_norm": 1e-3})
    step(model, steps=1)
    for net in (model.net_g, model.net_d):
        norm = torch.stack([parameter.grad.norm() for parameter in net.parameters()]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_a_network_that_rests_is_not_stepped(build: Callable[..., Any]) -> None:
    model = build("SRGANModel", {"net_d_init_iters": 2, "ema_decay": 0})
    before = weights(model)
    step(model, steps=2)
    after = weights(model)
    moved = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"net_d"}


def train_one_of_two(rank: int, folder: Path, opt: dict[str, Any]) -> None:
    """Train on half of each batch; leave what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = build_model({**opt, "dist": True, "rank": rank, "world_size": 2})
    logs = step(model, part=rank)
    if rank == 0:
        torch.save((logs, weights(model)), folder / "result")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_that_accumulate_agree_with_one_that_does_not(
    options: Callable[..., dict[str, Any]], build: Callable[..., Any], tmp_path: Path
) -> None:
    one = build("RealESRGANModel")
    data = {"train": {"batch_size_per_gpu": 2, "global_batch_size": 8}}
    opt = options("RealESRGANModel", datasets=data)
    server = torch.multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["esc_basicsr.training.esc_model"])  # imports PyTorch and BasicSR once
    torch.multiprocessing.start_processes(
        train_one_of_two, (tmp_path, opt), nprocs=2, start_method="forkserver"
    )
    logs, found = torch.load(tmp_path / "result", weights_only=True)
    assert logs == [pytest.approx(log, rel=1e-4) for log in step(one)]
    torch.testing.assert_close(found, weights(one), rtol=1e-4, atol=1e-6)


def test_every_model_of_basicsr_takes_such_steps_or_is_refused_what_they_bring() -> None:
    models = {cls for _, cls in MODEL_REGISTRY if cls.__module__.startswith("basicsr.")}
    others = {cls.__name__ for cls in models if not has_ours(cls, "optimize_parameters")}
    assert others == {"HiFaceGANModel", "StyleGAN2Model", "VideoRecurrentGANModel"}
    assert len(models) > 10
