"""The scan equals the recurrence, step by step in float64, in outputs and in gradients."""

import json
import types

import pytest
import selective_scan_speed
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from esc_basicsr.common.command_line import run_command
from esc_basicsr.lab.networks import selective_scan as module
from esc_basicsr.lab.networks.selective_scan import implementation, selective_scan

# ruff: noqa: N803 - A, B, C and D as in the paper

BATCH, CHANNELS, STATES = 2, 5, 3


@pytest.fixture
def short_chunks(monkeypatch):
    """Several chunks in a short sequence, and two lanes in a block."""
    monkeypatch.setattr(module, "CHUNK", 8)
    monkeypatch.setattr(module, "_BLOCK", {"cpu": 2 * CHANNELS * STATES})


def step_by_step(u, delta, A, B, C, D, delta_bias):
    u, delta, A, B, C, D, delta_bias = (x.double() for x in (u, delta, A, B, C, D, delta_bias))
    dt = F.softplus(delta + delta_bias)
    h = u.new_zeros(len(u), *A.shape)
    y = []
    for step, u_l, B_l, C_l in zip(*(x.unbind(1) for x in (dt, u, B, C)), strict=True):
        h = torch.exp(step[..., None] * A) * h + (step * u_l)[..., None] * B_l[:, None]
        y.append((h * C_l[:, None]).sum(-1) + D * u_l)
    return torch.stack(y, 1)


def random_inputs(n, shift=0.0, dtype=torch.float32):
    sequence, states = (BATCH, n, CHANNELS), (BATCH, n, STATES)
    shapes = (sequence, sequence, (CHANNELS, STATES), states, states, (CHANNELS,), (CHANNELS,))
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[1] += shift
    inputs[2] = -inputs[2].exp()
    return [x.to(dtype).requires_grad_() for x in inputs]


def assert_equals_the_recurrence(inputs, tolerance):
    y, expected = selective_scan(*inputs), step_by_step(*inputs)
    assert y.dtype == inputs[0].dtype
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((y * weights).sum(), inputs)
    references = torch.autograd.grad((expected * weights).sum(), inputs)
    for grad, reference in zip(grads, references, strict=True):
        # a gradient that underflows in float32 is zero there
        assert (grad - reference).abs().max() <= tolerance * max(reference.abs().max(), 1e-30)


# one step, less than a chunk, a whole chunk, one more, several with a rest, several blocks
@pytest.mark.parametrize("n", [1, 5, 8, 9, 53, 200])
def test_any_length_equals_the_recurrence(short_chunks, n):
    assert_equals_the_recurrence(random_inputs(n, dtype=torch.float64), 1e-13)


def test_chunks_as_they_are_equal_the_recurrence_in_float32():
    assert_equals_the_recurrence(random_inputs(2 * module.CHUNK + 3, shift=-3.0), 1e-5)


# steps of 300 decay every state to zero, and products of such decays all the more; steps of 1e-6 leave it
@pytest.mark.parametrize("shift", [300.0, -14.0])
def test_decays_of_zero_and_of_one_equal_the_recurrence(short_chunks, shift):
    inputs = random_inputs(100, shift)
    decays = torch.exp(F.softplus(inputs[1] + inputs[6])[..., None] * inputs[2])
    assert (decays == 0).float().mean() > 0.4 if shift > 0 else decays.min() > 0.999
    assert_equals_the_recurrence(inputs, 1e-5)


def test_gradients_are_those_of_finite_differences(short_chunks):
    assert torch.autograd.gradcheck(selective_scan, random_inputs(10, dtype=torch.float64), fast_mode=True)


def test_a_batch_equals_its_images_alone(short_chunks):
    u, delta, A, B, C, D, bias = (x.detach() for x in random_inputs(30))
    both = selective_scan(u, delta, A, B, C, D, bias)
    for i in range(BATCH):
        one = slice(i, i + 1)
        alone = selective_scan(u[one], delta[one], A, B[one], C[one], D, bias)
        torch.testing.assert_close(both[one], alone)


def test_autocast_leaves_it_in_float32(short_chunks):
    inputs = [x.detach() for x in random_inputs(30)]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(*inputs), selective_scan(*inputs).float())
        halves = [x.bfloat16() for x in inputs]
        result = selective_scan(*halves)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, step_by_step(*halves).bfloat16())


def test_the_operation_tells_pytorch_the_truth_about_itself():
    x, dt, A, B, C = random_inputs(20)[:5]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._recurrence, (dt, A, x, B, C), test_utils=checks)


def test_multiply_adds_are_counted_as_the_authors_count_them():
    inputs = [x.detach() for x in random_inputs(20)]
    with FlopCounterMode(display=False) as counter:
        selective_scan(*inputs)
    assert counter.get_total_flops() == 2 * BATCH * 20 * CHANNELS * (9 * STATES + 1)


def test_a_cpu_has_the_scan_in_pytorch(monkeypatch):
    monkeypatch.setattr(module, "_mamba_ssm", lambda: step_by_step)
    assert implementation(torch.device("cpu")) == "PyTorch"
    assert implementation(torch.device("cuda")) == "mamba_ssm"
    assert implementation(torch.device("cuda"), torch.float64) == "PyTorch"
    monkeypatch.setattr(module, "_mamba_ssm", lambda: None)
    assert implementation(torch.device("cuda")) == "PyTorch"


def test_mamba_ssm_that_cannot_be_loaded_is_said(monkeypatch, esc_log):
    def broken(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(module, "importlib", types.SimpleNamespace(import_module=broken))
    assert module._mamba_ssm.__wrapped__() is None
    assert "undefined symbol" in esc_log[0]


def test_mamba_ssm_is_given_its_own_layout(monkeypatch):
    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        assert all(x.is_contiguous() for x in (u, delta, A, B, C))
        assert u.shape == delta.shape == (BATCH, CHANNELS, 20)
        assert B.shape == C.shape == (BATCH, 1, STATES, 20)
        assert (z, delta_softplus, return_last_state) == (None, True, False)
        u, delta, B, C = (x.transpose(-2, -1) for x in (u, delta, B[:, 0], C[:, 0]))
        return step_by_step(u, delta, A, B, C, D, delta_bias).transpose(1, 2)

    inputs = [x.detach() for x in random_inputs(20)]
    expected = selective_scan(*inputs)
    monkeypatch.setattr(module, "_mamba_ssm", lambda: selective_scan_fn)
    monkeypatch.setattr(module, "implementation", lambda device, dtype: "mamba_ssm")
    torch.testing.assert_close(selective_scan(*inputs), expected)


def test_designs_are_compared_and_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selective_scan_speed, "peak_memory_growth", lambda build, image: 1000)
    arguments = (
        "--size",
        "9",
        "20",
        "--repeats",
        "1",
        "--warmup",
        "0",
        "--device",
        "cpu",
        "-o",
        str(tmp_path),
    )
    name = "selective_scan_speed"
    assert run_command(name, arguments, prog=name) == 0
    rows = json.loads((tmp_path / "selective_scan.json").read_text())["rows"]
    assert [row["design"] for row in rows] == list(selective_scan_speed.DESIGNS)
    assert all(difference < 1e-5 for row in rows for difference in row["differences"])
    assert (tmp_path / "selective_scan.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "selective_scan.png").stat().st_size > 1000


def test_what_memory_is_measured_of_runs_where_gradients_are_off():
    with torch.inference_mode():
        y = selective_scan_speed.Scan(selective_scan_speed.OURS, gradients=True)(torch.zeros(1, 1, 4, 5))
    assert y.shape == (1, 20, selective_scan_speed.CHANNELS)
