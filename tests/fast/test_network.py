"""The fast implementation gives what the networks of `archs` and the release give."""

import copy
import pickle

import pytest
import torch
from fixtures.networks import GOLDEN
from reference_network import ReferenceNetwork

from esc_basicsr import fast
from esc_basicsr.archs import ESC, VARIANTS, ESCReal, ESCRealM
from esc_basicsr.archs.attention import ATTN_TYPES, WindowAttention
from esc_basicsr.archs.upsamplers import UPSAMPLERS
from esc_basicsr.archs.variants import NETWORKS, build_variant
from esc_basicsr.fast import row_chunks

REAL_FILES = sorted(f"esc_real/{file.stem}" for file in (GOLDEN / "esc_real").glob("*.npz"))
FILES = ["esc_x2", "esc_x3", "esc_x4", "esc_ln_x2", "escfp_x2", "escfp_x3", "escfp_x4"]
OUTPUT_TOLERANCE = 2e-5
ABLATIONS = [
    {"token_mixer": "attention"},
    {"token_mixer": "conv_attention"},
    {"share_large_kernel": False},
    {"share_large_kernel": False, "dynamic_kernel": False},
    {"dynamic_kernel": False},
    {"use_ln": True, "kernel_size": 7},
]


@pytest.fixture(params=[False, True], ids=["eager", "kernels"])
def kernels(request):
    return request.param


@pytest.fixture(params=NETWORKS)
def net(request, tiny_network, build_network):
    scale = 4 if request.param == "ESCReal" else 2
    return lively(build_network(tiny_network, type=request.param, upscaling_factor=scale))


def lively(net):
    """Give a fresh network predicted kernels and biases that matter."""
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def assert_same(made, expected):
    assert torch.allclose(made, expected, rtol=1e-5, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("file", [*FILES, *REAL_FILES])
@pytest.mark.parametrize("attn_type", ATTN_TYPES)
def test_outputs_equal_the_release(file, attn_type, kernels, golden, build_network):
    arrays = golden(file)
    net = build_network(arrays["config"], attn_type=attn_type)
    net.load_state_dict(arrays["weights"], strict=True)
    inputs = [key for key in arrays if key.endswith("/lq")]
    assert len(inputs) >= 2
    for key in inputs:
        with torch.no_grad():
            sr = fast.prepare(net, kernels=kernels)(torch.from_numpy(arrays[key]))
        expected = torch.from_numpy(arrays[key.replace("/lq", "/sr")])
        assert (sr - expected).abs().max() <= OUTPUT_TOLERANCE, key


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_networks_at_sizes_of_use_equal_the_releases_form(variant, kernels, monkeypatch):
    monkeypatch.setitem(row_chunks._CHUNK_PIXELS, "cpu", 1000)
    net = build_variant(variant, 2).eval()
    for parameter in net.parameters():
        if parameter.ndim == 4 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    lq = torch.rand(2, 3, 61, 50)  # large enough for the large kernel's tiles
    with torch.inference_mode():
        expected = ReferenceNetwork(net)(lq)
        assert torch.allclose(net(lq), expected, atol=OUTPUT_TOLERANCE)
        sr = fast.prepare(net, kernels=kernels)(lq)
    assert torch.allclose(sr, expected, atol=OUTPUT_TOLERANCE)
    assert sr.is_contiguous()


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_ablations_equal_the_plain_networks(options, kernels, tiny_network):
    tiny_network.pop("type")
    net = lively(ESC(**tiny_network | options))
    lq = torch.rand(2, 3, 50, 49)
    with torch.no_grad():
        assert_same(fast.prepare(net, kernels=kernels)(lq), net(lq))


@pytest.mark.parametrize("pixels", [1, 64, 200])
def test_chunks_give_what_the_whole_map_gives_and_leave_the_input_alone(net, kernels, monkeypatch, pixels):
    lq = torch.rand(2, 3, 41, 13)
    before = lq.clone()
    expected = net(lq)
    monkeypatch.setitem(row_chunks._CHUNK_PIXELS, "cpu", pixels)
    monkeypatch.setattr(row_chunks, "_LEAST_ROWS", 1)
    with torch.inference_mode():
        assert_same(fast.prepare(net, kernels=kernels)(lq), expected)
    assert torch.equal(lq, before)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 7), (2, 3), (4, 4), (5, 1), (17, 8)])
def test_any_size_and_batch(net, kernels, height, width):
    lq = torch.rand(3, 3, height, width)
    with torch.no_grad():
        sr = fast.prepare(net, kernels=kernels)(lq)
        apart = torch.cat([fast.prepare(net, kernels=kernels)(image[None]) for image in lq])
        assert_same(sr, net(lq))
    assert torch.allclose(sr, apart, atol=1e-5 * float(sr.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_to_the_plain_network(net, dtype):
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    lq = torch.rand(1, 3, 40, 33)
    exact = net(lq)
    with torch.autocast("cpu", dtype), torch.no_grad():
        plain, sr = net(lq), fast.prepare(net)(lq)
    assert sr.dtype == plain.dtype
    errors = [float((output - exact).square().mean().sqrt()) for output in (plain, sr)]
    assert errors[1] <= 1.5 * errors[0] + 1e-6


def test_with_gradients_it_is_the_network_itself(net, kernels):
    lq = torch.rand(1, 3, 6, 6, requires_grad=True)
    expected = net(lq)
    sr = fast.prepare(net, kernels=kernels)(lq)
    assert torch.equal(sr, expected)
    sr.square().sum().backward()
    assert lq.grad is not None and all(p.grad is not None for p in net.parameters())


def test_weights_are_shared_and_copies_are_apart(net):
    prepared = fast.prepare(net)
    lq = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        before = prepared(lq)
        apart, unpickled = copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))
        for module in net.modules():
            if isinstance(module, WindowAttention):
                module.relative_position_bias.normal_(std=5)
        assert not torch.allclose(prepared(lq), before, atol=1e-3)
        assert torch.equal(apart(lq), before) and torch.equal(unpickled(lq), before)


def test_networks_of_others_are_returned_as_they_are():
    conv = torch.nn.Conv2d(3, 3, 1)
    assert fast.prepare(conv) is conv


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("upsampler", UPSAMPLERS[:-2])
@pytest.mark.parametrize("unshuffle_mod", [True, False])
def test_every_upsampler_in_chunks_equals_the_network(
    upsampler, scale, unshuffle_mod, monkeypatch, tiny_network
):
    monkeypatch.setitem(row_chunks._CHUNK_PIXELS, "cpu", 16 * 7)
    tiny_network.pop("type")
    options = tiny_network | {
        "upscaling_factor": scale,
        "upsampler": upsampler,
        "unshuffle_mod": unshuffle_mod,
    }
    try:
        net = lively(ESCRealM(**options))
    except ValueError:
        return  # tests/archs/test_esc_real.py has which
    for height, width in ((3, 2), (85, 9)):
        lq = torch.rand(2, 3, height, width)
        with torch.no_grad():
            expected = net(lq)
            assert_same(fast.prepare(net)(lq), expected)


def test_sampling_by_escreal_in_chunks_equals_the_network(monkeypatch, tiny_network):
    monkeypatch.setitem(row_chunks._CHUNK_PIXELS, "cpu", 16 * 7)
    tiny_network.pop("type")
    net = lively(ESCReal(**tiny_network | {"upscaling_factor": 4}, use_dysample=True))
    lq = torch.rand(2, 3, 40, 9)
    with torch.no_grad():
        assert_same(fast.prepare(net)(lq), net(lq))
