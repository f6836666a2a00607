"""The C++ kernels in bfloat16, within autocast, against double precision."""

import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fixtures.networks import randomise

from esc_basicsr import fast
from esc_basicsr.archs import ESC
from esc_basicsr.archs.attention import BACKENDS
from esc_basicsr.archs.layers import ConvFFN, LayerNorm2d
from esc_basicsr.archs.variants import NETWORKS
from esc_basicsr.common.errors import UserError
from esc_basicsr.fast import kernels, network
from esc_basicsr.fast import kernels_build as build

# a factor is rounded by 2^-9 of itself at most, and results are sums of many
_STEP = 2.0**-8

# what the kernels are compiled with besides
_FLAGS = {
    "vectors": (),
    "emulated": ("-O1", "-include", str(Path(__file__).with_name("emulated_tiles.h"))),
    "refused": ("-O1", "-mamx-tile", "-mamx-bf16"),
}

in_bf16 = torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(autouse=True)
def processor(request):
    if "without" not in request.node.name and not kernels.load().has_bf16:
        pytest.skip("this processor has no instructions for bfloat16")


@pytest.fixture
def compile_with(monkeypatch, tmp_path_factory):
    """A function that has the kernels compiled with one of `_FLAGS`, and loads them."""
    flags = build._FLAGS

    def load(name):
        if _FLAGS[name]:  # the cache knows of no change of a file that they include
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "kernels"))
        monkeypatch.setattr(build, "_FLAGS", (*flags, *_FLAGS[name]))
        build.load.cache_clear()
        return build.load()

    yield load
    build.load.cache_clear()


@pytest.fixture(params=["vectors", pytest.param("emulated", marks=pytest.mark.slow)])
def products(request, compile_with):
    """Products by the vectors of this processor; and by AMX's tiles, which are emulated."""
    assert compile_with(request.param).has_amx or request.param == "vectors"


@pytest.mark.parametrize(
    ("window_size", "heads", "channels"),
    [(1, 1, 3), (2, 2, 8), (5, 2, 12), (7, 1, 16), (8, 3, 21), (16, 1, 4), (32, 2, 16), (32, 1, 64)],
)
def test_window_attention_equals_double_precision_of_its_rounded_input(
    window_size, heads, channels, products
):
    qkv = torch.randn(2, 3 * heads * channels, window_size, 2 * window_size).bfloat16()
    table = torch.randn(heads, (2 * window_size - 1) ** 2)
    exact = BACKENDS["Naive"](qkv.double(), table.double(), window_size)
    with torch.inference_mode():
        made = kernels.window_attention(qkv.permute(0, 2, 3, 1), table, window_size).permute(0, 3, 1, 2)
    assert made.dtype == torch.bfloat16
    assert torch.allclose(made.double(), exact, rtol=_STEP, atol=2 * _STEP * float(exact.std()))


@pytest.mark.parametrize("window_size", [5, 32])
def test_sums_of_weights_are_in_units_of_log2(window_size, products):
    """Gradients need them."""
    qkv = torch.randn(1, window_size, window_size, 24).bfloat16()
    _, made = kernels._attend(
        qkv, torch.zeros(1, (2 * window_size - 1) ** 2), window_size, with_log_sums=True
    )
    q, k, _ = qkv.double().view(-1, 3, 8).unbind(1)
    exact = torch.logsumexp(q @ k.T / math.sqrt(8), 1) / math.log(2)
    assert torch.allclose(made.double(), exact, rtol=0, atol=_STEP)


@pytest.mark.parametrize("factor", [-8, 8])
def test_scores_that_grow_from_key_to_key_equal_double_precision(factor, products):
    window_size = 32
    qkv = torch.randn(1, 24, window_size, window_size).bfloat16()
    table = factor * torch.linspace(-64, 64, (2 * window_size - 1) ** 2)[None]
    exact = BACKENDS["Naive"](qkv.double(), table.double(), window_size)
    with torch.inference_mode():
        made = kernels.window_attention(qkv.permute(0, 2, 3, 1), table, window_size).permute(0, 3, 1, 2)
    assert torch.allclose(made.double(), exact, rtol=_STEP, atol=2 * _STEP * float(exact.std()))


