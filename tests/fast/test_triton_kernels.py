"""The Triton kernels give what the layers of `archs` give: on a GPU, or on a CPU by Triton's interpreter."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from esc_basicsr import fast
from esc_basicsr.archs.attention import BACKENDS, WindowAttention
from esc_basicsr.fast import gpu, triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in small maps."""
    monkeypatch.setattr(triton_kernels, "BLOCK", 16)
    monkeypatch.setattr(triton_kernels, "PIXELS", 16)
    monkeypatch.setattr(triton_kernels, "CHANNELS", 8)


def assert_alike(ours, reference, inputs, tolerance):
    """Compare outputs, and gradients of all inputs."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    given = [x.detach().requires_grad_() for x in inputs]
    out, expected = ours(*given), reference(*exact)
    assert out.dtype == inputs[0].dtype
    upstream = torch.randn_like(expected)
    pairs = [(out, expected)]
    grads = torch.autograd.grad(out, given, upstream.to(out.dtype))
    pairs += zip(grads, torch.autograd.grad(expected, exact, upstream), strict=True)
    for number, (found, right) in enumerate(pairs):
        assert found.shape == right.shape
        assert (found - right).abs().max() <= tolerance * right.abs().max(), number


# a window of one tile, of a part of one, of several with a rest; heads as wide as a tile, narrower, wider
@pytest.mark.parametrize(
    ("w", "heads", "d", "dtype", "tolerance"),
    [
        (4, 1, 16, torch.float32, 2e-6),
        (3, 2, 5, torch.float32, 2e-6),
        (5, 1, 24, torch.float32, 2e-6),
        (5, 2, 16, torch.float16, 4e-3),
    ],
)
def test_window_attention_and_its_gradients(w, heads, d, dtype, tolerance):
    qkv = torch.randn(2, 3 * heads * d, 2 * w, w, device=DEVICE, dtype=dtype)
    table = torch.randn(heads, (2 * w - 1) ** 2, device=DEVICE)

    def attend(qkv, table):
        return triton_kernels.window_attention(qkv, table, w)

    assert_alike(attend, lambda qkv, table: BACKENDS["Naive"](qkv, table, w), (qkv, table), tolerance)


def test_scores_that_overflow_are_no_harm():
    qkv = torch.randn(1, 48, 4, 4, device=DEVICE) * 60
    table = torch.randn(1, 49, device=DEVICE)
    out, expected = triton_kernels.window_attention(qkv, table, 4), BACKENDS["Naive"](qkv, table, 4)
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)


def middle(x, weight, bias):
    g = F.gelu(x)
    return g + F.gelu(F.conv2d(g, weight, bias, padding=1, groups=len(weight)))


@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),
    [((1, 1), torch.float32, 2e-6), ((5, 4), torch.float32, 2e-6), ((3, 7), torch.float16, 4e-3)],
)
def test_middle_of_a_conv_ffn_and_its_gradients(size, dtype, tolerance):
    x = 2 * torch.randn(2, 10, *size, device=DEVICE, dtype=dtype)
    weight, bias = torch.randn(10, 1, 3, 3, device=DEVICE), torch.randn(10, device=DEVICE)
    assert_alike(triton_kernels.conv_ffn_middle, middle, (x, weight, bias), tolerance)


@pytest.fixture
def served(monkeypatch):
    """Let the kernels serve here, whatever the device, and count what they compute."""
    calls = []

    def counted(name):
        function = getattr(triton_kernels, name)

        def call(x, *others):
            calls.append(name)
            return function(x, *others)

        return call

    for name in ("window_attention", "conv_ffn_middle"):
        monkeypatch.setattr(triton_kernels, name, counted(name))
    monkeypatch.setattr(gpu, "_serves", lambda x: True)
    monkeypatch.setattr(gpu, "_failures", [])
    monkeypatch.setattr(gpu, "_tried", set())
    for name in ("serves", "serves_float32"):
        monkeypatch.setattr(f"esc_basicsr.fast.kernels.{name}", lambda x: False)
    monkeypatch.setattr("esc_basicsr.fast.kernels.load", lambda: None)
    return calls


def test_a_network_is_served_in_inference_and_in_training(served, tiny_network, build_network):
    net = build_network(tiny_network).to(DEVICE)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    lq = torch.rand(1, 3, 5, 6, device=DEVICE)
    expected = net(lq)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    with torch.inference_mode():
        sr = fast.prepare(net, kernels=True)(lq)
    torch.testing.assert_close(sr, expected, rtol=1e-4, atol=1e-4)
    assert "conv_ffn_middle" in served
    served.clear()
    trained = copy.deepcopy(net)
    fast.attend_by_kernels(trained)
    grads = torch.autograd.grad(trained(lq).square().sum(), list(trained.parameters()))
    assert "window_attention" in served
    for ours, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-3 * right.abs().max().item())


@pytest.mark.parametrize("fails_at", ["import", "backward"])
def test_what_fails_is_said_once_and_left_to_pytorch(served, monkeypatch, esc_log, fails_at):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv, table):
            return qkv[:, :16].clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("out of resource: shared memory")

    def failing(qkv, table, w):
        if fails_at == "import":
            raise ModuleNotFoundError("No module named 'triton'")
        return Failing.apply(qkv, table)

    monkeypatch.setattr(triton_kernels, "window_attention", failing)
    qkv = torch.randn(1, 48, 4, 4, requires_grad=True)
    layer = WindowAttention(16, 4, 1)
    fast.attend_by_kernels(layer)
    for _ in range(2):
        expected = BACKENDS["Naive"](qkv, layer.relative_position_bias, 4)
        torch.testing.assert_close(layer.attend(qkv), expected)
    assert sum("The Triton kernels fail" in line for line in esc_log) == 1
