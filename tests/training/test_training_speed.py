"""ESCModel's options for speed and memory: what they may change, and what they must not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from esc_basicsr.common.errors import UserError
from esc_basicsr.fast import kernels
from esc_basicsr.fast.precision import HALF_PRECISIONS
from esc_basicsr.training.esc_model import ESCModel

BATCH, LR_SIZE = 8, 9


def step(model: ESCModel, steps: int = 3, batch: int = BATCH, part: tuple[int, int] = (0, 1)) -> list[float]:
    """Train on random images, the same each time, or one of several parts of each batch.

    Returns:
        The losses that are logged.
    """
    number, parts = part
    random = torch.Generator().manual_seed(1)
    losses = []
    for iteration in range(1, steps + 1):
        lq = torch.rand(batch, 3, LR_SIZE, LR_SIZE, generator=random)
        gt = torch.rand(batch, 3, 2 * LR_SIZE, 2 * LR_SIZE, generator=random)
        model.feed_data({"lq": lq.chunk(parts)[number], "gt": gt.chunk(parts)[number]})
        model.optimize_parameters(iteration)
        losses.append(model.get_current_log()["l_pix"])
    return losses


def assert_same_training(model: ESCModel, expected: ESCModel, **tolerances: float) -> None:
    """Same weights and EMA, under the same keys, having moved."""
    for net, expected_net in ((model.net_g, expected.net_g), (model.net_g_ema, expected.net_g_ema)):
        torch.testing.assert_close(
            dict(model.get_bare_model(net).state_dict()), dict(expected_net.state_dict()), **tolerances
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"accumulate": 2}},
        {"train": {"accumulate": BATCH}},
        {"channels_last": True},
        {"channels_last": True, "train": {"accumulate": 4}},
        {"cpu_kernels": True},
    ],
    ids=str,
)
def test_option_changes_nothing_but_the_order_of_sums(
    build: Callable[..., ESCModel], changes: dict[str, Any]
) -> None:
    plain, model = build(), build(**changes)
    start = copy.deepcopy(plain.net_g.state_dict())
    assert step(model) == pytest.approx(step(plain), rel=1e-5)
    assert_same_training(model, plain, rtol=1e-5, atol=1e-6)
    end = plain.net_g.state_dict()
    assert max(float((end[key] - start[key]).abs().max()) for key in end) > 1e-3


def test_cpu_kernels_serve_training_and_validation_and_leave_no_trace(
    build: Callable[..., ESCModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []
    attention, ffn = kernels.window_attention, kernels.conv_ffn
    monkeypatch.setattr(kernels, "window_attention", lambda *args: (served.append("sa"), attention(*args))[1])
    monkeypatch.setattr(
        kernels, "conv_ffn", lambda *args, **options: (served.append("ffn"), ffn(*args, **options))[1]
    )
    model = build(cpu_kernels=True)
    step(model, steps=1)
    assert set(served) == {"sa", "ffn"}
    served.clear()
    model.test()
    assert set(served) == {"sa", "ffn"}
    served.clear()
    plain = build()
    step(plain, steps=1)
    plain.test()
    assert not served
    torch.testing.assert_close(model.output, plain.output, rtol=1e-4, atol=1e-5)


def test_cpu_kernels_train_in_bf16_with_nearly_the_same_losses(build: Callable[..., ESCModel]) -> None:
    if not kernels.load().has_bf16:
        pytest.skip("this processor has no instructions for bfloat16")
    plain, model = build(), build(train={"amp": "bf16"}, cpu_kernels=True)
    losses = step(model)
    assert losses == pytest.approx(step(plain), rel=1e-2)
    assert losses != pytest.approx(step(build()), rel=1e-7)
    assert_same_training(model, plain, rtol=0.02, atol=2e-3)


def test_cpu_kernels_refuse_bf16_where_it_would_be_slow(
    build: Callable[..., ESCModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = kernels.load()._replace(has_bf16=False)
    monkeypatch.setattr(kernels, "load", lambda: without)
    with pytest.raises(UserError, match="bfloat16 would be slower than float32 on this CPU"):
        build(train={"amp": "bf16"}, cpu_kernels=True)


def test_pieces_of_a_batch_that_cannot_be_divided_weigh_by_their_images(
    build: Callable[..., ESCModel],
) -> None:
    plain, model = build(), build(train={"accumulate": 3})
    assert step(model, batch=7) == pytest.approx(step(plain, batch=7), rel=1e-5)
    assert_same_training(model, plain, rtol=1e-5, atol=1e-6)


def test_network_sees_one_piece_at_a_time(build: Callable[..., ESCModel]) -> None:
    model = build(train={"accumulate": 4})
    seen: list[int] = []
    model.net_g.register_forward_pre_hook(lambda net, inputs: seen.append(len(inputs[0])))
    step(model, steps=1)
    assert seen == [BATCH // 4] * 4


def test_each_loss_is_logged_for_the_whole_batch(
    build: Callable[..., ESCModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Perceptual(nn.Module):
        def forward(self, sr: torch.Tensor, gt: torch.Tensor) -> tuple[torch.Tensor, None]:
            return (sr - gt).square().mean(), None

    logs = []
    for accumulate in (1, 4):
        model = build(train={"accumulate": accumulate})
        monkeypatch.setattr(model, "cri_perceptual", Perceptual())
        step(model, steps=1)
        logs.append(model.get_current_log())
    assert list(logs[0]) == ["l_pix", "l_percep"]
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_computes_in_half_and_keeps_weights_losses_and_ema_in_float32(
    build: Callable[..., ESCModel], amp: str
) -> None:
    plain, model = build(), build(train={"amp": amp, "accumulate": 2})
    computed, compared = set(), set()
    model.net_g.proj.register_forward_hook(lambda net, inputs, output: computed.add(output.dtype))
    model.cri_pix.register_forward_pre_hook(lambda loss, inputs: compared.add(inputs[0].dtype))
    losses = step(model)
    assert computed == {HALF_PRECISIONS[amp]}
    assert compared == {torch.float32}
    kept = [*model.net_g.parameters(), *model.net_g_ema.parameters()]
    kept += [value for state in model.optimizer_g.state.values() for value in state.values()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    # half precision's 2 or 3 digits, and not float32's 7
    assert losses == pytest.approx(step(plain), rel=1e-2)
    assert losses != pytest.approx(step(build()), rel=1e-7)
    assert_same_training(model, plain, rtol=0.02, atol=2e-3)


def test_fp16_gradients_are_scaled_and_a_step_of_infinite_ones_is_left_out(
    build: Callable[..., ESCModel],
) -> None:
    model = build(train={"amp": "fp16", "ema_decay": 0})
    step(model, steps=1)
    scale = model.training_step.scaler.get_scale()
    gradients = [parameter.grad.abs().max() for parameter in model.net_g.parameters()]
    assert max(gradients) < 10  # as the loss has them: unscaled before the step
    before = copy.deepcopy(model.net_g.state_dict())
    model.feed_data({"lq": torch.full((1, 3, 8, 8), torch.inf), "gt": torch.rand(1, 3, 16, 16)})
    model.optimize_parameters(2)
    assert model.training_step.scaler.get_scale() == scale / 2
    torch.testing.assert_close(model.net_g.state_dict(), before, rtol=0, atol=0)


def test_resumed_fp16_training_goes_on_as_if_it_had_not_ended(
    build: Callable[..., ESCModel], tmp_path: Path
) -> None:
    model = build(train={"amp": "fp16"})
    step(model)
    model.training_step.scaler.update(1024.0)
    model.save(epoch=0, current_iter=3)
    state = torch.load(tmp_path / "3.state", weights_only=True)
    weights = str(tmp_path / "net_g_3.pth")
    path = {"models": str(tmp_path), "training_states": str(tmp_path), "pretrain_network_g": weights}
    resumed = build(train={"amp": "fp16"}, path=path)
    resumed.resume_training(state)
    assert resumed.training_step.scaler.state_dict() == model.training_step.scaler.state_dict()
    assert resumed.training_step.scaler.get_scale() == 1024
    assert step(resumed) == step(model)
    assert_same_training(resumed, model, rtol=0, atol=0)
    # fp16 or not, a training can go on from either's state
    build(path=path).resume_training(state)
    plain = build()
    plain.save(epoch=0, current_iter=4)
    resumed.resume_training(torch.load(tmp_path / "4.state", weights_only=True))


@pytest.mark.parametrize(("val", "dtype"), [({}, torch.float32), ({"amp": "bf16"}, torch.bfloat16)])
def test_validation_is_float32_unless_asked_for(
    build: Callable[..., ESCModel], val: dict[str, Any], dtype: torch.dtype
) -> None:
    model = build(train={"amp": "bf16"}, val=val)
    computed = set()
    model.net_g_ema.proj.register_forward_hook(lambda net, inputs, output: computed.add(output.dtype))
    model.feed_data({"lq": torch.rand(1, 3, 8, 8)})
    model.test()
    assert computed == {dtype}
    assert model.output.dtype == torch.float32
    assert not model.output.requires_grad


def test_channels_last_lays_out_weights_ema_gradients_and_images(build: Callable[..., ESCModel]) -> None:
    network = {"type": "MSRResNet", "num_feat": 8, "num_block": 1, "upscale": 2}
    model = build(network_g=network, channels_last=True)
    inputs = []
    model.net_g.conv_first.register_forward_pre_hook(lambda net, given: inputs.append(given[0]))
    step(model, steps=1)
    weights = [p for net in (model.net_g, model.net_g_ema) for p in net.parameters() if p.ndim == 4]
    laid_out = [*weights, *(p.grad for p in model.net_g.parameters() if p.ndim == 4), *inputs]
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in laid_out)
    plain = build(network_g=network)
    step(plain, steps=1)
    assert_same_training(model, plain, rtol=1e-5, atol=1e-6)


def test_compiled_training_is_the_uncompiled_one_under_the_same_keys(
    build: Callable[..., ESCModel], tmp_path: Path, esc_log: list[str]
) -> None:
    network = {"type": "MSRResNet", "num_feat": 4, "num_block": 1, "upscale": 2}
    plain, model = build(network_g=network), build(network_g=network, train={"compile": True})
    assert step(model) == pytest.approx(step(plain), rel=1e-5)
    assert model.training_step._compiled is not model.net_g  # it did not fail
    assert_same_training(model, plain, rtol=1e-5, atol=1e-6)
    model.save(epoch=0, current_iter=3)
    stored = torch.load(tmp_path / "net_g_3.pth", weights_only=True)
    for key, net in (("params", plain.net_g), ("params_ema", plain.net_g_ema)):
        assert list(stored[key]) == list(net.state_dict())
    assert not [line for line in esc_log if "compile" in line]


def test_validation_is_not_compiled(build: Callable[..., ESCModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda net: None)
    model = build(train={"compile": True, "ema_decay": 0})  # without EMA the trained network is validated
    model.feed_data({"lq": torch.rand(1, 3, 8, 8)})
    model.test()
    torch.testing.assert_close(model.output, model.net_g(model.lq).detach())


def test_compilation_that_fails_is_told_once_and_training_goes_on(
    build: Callable[..., ESCModel], monkeypatch: pytest.MonkeyPatch, esc_log: list[str]
) -> None:
    def compile_nothing(net: nn.Module) -> Callable[..., Any]:
        def fail(*inputs: Any) -> None:
            raise RuntimeError("no C++ compiler found\n\nSet TORCH_LOGS")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    plain, model = build(), build(train={"compile": True})
    assert step(model) == step(plain)
    assert_same_training(model, plain, rtol=0, atol=0)
    told = [line for line in esc_log if "compile" in line]
    assert told == [
        "train.compile failed (RuntimeError: no C++ compiler found); training goes on uncompiled."
    ]


def test_error_of_the_network_itself_is_no_failure_to_compile(
    build: Callable[..., ESCModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda net: lambda lq: net(lq))
    model = build(train={"compile": True})
    model.feed_data({"lq": torch.rand(2, 4, 8, 8), "gt": torch.rand(2, 3, 16, 16)})
    with pytest.raises(RuntimeError, match="channels"):
        model.optimize_parameters(1)


def train_one_of_two(rank: int, folder: Path, opt: dict[str, Any]) -> None:
    """Train on half of each batch; leave what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = ESCModel({**opt, "dist": True, "rank": rank, "world_size": 2})
    exchanged = []

    def average(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanged.append(bucket.index())
        total = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return total.then(lambda done: done.value()[0])

    model.net_g.register_comm_hook(None, average)
    losses = step(model, part=(rank, 2))
    assert model.training_step._compiled is not model.net_g  # compiled, if it should be
    if rank == 0:
        torch.save((losses, exchanged, model.get_bare_model(model.net_g).state_dict()), folder / "result")
    dist.destroy_process_group()


@pytest.mark.parametrize("changes", [{}, {"compile": True}], ids=str)
def test_two_processes_that_accumulate_agree_with_one_that_does_not(
    options: Callable[..., dict[str, Any]], tmp_path: Path, changes: dict[str, Any]
) -> None:
    network = {"type": "MSRResNet", "num_feat": 4, "num_block": 1, "upscale": 2}
    torch.manual_seed(0)
    one = ESCModel(options(network_g=network))
    opt = options(network_g=network, train={"accumulate": 2, **changes})
    server = torch.multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["esc_basicsr.training.esc_model"])  # imports PyTorch and BasicSR once
    torch.multiprocessing.start_processes(
        train_one_of_two, (tmp_path, opt), nprocs=2, start_method="forkserver"
    )
    losses, exchanged, weights = torch.load(tmp_path / "result", weights_only=True)
    assert losses == pytest.approx(step(one), rel=1e-5)
    torch.testing.assert_close(weights, one.net_g.state_dict(), rtol=1e-5, atol=1e-6)
    assert exchanged == [0] * 3  # once a step, not once a piece