def test_large_scores_do_not_overflow(products):
    qkv = torch.full((1, 8, 8, 24), 1e4).bfloat16()
    qkv[..., 16:] = 3
    with torch.inference_mode():
        made = kernels.window_attention(qkv, torch.zeros(1, 225), 8)
    assert (made == 3).all()


@pytest.mark.parametrize("norm", [LayerNorm2d, None])
@pytest.mark.parametrize(
    ("dim", "ratio", "split"), [(64, 1.25, 16), (48, 1.5, 16), (16, 1.25, 4), (6, 1.3, 2), (5, 1.4, 2)]
)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (37, 29), (70, 3)])
def test_conv_ffn_equals_double_precision(norm, dim, ratio, split, height, width, served, products):
    ffn = ConvFFN(dim, ratio)
    norm = norm(dim) if norm else nn.Identity()
    randomise(ffn, 0.3)
    randomise(norm, 0.3)
    hidden = len(ffn.proj.bias)
    x = torch.randn(2, dim, height, width)
    first, rest = ((torch.randn(channels, hidden) / 4, torch.randn(channels)) for channels in (split, dim))
    fast_net = network.FastNetwork(ESC(2, n_blocks=1), kernels=True)
    with torch.inference_mode():
        with in_bf16:
            whole = fast_net._conv_ffn(norm, ffn, x)
            made_first, made_rest = fast_net._two_ended_conv_ffn(norm, ffn, x.clone(), first, rest)
        assert served == ["conv_ffn"] * 2
        ffn, norm, x = ffn.double(), norm.double(), x.double()
        mid = F.gelu(ffn.proj(norm(x)))
        mid = mid + F.gelu(ffn.dwc(mid))
        exact = [F.conv2d(mid, m.double()[:, :, None, None], b.double()) for m, b in (first, rest)]
        pairs = ((whole, ffn(norm(x))), (made_first, exact[0]), (made_rest, x + exact[1]))
    for made, expected in pairs:
        assert made.dtype == torch.float32
        assert torch.allclose(made.double(), expected, rtol=0, atol=2 * _STEP * float(expected.abs().max()))


def _differs(made, exact):
    return float((made - exact).norm() / exact.norm().clamp(min=1e-6))


@pytest.mark.parametrize(
    ("window_size", "heads", "channels"), [(2, 2, 8), (5, 2, 12), (8, 3, 21), (32, 2, 16), (8, 1, 64)]
)
def test_window_attention_has_the_gradients_of_double_precision(window_size, heads, channels, products):
    qkv = torch.randn(2, window_size, 2 * window_size, 3 * heads * channels).bfloat16().requires_grad_()
    table = torch.randn(heads, (2 * window_size - 1) ** 2, requires_grad=True)
    out = kernels.window_attention(qkv, table, window_size)
    upstream = torch.randn(out.shape).bfloat16()
    grads = torch.autograd.grad(out, (qkv, table), upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in (qkv, table)]
    expected = BACKENDS["Naive"](exact[0].permute(0, 3, 1, 2), exact[1], window_size).permute(0, 2, 3, 1)
    exact_grads = torch.autograd.grad(expected, exact, upstream.double())
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]
    for made, precise in zip((out, *grads), (expected, *exact_grads), strict=True):
        assert _differs(made.double(), precise) < 2 * _STEP


