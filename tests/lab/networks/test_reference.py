"""The release's implementation, which benchmarks compare with, equals the release and the package."""

import pytest
import torch

from esc_basicsr.lab.networks.reference import ReferenceNetwork


@pytest.mark.parametrize(
    "file", ["esc_x2", "esc_x3", "esc_x4", "esc_ln_x2", "escfp_x2", "escfp_x3", "escfp_x4"]
)
def test_reference_equals_the_golden_outputs(golden, build_network, file):
    arrays = golden(file)
    net = build_network(arrays["config"])
    net.load_state_dict(arrays["weights"])
    reference = ReferenceNetwork(net)
    for key in (key for key in arrays if key.endswith("/lq")):
        with torch.no_grad():
            sr = reference(torch.from_numpy(arrays[key]))
        assert (sr - torch.from_numpy(arrays[key.replace("/lq", "/sr")])).abs().max() <= 2e-5, key


@pytest.mark.parametrize("kind", ["ESC", "ESCFP"])
def test_reference_shares_its_networks_parameters_and_gradients(tiny_network, build_network, kind):
    net = build_network(tiny_network, type=kind).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    lq = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    reference = ReferenceNetwork(net)
    parameters = list(net.parameters())
    assert set(map(id, reference.parameters())) == set(map(id, parameters))
    ours = torch.autograd.grad(net(lq).square().sum(), parameters)
    theirs = torch.autograd.grad(reference(lq).square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
