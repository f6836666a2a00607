"""HiT-SRF reproduces its release, and computes attention alike by two methods."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from esc_basicsr.lab.measure.complexity import measure_complexity
from esc_basicsr.lab.networks import hitsrf_arch
from esc_basicsr.lab.networks.hitsrf_arch import ATTN_TYPES, HiT_SRF, PositionBias
from esc_basicsr.weights.fit import load_weights
from esc_basicsr.weights.read import read_weights

# between the reference and another implementation of its description: 5e-6
TOLERANCE = 2e-5
RELEASED = json.loads(Path(__file__).parents[2].joinpath("golden/hitsrf_keys.json").read_text())
SMALL = {"embed_dim": 24, "depths": [3], "num_heads": [2], "hier_win_ratios": [0.5, 1, 2]}


def build(network_g):
    return HiT_SRF(**{key: value for key, value in network_g.items() if key != "type"})


def small(**options):
    """A network of windows of 2, 4 and 8 pixels, whose biases matter."""
    net = HiT_SRF(2, base_win_size=[4, 4], **{**SMALL, **options}).eval()
    for name, parameter in net.named_parameters():
        if ".pos" in name or name.endswith("spatial_linear.weight"):
            torch.nn.init.normal_(parameter)
    return net


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("attn_type", ATTN_TYPES)
def test_outputs_equal_the_release(golden, attn_type, has_gradients):
    arrays = golden("hitsrf_small")
    net = build({**arrays["config"], "attn_type": attn_type}).eval()
    net.load_state_dict(arrays["weights"], strict=True)
    for number in range(3):
        with torch.set_grad_enabled(has_gradients):
            sr = net(torch.from_numpy(arrays[f"eval{number}/lq"]))
        assert (sr - torch.from_numpy(arrays[f"eval{number}/sr"])).abs().max() <= TOLERANCE


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_published_networks_have_the_released_keys_shapes_and_parameters(scale):
    released = RELEASED[f"HiT_SRF_x{scale}"]
    with torch.device("meta"):
        net, default = build(released["network_g"]), HiT_SRF(scale)
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == released["state_dict"]
    assert sum(parameter.numel() for parameter in net.parameters()) == released["params"]
    assert repr(net) == repr(default)


def test_multiply_adds_are_the_published_ones():
    # All four stages are alike: one is counted, to take a quarter of the time, with what surrounds them.
    counted = measure_complexity(HiT_SRF(4, depths=[6], num_heads=[6]), 180, 320).multiply_adds
    convs, norms = 9 * (3 * 60 + 60 * 60 + 60 * 48), 2 * 5 * 60
    surroundings = 180 * 320 * (convs + norms)
    total = 4 * counted - 3 * surroundings
    assert total == pytest.approx(RELEASED["HiT_SRF_x4"]["flops"], rel=1e-3)


def test_published_weights_load_strictly(data_root):
    path = data_root.parent / "rivals" / "weights" / "HiT-SRF_x4.pth"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    load_weights(HiT_SRF(4), read_weights(path), path)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (5, 31), (8, 16), (17, 9)])
def test_any_size_is_padded_by_reflection_and_cropped(size):
    x = torch.rand(2, *size, 3)
    height, width = (-side % 8 for side in size)
    expected = np.pad(x.numpy(), ((0, 0), (0, height), (0, width), (0, 0)), mode="reflect")
    assert np.array_equal(hitsrf_arch._pad(x, (8, 8)).numpy(), expected)
    with torch.no_grad():
        assert small()(torch.rand(1, 3, *size)).shape == (1, 3, 2 * size[0], 2 * size[1])


def test_a_batch_of_two_is_two_batches_of_one():
    net, lq = small(), torch.rand(2, 3, 9, 13)
    with torch.no_grad():
        assert torch.allclose(net(lq), torch.cat([net(lq[:1]), net(lq[1:])]), atol=1e-5)


def test_both_ways_of_attention_have_the_same_gradients():
    lq = torch.rand(1, 3, 9, 13)
    gradients = []
    for attn_type in ("Naive", "Factored"):
        torch.manual_seed(0)
        net = small(attn_type=attn_type)
        net(lq).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-5), name


def test_position_bias_is_the_mean_over_the_pixels_of_each_cell():
    bias = PositionBias(dim=32, num_heads=3, window=(4, 6), grid=(2, 3))
    found = bias().flip(-1).view(3, 4, 6, 2, 3)
    for y, x, row, column in [(0, 0, 0, 0), (3, 5, 0, 2), (1, 4, 1, 0), (2, 3, 1, 2)]:
        keys = [(2 * row + i, 2 * column + j) for i in range(2) for j in range(2)]
        offsets = torch.tensor([[y - ky, x - kx] for ky, kx in keys], dtype=torch.float32)
        values = bias.pos3(bias.pos2(bias.pos1(bias.pos_proj(offsets))))
        assert torch.allclose(found[:, y, x, row, column], values.mean(0), atol=1e-6)


def test_released_options_without_effect_have_none():
    assert repr(HiT_SRF(2, **SMALL, img_size=16, patch_size=2, expansion_factor=9)) == repr(
        HiT_SRF(2, **SMALL)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upscale": 0}, "upscale must be an integer of at least 1, got 0"),
        ({"embed_dim": 62}, r"embed_dim must be a multiple of twice num_heads \(6\), got 62"),
        ({"embed_dim": 12}, "embed_dim must be at least 16"),
        ({"depths": [7, 6, 6, 6]}, r"depths must be at most the number of hier_win_ratios \(6\)"),
        ({"depths": [6]}, r"num_heads must be as many as depths \(1\)"),
        ({"depths": 6}, "depths must list a number for each stage, got 6"),
        ({"base_win_size": 8}, "base_win_size must be a height and a width, got 8"),
        ({"hier_win_ratios": [1, 1.5]}, r"windows below \[8, 8\] or multiples of it, got 1.5"),
        ({"hier_win_ratios": [0.1]}, "got 0.1"),
        ({"upsampler": "pixelshuffle"}, "upsampler must be pixelshuffledirect, the published one"),
        ({"ape": True}, "ape must be False"),
        ({"mlp_ratio": 0}, "mlp_ratio must be a number above 0"),
        ({"attn_type": "SDPA"}, "attn_type must be one of Factored, Naive, got 'SDPA'"),
    ],
)
def test_options_that_do_not_fit_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        HiT_SRF(**options)


def test_a_mistyped_option_is_refused():
    with pytest.raises(TypeError, match="mlp_ration"):
        HiT_SRF(mlp_ration=2)