@pytest.mark.parametrize(
    ("dim", "hidden", "split", "residual"), [(64, 80, 16, True), (64, 128, 0, False), (5, 7, 2, True)]
)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (2, 13, 5)])
def test_conv_ffn_has_the_gradients_of_double_precision(
    dim, hidden, split, residual, batch, height, width, products
):
    shapes = [(hidden, dim), (hidden,), (hidden, 1, 3, 3), (hidden,), (split + dim, hidden), (split + dim,)]
    tensors = [torch.randn(batch, dim, height, width), *(torch.randn(shape) / 4 for shape in shapes)]
    upstream = [torch.randn(batch, channels, height, width) for channels in (split, dim)]

    def run(tensors, upstream):
        for tensor in tensors:
            tensor.requires_grad_()
        x, *weights = tensors
        if x.dtype == torch.float32:
            with in_bf16:
                made = kernels.conv_ffn(x, None, weights[:2], weights[2:4], weights[4:], split, residual)
        else:
            proj, proj_bias, dwc, dwc_bias, last, last_bias = weights
            mid = F.gelu(F.conv2d(x, proj[:, :, None, None], proj_bias))
            mid = mid + F.gelu(F.conv2d(mid, dwc, dwc_bias, padding=1, groups=hidden))
            mid = F.conv2d(mid, last[:, :, None, None], last_bias)
            made = mid[:, :split], mid[:, split:] + (x if residual else 0)
        return [*made, *torch.autograd.grad(made, tensors, upstream)]

    results = run(tensors, upstream)
    exact = run([tensor.detach().double() for tensor in tensors], [each.double() for each in upstream])
    for made, precise in zip(results, exact, strict=True):
        assert made.dtype == torch.float32
        assert _differs(made.double(), precise) < 3 * _STEP


def test_training_in_bf16_has_nearly_the_gradients_of_float32(build_network, tiny_network, served):
    net = build_network({**tiny_network, "dim": 24, "pdim": 16, "kernel_size": 7})
    fast.train_by_kernels(net)
    lq, gt = torch.rand(2, 3, 20, 20), torch.rand(2, 3, 40, 40)
    gradients = []
    for is_half in (True, False):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            sr = net(lq)
        (sr.float() - gt).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
        attention = "window_attention in bfloat16" if is_half else "window_attention"
        assert {*served} == {attention, "conv_ffn", "convolve_symmetric"}
        served.clear()
    for made, expected in zip(*gradients, strict=True):
        assert (made - expected).norm() < 0.05 * expected.norm() + 1e-7


@pytest.mark.parametrize("name", NETWORKS)
def test_training_in_bf16_has_its_residual_stream_in_float32(name, tiny_network):
    tiny_network.pop("type")
    net: Any = NETWORKS[name](**tiny_network | {"upscaling_factor": 4})
    fast.train_by_kernels(net)
    kinds = []
    ends = [net.to_img] if isinstance(net.to_img, nn.Conv2d) else []
    for layer in (net.proj, *net.blocks, *(block.conv_out for block in net.blocks), net.last, *ends):
        layer.register_forward_hook(lambda layer, inputs, out: kinds.extend((inputs[0].dtype, out.dtype)))
    with in_bf16:
        net(torch.rand(1, 3, 8, 8))
    assert len(kinds) == 2 * (4 + len(ends)) and {*kinds} == {torch.float32}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_come_close_and_keep_their_sums_in_float32(name, tiny_network, served, products):
    tiny_network.pop("type")
    if name == "ESCReal":
        tiny_network["upscaling_factor"] = 4
    net = fast.prepare(NETWORKS[name](**tiny_network).eval(), kernels=True)
    lq = torch.rand(2, 3, 33, 50)
    with torch.inference_mode():
        expected = net(lq)
        served.clear()
        with in_bf16:
            made = net(lq)
    assert {*served} == {"window_attention in bfloat16", "conv_ffn"}
    assert 0 < (made - expected).square().mean().sqrt() < 2 * _STEP * expected.std()


def test_number_of_threads_changes_nothing(build_network, tiny_network, products):
    net = fast.prepare(build_network(tiny_network).eval(), kernels=True)
    lq = torch.rand(2, 3, 50, 41)
    threads = torch.get_num_threads()
    made = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            with torch.inference_mode(), in_bf16:
                made.append(net(lq))
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(*made, atol=1e-3)


def test_nan_is_not_lost(build_network, tiny_network, served, products):
    net = fast.prepare(build_network(tiny_network).eval(), kernels=True)
    lq = torch.rand(1, 3, 16, 16)
    lq[0, 0, 3, 3] = float("nan")
    with torch.inference_mode(), in_bf16:
        assert net(lq).isnan().any()
    assert served


