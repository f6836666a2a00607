"""The compiled kernels against the layers that they stand in for."""

import copy
import multiprocessing
import os
import pickle
import platform
import stat
import time

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fixtures.networks import randomise

from esc_basicsr import fast
from esc_basicsr.archs import ESC
from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.archs.conv_attention import average_over_symmetries
from esc_basicsr.archs.layers import ConvFFN, LayerNorm2d
from esc_basicsr.archs.variants import NETWORKS
from esc_basicsr.common.errors import UserError
from esc_basicsr.fast import kernels, network
from esc_basicsr.fast import kernels_build as build


@pytest.fixture
def three_threads():
    """Three threads, which share what one image has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["native", "x86-64-v3", "x86-64"])
def instructions(request, monkeypatch):
    """The kernels, compiled for this processor and for older ones of its kind."""
    if request.param != "native":
        if platform.machine() != "x86_64":
            pytest.skip("older instruction sets are tried on x86-64")
        flags = [flag.replace("native", request.param) for flag in build._FLAGS]
        monkeypatch.setattr(build, "_FLAGS", tuple(flags))
    build.load.cache_clear()
    yield
    build.load.cache_clear()


@pytest.mark.parametrize(
    ("window_size", "heads", "channels"),
    [(1, 1, 3), (2, 2, 8), (5, 2, 12), (7, 1, 16), (8, 3, 16), (16, 1, 4), (32, 2, 16)],
)
def test_window_attention_equals_double_precision_in_output_and_gradients(
    window_size, heads, channels, served, instructions
):
    layer = WindowAttention(heads * channels, window_size, heads, "Naive")
    randomise(layer, 0.3)
    x = torch.randn(2, heads * channels, window_size + 3, 2 * window_size, requires_grad=True)
    target = torch.randn(x.shape)
    parameters = (x, *layer.parameters())
    plain = copy.deepcopy(layer)
    fast.attend_by_kernels(layer)
    out = layer(x)
    grads = torch.autograd.grad((out * target).sum(), parameters)
    with torch.inference_mode():
        assert torch.allclose(layer(x), out, atol=1e-6)
    assert served == ["window_attention"] * 2
    exact_x = x.detach().double().requires_grad_()
    exact = plain.double()(exact_x)
    exact_grads = torch.autograd.grad((exact * target).sum(), (exact_x, *plain.parameters()))
    assert torch.allclose(out.double(), exact, atol=1e-5 * float(exact.abs().max()))
    for name, grad, expected in zip(["x", *dict(layer.named_parameters())], grads, exact_grads, strict=True):
        # One window of one pixel: its bias and its scores change nothing, but for rounding.
        scale = max(float(expected.abs().max()), 3e-3)
        assert torch.allclose(grad.double(), expected, atol=1e-4 * scale), name


@pytest.mark.parametrize("norm", [LayerNorm2d, None])
@pytest.mark.parametrize(
    ("dim", "ratio", "split"), [(64, 1.25, 16), (48, 1.5, 16), (16, 1.25, 4), (6, 1.3, 2)]
)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (37, 29), (70, 3)])
def test_conv_ffn_equals_the_layers(norm, dim, ratio, split, height, width, served, instructions):
    ffn = ConvFFN(dim, ratio)
    norm = norm(dim) if norm else nn.Identity()
    randomise(ffn, 0.3)
    randomise(norm, 0.3)
    x = torch.randn(2, dim, height, width)
    hidden = len(ffn.proj.bias)
    first, rest = ((torch.randn(channels, hidden) / 4, torch.randn(channels)) for channels in (split, dim))
    with torch.inference_mode():
        expected = ffn(norm(x))
        y = norm(x)
        mid = F.gelu(ffn.proj(y))
        mid = mid + F.gelu(ffn.dwc(mid))
        expected_first, expected_rest = (F.conv2d(mid, m[:, :, None, None], b) for m, b in (first, rest))
        fast_net = network.FastNetwork(ESC(2, n_blocks=1), kernels=True)
        assert torch.allclose(fast_net._conv_ffn(norm, ffn, x), expected, atol=2e-5)
        made_first, made_rest = fast_net._two_ended_conv_ffn(norm, ffn, x.clone(), first, rest)
    assert served == ["conv_ffn"] * 2
    assert torch.allclose(made_first, expected_first, atol=2e-5)
    assert torch.allclose(made_rest, x + expected_rest, atol=2e-5)


def test_gelu_is_exact_to_rounding_over_its_whole_range(served):
    ffn = ConvFFN(1, 1)
    with torch.inference_mode():
        for parameter, value in zip(ffn.parameters(), (1, 0, 0, 0, 1, 0), strict=True):
            parameter.fill_(value)
        x = torch.linspace(-30, 30, 100001).view(1, 1, 1, -1)
        made = network.FastNetwork(ESC(2, n_blocks=1), kernels=True)._conv_ffn(nn.Identity(), ffn, x)
    assert served
    exact = F.gelu(x.double())
    assert ((made - exact).abs() <= 1e-6 + 1e-7 * exact.abs() + 1e-7 * x.abs()).all()


def _conv_ffn(x, proj, proj_bias, dwc, dwc_bias, last, last_bias, split, residual):
    hidden = F.gelu(F.conv2d(x, proj[:, :, None, None], proj_bias))
    hidden = hidden + F.gelu(F.conv2d(hidden, dwc, dwc_bias, padding=1, groups=len(dwc)))
    made = F.conv2d(hidden, last[:, :, None, None], last_bias)
    return made[:, :split], made[:, split:] + (x if residual else 0)


@pytest.mark.parametrize(
    ("dim", "hidden", "split", "residual"),
    [(64, 80, 16, True), (64, 128, 0, False), (6, 7, 2, True), (48, 72, 16, False)],
)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (2, 13, 5), (1, 40, 9)])
def test_conv_ffn_has_the_gradients_of_double_precision(
    dim, hidden, split, residual, batch, height, width, instructions, three_threads
):
    shapes = [(hidden, dim), (hidden,), (hidden, 1, 3, 3), (hidden,), (split + dim, hidden), (split + dim,)]
    tensors = [torch.randn(batch, dim, height, width), *(torch.randn(shape) / 4 for shape in shapes)]
    upstream = torch.randn(batch, split, height, width), torch.randn(batch, dim, height, width)
    for tensor in tensors:
        tensor.requires_grad_()
    x, *weights = tensors
    made = kernels.conv_ffn(x, None, weights[:2], weights[2:4], weights[4:], split, residual)
    grads = torch.autograd.grad(made, tensors, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = _conv_ffn(*exact, split, residual)
    exact_grads = torch.autograd.grad(expected, exact, [each.double() for each in upstream])
    for result, precise in zip([*made, *grads], [*expected, *exact_grads], strict=True):
        if precise.numel():
            assert (result - precise).abs().max() <= 1e-5 * precise.abs().max()


@pytest.mark.parametrize(("size", "channels", "out_channels"), [(13, 16, 16), (7, 16, 32)])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 3, 1), (2, 21, 50)])
def test_large_kernel_equals_double_precision_in_output_and_gradients(
    size, channels, out_channels, batch, height, width, instructions, three_threads
):
    weight = average_over_symmetries(torch.randn(out_channels, channels, size, size)).requires_grad_()
    x = torch.randn(batch, channels, height, width, requires_grad=True)
    assert kernels.serves_large_kernel(weight)
    made = kernels.convolve_symmetric(x, weight)
    upstream = torch.randn(made.shape)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.conv2d(*exact, padding=size // 2)
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()
    grads = torch.autograd.grad(made, (x, weight), upstream)
    x_grad, weight_grad = torch.autograd.grad(expected, exact, upstream.double())
    # The weights are symmetric: what their gradient is on average over the symmetries is all that counts.
    pairs = ((grads[0], x_grad), (average_over_symmetries(grads[1]), average_over_symmetries(weight_grad)))
    for result, precise in pairs:
        assert (result - precise).abs().max() <= 2e-5 * precise.abs().max()


def test_small_kernels_and_odd_channels_are_not_for_tiles():
    assert not kernels.serves_large_kernel(torch.zeros(16, 16, 5, 5))
    assert not kernels.serves_large_kernel(torch.zeros(16, 3, 13, 13))


def test_empty_batches_and_maps_have_gradients_of_zero():
    weights = [torch.rand(shape, requires_grad=True) for shape in ((8, 4), 8, (8, 1, 3, 3), 8, (4, 8), 4)]
    for size in ((0, 4, 5, 5), (1, 4, 0, 5), (1, 4, 5, 0)):
        x = torch.rand(size, requires_grad=True)
        made = kernels.conv_ffn(x, None, weights[:2], weights[2:4], weights[4:])[1]
        grads = torch.autograd.grad(made.sum(), (x, *weights))
        assert made.shape == size and not any(grad.any() for grad in grads)


_WIDE = {"pdim": 16, "dim": 24, "kernel_size": 7}  # as wide as the large kernel's tiles need it


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(5, 9), (33, 50)])
@pytest.mark.parametrize("options", [{}, _WIDE], ids=["narrow", "wide"])
def test_networks_give_the_same_by_kernels(name, size, options, tiny_network, served):
    tiny_network.pop("type")
    if name == "ESCReal":
        tiny_network["upscaling_factor"] = 4
    net = NETWORKS[name](**tiny_network | options).eval()
    randomise(net, 0.2)
    lq = torch.rand(2, 3, *size)
    with torch.inference_mode():
        expected = net(lq)
        assert not served
        made = fast.prepare(net, kernels=True)(lq)
    has_tiles = options and name != "ESCFP"
    assert set(served) == {"window_attention", "conv_ffn"} | ({"convolve_symmetric"} if has_tiles else set())
    assert torch.allclose(made, expected, rtol=1e-5, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ESC", {}),
        ("ESC", _WIDE),
        ("ESC", {**_WIDE, "use_ln": True}),
        ("ESC", {**_WIDE, "share_large_kernel": False}),
        ("ESC", {**_WIDE, "token_mixer": "attention"}),
        ("ESCFP", {}),
    ],
)
def test_training_by_kernels_has_the_same_gradients(name, options, tiny_network, served):
    tiny_network.pop("type")
    net = NETWORKS[name](**{**tiny_network, **options})
    randomise(net, 0.2)
    lq, gt = torch.rand(2, 3, 20, 20), torch.rand(2, 3, 40, 40)
    gradients = []
    by_kernels = copy.deepcopy(net)
    fast.train_by_kernels(by_kernels)
    for each in (by_kernels, net):
        (each(lq) - gt).abs().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in each.parameters()])
    expected_calls = {"window_attention", "conv_ffn"}
    if options and "token_mixer" not in options:
        expected_calls.add("convolve_symmetric")
    assert set(served) == expected_calls
    for made, expected in zip(*gradients, strict=True):
        assert (made - expected).norm() <= 1e-4 * expected.norm() + 1e-9


def test_second_derivatives_are_refused(served):
    layer = WindowAttention(16, 4, 2)
    x = torch.rand(1, 16, 4, 4, requires_grad=True)
    fast.attend_by_kernels(layer)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
    assert served


def test_number_of_threads_changes_nothing(build_network, tiny_network):
    net = build_network(tiny_network).eval()
    lq = torch.rand(2, 3, 50, 41)
    threads = torch.get_num_threads()
    made = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            with torch.inference_mode():
                made.append(fast.prepare(net, kernels=True)(lq))
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(*made, atol=1e-6)


def test_wrong_tensors_are_refused():
    qkv, table = torch.rand(1, 8, 8, 24), torch.rand(2, 49)
    with pytest.raises(ValueError, match="multiples of the window 3"):
        kernels.window_attention(qkv, table, 3)
    with pytest.raises(ValueError, match=r"expected contiguous float32 tensors on a CPU, got torch.float64"):
        kernels.window_attention(qkv, table.double(), 4)


def test_nan_is_not_lost(build_network, tiny_network, served):
    net = build_network(tiny_network).eval()
    lq = torch.rand(1, 3, 16, 16)
    lq[0, 0, 3, 3] = float("nan")
    with torch.inference_mode():
        assert fast.prepare(net, kernels=True)(lq).isnan().any()
    assert set(served) == {"window_attention", "conv_ffn"}


def test_other_precisions_and_recorders_go_without(served):
    layer, wide = WindowAttention(16, 4, 2).eval(), WindowAttention(512, 4, 1)
    x = torch.rand(1, 16, 8, 8)
    for each in (layer, wide):
        fast.attend_by_kernels(each)
    with torch.no_grad():
        layer.double()(x.double())
        layer.float()
        with torch.autocast("cpu", torch.float16):
            layer(x)
        torch.jit.trace(layer, x, check_trace=False)
        wide(torch.rand(1, 512, 4, 4))  # more channels a head than the kernel takes
        assert not served
        layer(x)
    assert served == ["window_attention"]


def test_kernels_are_the_choice_of_each_network(build_network, tiny_network, served):
    net = build_network(tiny_network).eval()
    lq = torch.rand(1, 3, 8, 8)
    by_kernels = copy.deepcopy(net)
    fast.attend_by_kernels(by_kernels)
    with torch.inference_mode():
        net(lq)
        fast.prepare(net)(lq)
        assert not served
        copy.deepcopy(by_kernels)(lq)
        pickle.loads(pickle.dumps(by_kernels))(lq)
    assert served == ["window_attention"] * 2


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    yield tmp_path / "esc_basicsr"
    build.load.cache_clear()


def test_library_is_compiled_once_and_kept(fresh_build, esc_log):
    kernels.load()
    made = list(fresh_build.glob("*.so"))
    assert len(made) == 1
    before = made[0].stat().st_mtime_ns
    build.load.cache_clear()
    kernels.load()
    assert made[0].stat().st_mtime_ns == before
    assert esc_log == ["Compiling the CPU kernels, once."]


def test_missing_or_failing_compiler_is_reported(fresh_build, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="'no-such-compiler' does not run"):
        fast.prepare(ESC(2, n_blocks=1), kernels=True)
    failing = tmp_path / "failing"
    failing.write_text('#!/bin/sh\ncase "$*" in *-dM*) exit 0;; esac\necho "out of luck" >&2\nexit 1\n')
    failing.chmod(failing.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(UserError, match="out of luck"):
        fast.prepare(ESC(2, n_blocks=1), kernels=True)
    assert not list(fresh_build.glob("*.so"))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(UserError, match=r"need a C\+\+ compiler"):
        fast.prepare(ESC(2, n_blocks=1), kernels=True)


def test_cache_that_cannot_be_written_is_reported(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    build.load.cache_clear()
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        kernels.load()
    build.load.cache_clear()


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler that takes a while and makes a library of 20 kB; the list of its runs, a line each."""
    runs, library, command = tmp_path / "runs", tmp_path / "library", tmp_path / "compiler"
    runs.touch()
    library.write_bytes(b"\x7fELF" + os.urandom(20_000))
    command.write_text(
        '#!/bin/sh\ncase "$*" in *-dM*) echo "#define $PROCESSOR"; exit;; esac\n'
        f'for out; do :; done\necho run >> {runs}\nsleep 0.2\ncp {library} "$out"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("CXX", str(command))
    monkeypatch.setenv("PROCESSOR", "one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return runs


def _zero_a_page(content):
    return content[:8192] + bytes(4096) + content[12288:]


@pytest.mark.parametrize(
    "damage", [lambda content: content[:9000], _zero_a_page, lambda _: b"", lambda _: b"\x7fELF another"]
)
def test_damaged_library_is_compiled_anew(compiler, damage):
    made = build._compiled()
    content = made.read_bytes()
    assert build._compiled() == made and len(compiler.read_text().split()) == 1
    made.write_bytes(damage(content))
    assert build._compiled().read_bytes() == content
    assert len(compiler.read_text().split()) == 2


def test_another_processor_has_a_library_of_its_own(compiler, monkeypatch):
    made = build._compiled()
    monkeypatch.setenv("PROCESSOR", "other")
    assert build._compiled() != made
    monkeypatch.setenv("PROCESSOR", "one")
    assert build._compiled() == made
    assert len(compiler.read_text().split()) == 2


def test_several_processes_compile_once(compiler):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        made = pool.map(_compile, range(4), chunksize=1)
    assert len(set(made)) == 1 and len(compiler.read_text().split()) == 1


def _compile(_):
    made = build._compiled()
    time.sleep(0.1)  # so that each process has one to do
    return made


def test_library_that_others_could_have_written_is_not_run(compiler, tmp_path):
    made = build._compiled()
    made.chmod(0o666)
    build._compiled()
    assert len(compiler.read_text().split()) == 2 and stat.S_IMODE(made.stat().st_mode) == 0o600
    elsewhere = made.rename(tmp_path / "elsewhere.so")
    made.symlink_to(elsewhere)
    assert not build._compiled().is_symlink()
    assert len(compiler.read_text().split()) == 3


def test_cache_that_others_may_write_to_is_closed_or_refused(compiler, monkeypatch, tmp_path):
    folder = build._compiled().parent
    folder.chmod(0o777)
    build._compiled()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.parent.chmod(0o777)
    with pytest.raises(UserError, match=r"others .* may write to .*cache: set XDG_CACHE_HOME"):
        build._compiled()
    folder.parent.chmod(0o1777)
    build._compiled()
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(UserError, match=r"may write to .*esc_basicsr: set XDG_CACHE_HOME"):
        build._compiled()
    folder.rename(tmp_path / "another's")
    folder.symlink_to(tmp_path / "another's")
    with pytest.raises(UserError, match=r"may write to .*another's: set XDG_CACHE_HOME"):
        build._compiled()


def test_relative_cache_is_not_used(compiler, monkeypatch, tmp_path):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build._compiled().is_relative_to(tmp_path / "home" / ".cache")
    assert not list((tmp_path / "work").iterdir())
