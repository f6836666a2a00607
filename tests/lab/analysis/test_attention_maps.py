"""Attention modules are found and seen as they work, in networks of every origin."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs import ESC
from esc_basicsr.common.errors import UserError
from esc_basicsr.lab.analysis.attention_maps import (
    attention_names,
    attention_row,
    group_of,
    locate,
    match_names,
    refuse_compiled,
    see,
    tile_of,
)
from esc_basicsr.lab.analysis.networks import Subject
from esc_basicsr.lab.networks.by_name import build_network

SWINIR = (
    "SwinIR,img_size=16,embed_dim=8,depths=[2,2],num_heads=[2,2],window_size=4,mlp_ratio=1,"
    "upsampler=pixelshuffledirect"
)
MAMBA = (
    "MambaIRv2Light,embed_dim=8,d_state=2,depths=[2,2],num_heads=[2,2],window_size=4,inner_rank=2,"
    "num_tokens=4,mlp_ratio=1.0,upsampler=pixelshuffledirect"
)
HIT = "HiT_SRF,embed_dim=16,depths=[2],num_heads=[2],base_win_size=[4,4],hier_win_ratios=[0.5,3]"
SWIN = "img_size=16,embed_dim=8,depths=[2],num_heads=[2],window_size=4,upscale=2"
SPANDREL = {
    "ATD": f"{SWIN},category_size=16,num_tokens=8,reducted_dim=4,upsampler=pixelshuffledirect",
    "HAT": f"{SWIN},compress_ratio=2,squeeze_factor=2,upsampler=pixelshuffle",
    "SwinIR": f"{SWIN},upsampler=pixelshuffledirect",
    "Swin2SR": f"{SWIN},upsampler=pixelshuffledirect",
}


def subject(net: nn.Module, scale: int = 2) -> Subject:
    return Subject("net", net.eval().requires_grad_(False), scale, 0, "random", "net")


def tiny_esc(**options) -> nn.Module:
    sizes = {"dim": 16, "pdim": 4, "kernel_size": 5, "n_blocks": 2, "conv_blocks": 1, "window_size": 4}
    return ESC(upscaling_factor=2, num_heads=2, **sizes, **options)


def seen_of(net: nn.Module, lq: Tensor):
    one = subject(net)
    layers = locate(one, attention_names(one.net, "net", None))
    return layers, see(one, layers, lq)


def windows_of(x: Tensor, window: int, shift: int) -> Tensor:
    """(H, W, C) -> (rows, columns, w², C), one by one."""
    height, width = x.shape[:2]
    rows, columns = height // window, width // window
    out = x.new_empty(rows, columns, window**2, x.shape[2])
    for r in range(rows):
        for c in range(columns):
            for i in range(window**2):
                y, z = r * window + i // window + shift, c * window + i % window + shift
                out[r, c, i] = x[y % height, z % width]
    return out


@pytest.mark.parametrize("index, shift", [(0, 0), (1, 2)])
def test_swinir_is_seen_window_by_window(index, shift):
    net = build_network(SWINIR, 2)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    lq = torch.rand(1, 3, 12, 20)
    layers, seen = seen_of(net, lq)
    name = f"layers.0.residual_group.blocks.{index}.attn"
    assert [layer.name for layer in layers][index] == name and layers[index].shift == shift
    block = net.get_submodule(name.removesuffix(".attn"))
    kept: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        net(lq)
    handle.remove()
    attention = block.attn
    x = windows_of(block.norm1(kept[0])[0].unflatten(0, (12, 20)), 4, shift)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5)
    bias = attention.relative_position_bias_table[attention.relative_position_index].permute(2, 0, 1)
    scores = q @ k.mT * attention.scale + bias
    place = windows_of(torch.arange(240.0).view(12, 20, 1), 4, shift)[..., 0]
    if shift:  # what the seam parts may not attend to each other
        side = (place // 20 < shift) * 2 + (place % 20 < shift)
        scores = scores.masked_fill((side[..., :, None] != side[..., None, :])[:, :, None], -100)
    maps = scores.softmax(-1)
    torch.testing.assert_close(seen[name].maps.weights, maps.mean(2), atol=1e-5, rtol=1e-4)
    assert (seen[name].maps.window, seen[name].maps.shift) == (4, shift)
    features = attention.proj((maps @ v).transpose(2, 3).flatten(3))
    expected = windows_of(seen[name].features, 4, shift)
    torch.testing.assert_close(expected, features, atol=1e-4, rtol=1e-4)


def test_mambair_is_put_together_of_its_parts():
    net = build_network(MAMBA, 2)
    lq = torch.rand(1, 3, 12, 20)
    layers, seen = seen_of(net, lq)
    assert [layer.shift for layer in layers] == [0, 2, 0, 2]
    assert [group_of(layer.name) for layer in layers] == sorted(
        ["layers.0.residual_group.layers", "layers.1.residual_group.layers"] * 2
    )
    module = net.get_submodule(layers[1].name)
    kept: list[Tensor] = []
    module.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    module.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        net(lq)
    v = windows_of(kept[0][0], 4, 2).unflatten(-1, (3, 2, 4))[..., 2, :, :].transpose(2, 3)
    weights = seen[layers[1].name].maps.weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5, 16))
    torch.testing.assert_close(seen[layers[1].name].features, kept[1][0])
    with torch.no_grad():
        module.relative_position_bias_table.zero_()
        kept[0][..., :16] = 0  # neither queries nor keys: uniform on what is not masked
        seen_uniform = module.forward(kept[0], torch.zeros(16, 16, dtype=torch.long))
    place = windows_of(torch.arange(240.0).view(12, 20, 1), 4, 2)[..., 0]
    side = (place // 20 < 2) * 2 + (place % 20 < 2)
    mask = (side[..., :, None] == side[..., None, :]).float()
    uniform = mask / mask.sum(-1, keepdim=True)
    mixed = module.proj((uniform[:, :, None] @ v).transpose(2, 3).flatten(3))
    torch.testing.assert_close(windows_of(seen_uniform[0], 4, 2), mixed, atol=1e-5, rtol=1e-4)
    assert float(weights[mask == 0].max()) < 1e-30


@pytest.mark.parametrize("attn_type", ["Naive", "SDPA", "Flex", "auto"])
def test_esc_is_seen_whatever_its_backend(attn_type):
    torch.manual_seed(1)
    net = tiny_esc(attn_type=attn_type)
    lq = torch.rand(1, 3, 8, 12)
    layers, seen = seen_of(net, lq)
    assert [layer.name for layer in layers] == ["blocks.0.attn", "blocks.1.attn"]
    assert net.blocks[0].attn.attn_type == attn_type
    block = net.blocks[0]
    kept: list[Tensor] = []
    block.attn.to_qkv.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.enable_grad():
        net(lq)
    qkv = windows_of(kept[0][0].permute(1, 2, 0), 4, 0).unflatten(-1, (3, 2, 8))
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)
    bias = F.pad(block.attn.relative_position_bias, (0, 0))
    scores = q @ k.mT / math.sqrt(8)
    for query in range(16):
        for key in range(16):
            dy, dx = key // 4 - query // 4, key % 4 - query % 4
            scores[..., query, key] += bias[:, (dy + 3) * 7 + dx + 3]
    maps = scores.softmax(-1)
    torch.testing.assert_close(seen["blocks.0.attn"].maps.weights, maps.mean(2), atol=1e-5, rtol=1e-4)
    out = block.attn.to_out(
        (maps @ v).transpose(2, 3).flatten(3).flatten(0, 1)[..., None].permute(0, 2, 1, 3)
    )
    features = windows_of(seen["blocks.0.attn"].features, 4, 0).flatten(0, 1)
    torch.testing.assert_close(features, out[..., 0].mT, atol=1e-5, rtol=1e-4)


def test_hit_srf_has_features_and_no_maps():
    lq = torch.rand(1, 3, 10, 14)  # padded by the network to its windows of 12
    layers, seen = seen_of(build_network(HIT, 2), lq)
    assert [tuple(seen[layer.name].features.shape) for layer in layers] == [(10, 14, 16)] * 2
    assert all(one.maps is None for one in seen.values())


@pytest.mark.parametrize("kind", SPANDREL)
def test_networks_of_spandrel_are_seen(kind):
    one = subject(build_network(f"spandrel.{kind},{SPANDREL[kind]}", 2))
    names = attention_names(one.net, "net", None)
    assert len(names) == 2 and tile_of(one.net, names) == 4
    layers = locate(one, names)
    seen = see(one, layers, torch.rand(1, 3, 16, 32))
    assert [layer.shift for layer in layers] == [0, 2]
    for found in seen.values():
        assert found.features.shape == (16, 32, 8)
        torch.testing.assert_close(found.maps.weights.sum(-1), torch.ones(4, 8, 16))


def test_images_that_a_network_pads_are_told():
    net = build_network(SWINIR, 2)
    net.register_forward_pre_hook(lambda module, args: (F.pad(args[0], (0, 4)),))
    net.register_forward_hook(lambda module, args, sr: sr[..., :-8])
    one = subject(net)
    layers = locate(subject(build_network(SWINIR, 2)), attention_names(net, "net", None))
    with pytest.raises(UserError, match="works on 128 pixels of an image of 12×8: the network pads it"):
        see(one, layers, torch.rand(1, 3, 8, 12))


def test_nothing_is_left_behind():
    net = tiny_esc()
    before = {key: list(module._forward_hooks) for key, module in net.named_modules()}
    seen_of(net, torch.rand(1, 3, 8, 12))
    assert before == {key: list(module._forward_hooks) for key, module in net.named_modules()}
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_modules_are_named_by_patterns():
    net = build_network(SWINIR, 2)
    found = attention_names(net, "net", ["layers.1.*.attn", "layers.0.*.0.attn"])
    assert [name[7] for name in found] == ["0", "1", "1"]
    with pytest.raises(UserError, match=r"no module is called 'body.*'. Candidates: layers.0.residual"):
        attention_names(net, "net", ["body.*"])
    with pytest.raises(UserError, match="None of its modules is called like attention"):
        match_names(net, "net", ["body.*"], [])


def test_networks_without_attention_are_told():
    net = build_network(
        "RCAN,num_in_ch=3,num_out_ch=3,num_feat=4,num_group=1,num_block=14,squeeze_factor=2", 2
    )
    with pytest.raises(UserError, match=r"Name them by --modules PATTERN. Candidates: .*(RCAB|attention)"):
        attention_names(net, "net", None)
    with pytest.raises(UserError, match="None of its modules is called like attention"):
        attention_names(nn.Sequential(nn.Conv2d(3, 3, 1)), "net", None)


class Odd(nn.Module):
    """Modules that cannot be looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.pooled = nn.ReLU(), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.table = nn.LSTM(3, 3)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.pooled(x)
        self.table(x[0].transpose(0, 2))
        return self.twice(self.twice(x))


