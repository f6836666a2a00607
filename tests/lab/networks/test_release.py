"""The release's implementation, which benchmarks compare with, and the tests' oracle equal the release."""

import copy

import pytest
import torch
from reference_network import ReferenceNetwork

from esc_basicsr.lab.networks.release import attend_as_released


@pytest.mark.parametrize("implementation", [attend_as_released, ReferenceNetwork])
@pytest.mark.parametrize(
    "file", ["esc_x2", "esc_x3", "esc_x4", "esc_ln_x2", "escfp_x2", "escfp_x3", "escfp_x4"]
)
def test_release_and_oracle_equal_the_golden_outputs(golden, build_network, file, implementation):
    arrays = golden(file)
    net = build_network(arrays["config"])
    net.load_state_dict(arrays["weights"])
    reference = implementation(net)
    for key in (key for key in arrays if key.endswith("/lq")):
        with torch.no_grad():
            sr = reference(torch.from_numpy(arrays[key]))
        assert (sr - torch.from_numpy(arrays[key.replace("/lq", "/sr")])).abs().max() <= 2e-5, key


@pytest.mark.parametrize("implementation", [attend_as_released, ReferenceNetwork])
@pytest.mark.parametrize("kind", ["ESC", "ESCFP"])
def test_parameters_and_gradients_are_the_networks(tiny_network, build_network, kind, implementation):
    net = build_network(tiny_network, type=kind).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    lq = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    parameters = list(net.parameters())
    ours = torch.autograd.grad(net(lq).square().sum(), parameters)
    reference = implementation(net)
    assert set(map(id, reference.parameters())) == set(map(id, parameters))
    theirs = torch.autograd.grad(reference(lq).square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_flex_gives_what_the_scores_give(tiny_network, build_network, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr("esc_basicsr.lab.networks.release._compiled_flex", lambda: flex_attention)
    net = build_network(tiny_network).requires_grad_(False)
    torch.nn.init.normal_(net.blocks[0].attn.relative_position_bias)
    by_flex = attend_as_released(copy.deepcopy(net), compile_flex=True)
    lq = torch.rand(1, 3, 9, 14)
    assert torch.allclose(by_flex(lq), attend_as_released(net)(lq), atol=1e-6)