def test_float16_gradients_and_weights_in_bfloat16_go_without(build_network, tiny_network, served):
    plain = build_network(tiny_network).eval()
    net = fast.prepare(plain, kernels=True)
    lq = torch.rand(1, 3, 16, 16)
    with in_bf16:
        net(lq)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        net(lq)
    plain.bfloat16()
    with torch.no_grad(), in_bf16:
        net(lq)
    assert not served


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["emulated", "refused"])
def test_tiles_give_what_vectors_give(flags, compile_with):
    """By emulated tiles to rounding; where the system refuses tiles, by the vectors themselves."""
    qkv = torch.randn(1, 64, 64, 3 * 4).bfloat16()
    table = torch.randn(1, (2 * 64 - 1) ** 2)
    ffn = ConvFFN(48, 1.5)
    randomise(ffn, 0.3)
    x = torch.randn(1, 48, 9, 50)
    weights = [(m.weight.flatten(1), m.bias) for m in (ffn.proj, ffn.dwc, ffn.aggr)]

    def run(flags):
        has_amx = compile_with(flags).has_amx
        with torch.inference_mode(), in_bf16:
            attended = kernels.window_attention(qkv, table, 64).float()
            return has_amx, attended, kernels.conv_ffn(x, None, *weights)[1]

    is_amx, *expected = run("vectors")
    has_tiles, *made = run(flags)
    assert has_tiles == (is_amx or flags == "emulated")
    # weights of attention are rounded to bfloat16 from another largest score
    tolerances = (2e-3 if has_tiles else 1e-6, 1e-5)
    for one, other, tolerance in zip(made, expected, tolerances, strict=True):
        assert (one - other).abs().mean() <= tolerance * other.std()


@pytest.mark.slow
def test_form_for_amx_compiles(tmp_path):
    if platform.machine() != "x86_64":
        pytest.skip("AMX is of x86-64")
    flags = [flag.replace("native", "sapphirerapids") for flag in build._FLAGS if flag != "-shared"]
    made = tmp_path / "cpu.s"
    ended = subprocess.run(
        [*build._compiler(), *flags, "-O1", "-S", str(build._SOURCE), "-o", str(made)],
        capture_output=True,
        text=True,
    )
    if ended.returncode and "sapphirerapids" in ended.stderr:
        pytest.skip("this compiler does not know AMX")
    assert ended.returncode == 0, ended.stderr
    assert "tdpbf16ps" in made.read_text()


def test_large_kernel_is_left_to_the_processors_products_where_it_has_amx(
    build_network, tiny_network, monkeypatch
):
    net = fast.prepare(build_network(tiny_network | {"kernel_size": 13}).eval(), kernels=True)
    lq = torch.rand(1, 3, 64, 64)
    library = build.load()
    seen = []
    convolve = network.SymmetricKernel.convolve
    monkeypatch.setattr(
        network.SymmetricKernel,
        "convolve",
        lambda *args: (seen.append(convolve(*args)), seen[-1])[1],
    )
    made = []
    for has_amx in (False, True):
        monkeypatch.setattr(kernels, "load", lambda has_amx=has_amx: library._replace(has_amx=has_amx))
        with torch.inference_mode(), in_bf16:
            made.append(net(lq))
    assert {each.dtype for each in seen} == {torch.float32, torch.bfloat16}
    assert torch.allclose(*made, atol=0.05 * float(made[0].std()))


def test_bfloat16_is_refused_without_instructions(monkeypatch):
    if platform.machine() != "x86_64":
        pytest.skip("an instruction set of x86-64 is tried")
    flags = [flag.replace("native", "x86-64-v3") for flag in build._FLAGS]
    monkeypatch.setattr(build, "_FLAGS", tuple(flags))
    build.load.cache_clear()
    try:
        with pytest.raises(UserError, match="no instructions that multiply it"):
            fast.require_bf16()
        with in_bf16, torch.no_grad():
            assert not kernels.serves(torch.rand(1, 4, 8, 8))
        with pytest.raises(ValueError, match="expected contiguous float32 tensors"):
            kernels.window_attention(torch.rand(1, 8, 8, 12).bfloat16(), torch.rand(1, 225), 8)
    finally:
        build.load.cache_clear()
