"""Gradients reach the input of networks of every origin, as they run; what cannot be looked into is told."""

import argparse
import types

import pytest
import spandrel
import torch
import torch.nn as nn
from torch import Tensor

from esc_basicsr.archs import ESC
from esc_basicsr.common.errors import UserError
from esc_basicsr.export.torch_formats import write_torchscript
from esc_basicsr.lab.analysis.networks import Subject, subjects_of
from esc_basicsr.lab.networks.by_name import build_network
from esc_basicsr.lab.networks.spandrel_arch import SpandrelNetwork
from esc_basicsr.weights.shipped import load_network, weights_file

TINY = "MSRResNet,num_feat=4,num_block=1"


def subject(net: nn.Module, scale: int = 2) -> Subject:
    return Subject("net", net.eval().requires_grad_(False), scale, 0, "random", "net")


def asked_for(*names: str, scale: int = 2, device: str = "cpu") -> argparse.Namespace:
    return argparse.Namespace(network=list(names), scale=scale, device=device)


@pytest.mark.parametrize("attn_type", ["Naive", "SDPA", "Flex", "auto"])
def test_gradient_of_esc_is_its_slope(attn_type):
    options = {"dim": 16, "pdim": 4, "kernel_size": 5, "n_blocks": 1, "conv_blocks": 1, "window_size": 4}
    net = ESC(upscaling_factor=2, num_heads=2, attn_type=attn_type, **options).double()
    for parameter in net.parameters():
        if parameter.ndim == 4 and not parameter.any():
            nn.init.normal_(parameter)
    esc = subject(net)
    lq = torch.rand(1, 3, 9, 10, dtype=torch.float64)
    direction = torch.randn(lq.shape, dtype=torch.float64) * 1e-6
    weight = torch.randn(1, 3, 18, 20, dtype=torch.float64)
    leaf = lq.clone().requires_grad_()
    gradient = esc.gradient((esc(leaf) * weight).sum(), leaf)
    with torch.no_grad():
        rise = ((esc(lq + direction) - esc(lq - direction)) * weight).sum() / 2
    assert float((gradient * direction).sum()) == pytest.approx(float(rise), rel=1e-4)


def test_networks_are_built_once_each_for_evaluation_and_their_weights_named(tmp_path):
    file = tmp_path / "compact.pth"
    compact = "spandrel.Compact,num_feat=8,num_conv=1"
    torch.save(build_network(compact, 2).model.state_dict(), file)
    options = tmp_path / "net.yml"
    options.write_text("network_g: {type: MSRResNet, num_feat: 4, num_block: 1, upscale: 2}")
    found = subjects_of(asked_for(TINY, str(file), str(options), TINY, compact))
    assert [one.weights for one in found] == ["random", str(file), "random", "random"]
    assert found[1].label == "compact.pth ×2" and found[0].label == f"{TINY} ×2, random weights"
    assert not any(one.net.training for one in found)
    assert not any(parameter.requires_grad for one in found for parameter in one.net.parameters())


def test_networks_of_one_name_are_told_apart_by_their_weights():
    same = ["ESC-light,weights=ESC-light_x2", f"ESC-light,weights={weights_file('ESC-light_x2')}"]
    assert [one.label for one in subjects_of(asked_for(*same))] == [f"{name} ×2" for name in same]
    (alone,) = subjects_of(asked_for(same[0]))
    assert alone.label == "ESC-light ×2"


def test_torchscript_is_looked_into(tmp_path, tiny_network):
    file, checkpoint = tmp_path / "tiny.pt", tmp_path / "tiny.pth"
    tiny_network.pop("type")
    torch.save(ESC(**tiny_network).state_dict(), checkpoint)
    file.write_bytes(write_torchscript(load_network(checkpoint).network, half=False, metadata={}))
    script, ours = subjects_of(asked_for(f"torchscript:{file}", str(checkpoint)))
    lq = torch.rand(1, 3, 16, 16)
    gradients = []
    for one in (script, ours):
        leaf = lq.clone().requires_grad_()
        gradients.append(one.gradient(one(leaf)[..., 16, 16].sum(), leaf))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_spandrel_networks_are_neither_clamped_nor_detached():
    (compact,) = subjects_of(asked_for("spandrel.Compact,num_feat=8,num_conv=1"))
    lq = (torch.rand(1, 3, 8, 9) * 5).requires_grad_()  # out of range, so that a clamped output would show
    sr = compact(lq)
    assert sr.min() < 0 or sr.max() > 1
    assert compact.gradient(sr.sum(), lq).all()


def test_spandrel_networks_are_padded_as_they_need():
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-2:] == (8, 12)
            return x

    descriptor = types.SimpleNamespace(
        model=Picky(),
        scale=1,
        size_requirements=spandrel.SizeRequirements(multiple_of=4),
        _call_fn=lambda model, image: model(image),
    )
    net = subject(SpandrelNetwork(descriptor), scale=1)
    lq = torch.rand(1, 3, 7, 10)
    assert torch.equal(net(lq), lq)


def test_networks_may_overwrite_what_they_are_given():
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    net, lq = subject(InPlace(), scale=1), torch.ones(1, 3, 4, 4, requires_grad=True)
    assert (net.gradient(net(lq).sum(), lq) == 2).all()


class Blind(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Frail(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("too much")


def test_what_cannot_be_looked_into_is_told():
    lq = torch.rand(1, 3, 4, 4, requires_grad=True)
    blind = subject(Blind(), scale=1)
    with pytest.raises(UserError, match="net: no gradient reaches the image"):
        blind.gradient(blind(lq).sum(), lq)
    with pytest.raises(
        UserError, match=r"net: fails on an image of \(1, 3, 4, 4\) \(RuntimeError: too much\)"
    ):
        subject(Frail())(lq)
    with pytest.raises(UserError, match=r"one of \(1, 3, 4, 4\), not \(1, 3, 8, 8\)"):
        subject(nn.Identity())(lq)


def test_scales_that_differ_and_unknown_devices_are_refused(tmp_path):
    file = tmp_path / "net.yml"
    file.write_text("network_g: {type: MSRResNet, num_feat: 4, num_block: 1, upscale: 3}")
    with pytest.raises(UserError, match=r"differ in scale: ESC ×2, .*net.yml ×3"):
        subjects_of(asked_for("ESC", str(file)))
    with pytest.raises(UserError, match="--device abacus"):
        subjects_of(asked_for("ESC", device="abacus"))
    with pytest.raises(UserError, match="'Nothing' is no network"):
        subjects_of(asked_for("Nothing"))
