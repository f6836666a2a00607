"""The Triton kernels give what the layers of `archs` give: on a GPU, or on a CPU by Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from esc_basicsr.archs.attention import BACKENDS
from esc_basicsr.fast import triton_kernels

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
@pytest.mark.parametrize(("w", "heads", "d"), [(4, 1, 16), (3, 2, 5), (5, 2, 16), (6, 1, 24)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 4e-3)])
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


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 4), (9, 6)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 4e-3)])
def test_middle_of_a_conv_ffn_and_its_gradients(size, dtype, tolerance):
    x = 2 * torch.randn(2, 10, *size, device=DEVICE, dtype=dtype)
    weight, bias = torch.randn(10, 1, 3, 3, device=DEVICE), torch.randn(10, device=DEVICE)
    assert_alike(triton_kernels.conv_ffn_middle, middle, (x, weight, bias), tolerance)