@pytest.mark.parametrize(
    "name, message",
    [
        ("twice", "net: twice runs 2 times"),
        ("never", "net: never does not run"),
        ("pooled", r"net: pooled makes \(1, 3, 1, 1\) of an image of 32×33, which cannot be laid over it"),
        ("table", r"net: table makes \(33, 32, 3\)"),
    ],
)
def test_modules_that_cannot_be_laid_over_the_image_are_told(name, message):
    with pytest.raises(UserError, match=message):
        locate(subject(Odd(), scale=1), [name])


def test_compiled_networks_are_told(tmp_path):
    torch.jit.save(
        torch.jit.trace(tiny_esc().eval(), torch.rand(1, 3, 8, 8), check_trace=False), tmp_path / "net.pt"
    )
    with pytest.raises(UserError, match=r"net is compiled \(TorchScript\): its layers cannot be looked into"):
        refuse_compiled(Subject("net", torch.jit.load(tmp_path / "net.pt"), 2, 0, "random", "net"))


def test_as_many_channels_as_rows_are_not_taken_for_rows():
    one = subject(build_network("MSRResNet,num_feat=32,num_block=1", 2))
    (layer,) = locate(one, ["conv_hr"])
    assert see(one, [layer], torch.rand(1, 3, 12, 20))["conv_hr"].features.shape == (24, 40, 32)


