"""On a GPU each backend, the fast implementation and the kernels give the golden outputs and gradients."""

import copy
import itertools

import pytest
import torch

from esc_basicsr import fast
from esc_basicsr.archs.attention import ATTN_TYPES, WindowAttention
from esc_basicsr.fast import gpu
from esc_basicsr.lab.networks.release import attend_as_released

FILES = ["esc_x2", "esc_ln_x2", "escfp_x2"]
SCALE = 128  # of a loss, whose gradients would be lost in float16
# largest difference from the golden output: rounding of the type, through all layers
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.fixture
def case(golden, build_network):
    def make(file):
        arrays = golden(file)
        net = build_network(arrays["config"])
        net.load_state_dict(arrays["weights"])
        return net.cuda().eval(), arrays

    return make


def with_backend(net, attn_type):
    for layer in net.modules():
        if isinstance(layer, WindowAttention):
            layer.attn_type = attn_type
    return net


IMPLEMENTATIONS = {
    **{name: lambda net, name=name: with_backend(net, name) for name in ATTN_TYPES},
    "release": attend_as_released,
    "release-flex": lambda net: attend_as_released(net, compile_flex=True),
    "fast": fast.prepare,
    "kernels": lambda net: fast.prepare(net, kernels=True),
    "graphs": lambda net: fast.prepare(net, kernels=True, mode="graphs"),
    "channels last": lambda net: net.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("file", FILES)
def test_outputs_equal_the_golden_ones(case, file, implementation, dtype):
    net, arrays = case(file)
    run = IMPLEMENTATIONS[implementation](net.to(dtype))
    for key in (key for key in arrays if key.endswith("/lq")):
        lq = torch.from_numpy(arrays[key]).cuda().to(dtype)
        with torch.no_grad():
            sr = run(lq).float().cpu()
        expected = torch.from_numpy(arrays[key.replace("/lq", "/sr")])
        assert (sr - expected).abs().max() <= TOLERANCES[dtype] * max(1, expected.abs().max()), key
    assert not gpu.take_failures()


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("file", FILES)
def test_gradients_by_the_kernels_are_those_of_written_out_scores(case, file, autocast):
    net, _ = case(file)
    by_kernels = copy.deepcopy(net)
    fast.attend_by_kernels(by_kernels)
    lq = torch.rand(2, 3, 19, 22, device="cuda")
    expected = torch.autograd.grad(
        SCALE * with_backend(net, "Naive")(lq).square().mean(), list(net.parameters())
    )
    with torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
        loss = SCALE * by_kernels(lq).float().square().mean()
    made = torch.autograd.grad(loss, list(by_kernels.parameters()))
    tolerance = {None: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}[autocast]
    for part in ("", "relative_position_bias"):  # all, and those that the kernel alone sums up
        has_part = [part in name for name, _ in net.named_parameters()]
        ours, right = (
            torch.cat([grad.flatten() for grad in itertools.compress(grads, has_part)])
            for grads in (made, expected)
        )
        assert (ours - right).norm() <= tolerance * right.norm()
    assert not gpu.take_failures()
