import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from esc_basicsr.archs import resize as bicubic
from esc_basicsr.archs.bicubic_arch import Bicubic
from esc_basicsr.archs.resize import imresize, resize_matrix


def basicsr_imresize(image, scale, antialiasing=True):
    # Imported late: importing esc_basicsr first mends what keeps BasicSR from being imported.
    from basicsr.utils.matlab_functions import imresize as reference

    return reference(image, scale, antialiasing)


SCALES = [2, 3, 4, Fraction(1, 2), Fraction(1, 3), Fraction(1, 4)]


@pytest.fixture(autouse=True)
def _fresh_cache():
    bicubic._matrix.cache_clear()


def test_halving_weights_are_the_kernel_stretched_by_two():
    # Keys' kernel with a = -0.5 at distances 0.25, 0.75, 1.25, 1.75, halved (they sum to 1 already).
    by_hand = torch.tensor([0.8671875, 0.2265625, -0.0703125, -0.0234375], dtype=torch.float64) / 2
    row = resize_matrix(20, 10, 0.5)[5]  # centred between input pixels 10 and 11
    torch.testing.assert_close(row[11:15], by_hand, rtol=0, atol=1e-15)
    torch.testing.assert_close(row[7:11], by_hand.flip(0), rtol=0, atol=1e-15)
    assert row[:7].abs().sum() == 0 and row[15:].abs().sum() == 0


@pytest.mark.parametrize("scale", [*SCALES, 1.7, 0.3])
@pytest.mark.parametrize("in_size", [1, 2, 5, 36])
@pytest.mark.parametrize("antialias", [True, False])
def test_rows_sum_to_one_and_mirror_each_other(scale, in_size, antialias):
    out_size = math.ceil(in_size * scale)
    matrix = resize_matrix(in_size, out_size, scale, antialias)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(out_size, dtype=torch.float64))
    if out_size == in_size * scale:
        torch.testing.assert_close(matrix, matrix.flip(0, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [(48, 60), (36, 24)])
def test_imresize_equals_basicsr_imresize(scale, size):
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    expected = basicsr_imresize(image, float(scale))
    torch.testing.assert_close(imresize(image, scale), expected, rtol=0, atol=1e-5)


def test_matrix_without_antialias_equals_basicsr_imresize_without_it():
    image = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    matrix = resize_matrix(24, 8, Fraction(1, 3), antialias=False).float()
    expected = basicsr_imresize(image, 1 / 3, antialiasing=False)
    torch.testing.assert_close(matrix @ image @ matrix.T, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2, 4, Fraction(1, 2)])
def test_line_shorter_than_the_kernel_is_mirrored_again_and_again(scale):
    # A line of 3 pixels equals the middle of the line that its mirror images make.
    line = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    wide = torch.cat([line, line.flip(0)] * 7)[None, :]  # copies 6 and 7 are in the middle
    out_size = math.ceil(3 * scale)
    start = int(18 * scale)
    square = resize_matrix(3, out_size, scale)
    expected = wide @ resize_matrix(42, int(42 * scale), scale).T
    torch.testing.assert_close(square @ line, expected[0, start : start + out_size], rtol=0, atol=1e-12)


def test_scale_one_changes_nothing():
    image = torch.rand(2, 3, 7, 9)
    torch.testing.assert_close(imresize(image, 1), image, rtol=0, atol=0)


def test_upscaling_then_reducing_keeps_a_smooth_image():
    x = torch.linspace(0, 1, 40)[None, :] * torch.linspace(0, 1, 40)[:, None]
    restored = imresize(imresize(x, 3), Fraction(1, 3))
    torch.testing.assert_close(restored[5:-5, 5:-5], x[5:-5, 5:-5], rtol=0, atol=1e-5)


def test_leading_dimensions_are_kept_and_independent():
    image = torch.rand(2, 4, 3, 12, 8)
    out = imresize(image, Fraction(1, 4))
    assert out.shape == (2, 4, 3, 3, 2)
    torch.testing.assert_close(out[1, 2], imresize(image[1, 2], Fraction(1, 4)))


@pytest.mark.parametrize(
    ("in_size", "scale", "out_size"), [(10, 1.1, 11), (10, 0.25, 3), (9, 1 / 3, 3), (1, 0.25, 1)]
)
def test_output_size_is_the_ceiling_of_size_times_scale(in_size, scale, out_size):
    assert imresize(torch.rand(in_size, in_size), scale).shape == (out_size, out_size)


def test_gradient_is_right():
    image = torch.rand(1, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: imresize(x, Fraction(1, 2)), (image,))


def test_matrix_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        imresize(torch.rand(8, 8), 2)
    image = torch.rand(8, 8, requires_grad=True)
    imresize(image, 2).sum().backward()
    torch.testing.assert_close(image.grad.sum(), torch.tensor(256.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    image = torch.rand(3, 16, 16).to(dtype)
    torch.testing.assert_close(imresize(image, 2), imresize(image.double(), 2).to(dtype), rtol=0, atol=1e-2)


def test_integer_image_is_refused():
    with pytest.raises(TypeError, match=r"floating point image, got torch\.uint8"):
        imresize(torch.zeros(4, 4, dtype=torch.uint8), 2)


@pytest.mark.parametrize("call", [lambda: resize_matrix(0, 4, 2), lambda: imresize(torch.rand(4, 4), -1)])
def test_impossible_resizing_is_refused(call):
    with pytest.raises(ValueError, match="sizes of at least 1 and a scale above 0"):
        call()


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_bicubic_network_equals_basicsr_imresize(scale):
    network = Bicubic(upscaling_factor=scale)
    assert not list(network.parameters()) and not network.state_dict()
    image = torch.rand(2, 3, 10, 12, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([basicsr_imresize(one, scale) for one in image])
    torch.testing.assert_close(network(image), expected, rtol=0, atol=1e-5)


def test_bicubic_network_does_not_clamp():
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1
    out = Bicubic(2)(step)
    assert out.min() < -0.02 and out.max() > 1.02


@pytest.mark.parametrize("factor", [0, -2, 2.0, "2"])
def test_bicubic_network_refuses_a_factor_that_is_no_positive_integer(factor):
    with pytest.raises(ValueError, match="upscaling_factor must be an integer >= 1"):
        Bicubic(factor)


def test_matrix_numbers_agree_with_numpy_arithmetic():
    # An independent evaluation, one output pixel at a time, of the definition.
    def kernel(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    expected = np.zeros((4, 12))
    for i in range(4):
        centre = (i + 0.5) * 3 - 0.5
        for j in range(-12, 24):
            mirrored = -1 - j if j < 0 else (23 - j if j > 11 else j)
            expected[i, mirrored] += kernel((centre - j) / 3) / 3
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(resize_matrix(12, 4, Fraction(1, 3)).numpy(), expected, atol=1e-15)
