"""The large kernel's convolution by tiles against torch's."""

import pytest
import torch
import torch.nn.functional as F

from esc_basicsr.fast import frequency_tiles as symmetric_conv
from esc_basicsr.fast.frequency_tiles import SymmetricKernel

SHAPES = [(1, 5, 48, 48), (2, 3, 50, 61), (1, 4, 200, 13), (1, 16, 97, 140), (1, 2, 13, 260)]


@pytest.fixture
def tiles(monkeypatch):
    """How often the convolution went by tiles."""
    calls = []
    by_tiles = symmetric_conv._convolve_tiles

    def counted(*args):
        calls.append(args)
        return by_tiles(*args)

    monkeypatch.setattr(symmetric_conv, "_convolve_tiles", counted)
    return calls


@pytest.mark.parametrize("size", [7, 13, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_equal_the_direct_form(shape, size, tiles):
    kernel = SymmetricKernel(torch.randn(6, shape[1], size, size, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64)
    expected = F.conv2d(x, kernel.weight, padding=size // 2)
    with torch.inference_mode():
        assert torch.allclose(kernel.convolve(x), expected, atol=1e-10)
    assert tiles


@pytest.mark.parametrize("at_once", [1, 7])
def test_bands_of_tiles_join_without_a_seam(at_once, tiles, monkeypatch):
    monkeypatch.setattr(symmetric_conv, "_TILES_AT_ONCE", at_once)
    kernel = SymmetricKernel(torch.randn(4, 4, 13, 13))
    x = torch.randn(2, 4, 150, 170).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        convolved = kernel.convolve(x)
    assert torch.allclose(convolved, F.conv2d(x, kernel.weight, padding=6), atol=2e-4)
    assert tiles


def test_small_images_small_kernels_and_low_precision_take_the_direct_form(tiles):
    kernel = SymmetricKernel(torch.randn(4, 4, 13, 13))
    with torch.inference_mode():
        kernel.convolve(torch.randn(1, 4, 16, 16))
        SymmetricKernel(torch.randn(4, 4, 5, 5)).convolve(torch.randn(1, 4, 64, 64))
        SymmetricKernel(kernel.weight.bfloat16()).convolve(torch.randn(1, 4, 64, 64).bfloat16())
    assert not tiles