def test_shifts_that_differ_are_refused():
    net = build_network(SWINIR, 2)
    attention = net.get_submodule("layers.0.residual_group.blocks.1.attn")
    attention.shift_size = (2, 2)
    names = attention_names(net, "net", None)
    assert [layer.shift for layer in locate(subject(net), names)] == [0, 2, 0, 2]
    attention.shift_size = (0, 2)
    with pytest.raises(UserError, match=r"shifts its windows by \(0, 2\)"):
        locate(subject(net), names)


def test_layers_are_ordered_as_they_run():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.second(x))

    assert [layer.name for layer in locate(subject(Backwards(), 1), ["first", "second"])] == [
        "second",
        "first",
    ]


@pytest.mark.parametrize("place", [(0, 0), (5, 7), (7, 11), (3, 1)])
def test_one_pixels_row_lies_where_its_window_does(place):
    _, seen = seen_of(build_network(SWINIR, 2), torch.rand(1, 3, 8, 12))
    for index in range(2):
        maps = seen[f"layers.0.residual_group.blocks.{index}.attn"].maps
        weights, (top, left) = attention_row(maps, *place)
        assert top <= place[0] < top + 4 and left <= place[1] < left + 4
        assert (top - maps.shift) % 4 == (left - maps.shift) % 4 == 0
        assert float(weights.sum()) == pytest.approx(1)
        beyond = [
            float(weights[y, x])
            for y in range(4)
            for x in range(4)
            if not (0 <= top + y < 8 and 0 <= left + x < 12)
        ]
        assert np.allclose(beyond, 0)


def test_a_layers_group_is_all_of_its_name_before_its_number():
    assert group_of("layers.0.residual_group.blocks.3.attn") == "layers.0.residual_group.blocks"
    assert group_of("blocks.4.attn") == "blocks"
    assert group_of("blocks.4.attn2") == "blocks"
    assert group_of("layers.0.swin1.attn") == "layers.0"
    assert group_of("encoder.attn") == "encoder"
