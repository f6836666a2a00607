import numpy as np
import pytest
import torch
from PIL import Image

from esc_basicsr.archs.resize import resize_matrix
from esc_basicsr.data.degradation import make_pair, reduce_uint8
from esc_basicsr.data.sample_images import load_sample_image

SCALES = [2, 3, 4]


def _photograph(name, size=240):
    return np.ascontiguousarray(load_sample_image(name)[30 : 30 + size, 50 : 50 + size])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "brick", "hubble_deep_field"])
def test_reduction_equals_basicsr_imresize(name, scale):
    from basicsr.utils.matlab_functions import imresize

    image = _photograph(name)
    expected = (imresize(image.astype(np.float32) / 255, 1 / scale) * 255).clip(0, 255).round()
    difference = np.abs(reduce_uint8(image, scale) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_reduction_equals_pillow_in_the_interior(name, scale):
    # In Pillow's floating-point mode: in its 8-bit one it rounds weights and the intermediate image as well.
    # Only at the border, which Pillow cuts off and MATLAB mirrors, do the two differ.
    image = _photograph(name)
    side = 240 // scale
    planes = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(plane.resize((side, side), Image.Resampling.BICUBIC)) for plane in planes]
    expected = np.floor(np.stack(resized, axis=2) + 0.5).clip(0, 255)
    difference = np.abs(reduce_uint8(image, scale) - expected)[2:-2, 2:-2]
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("scale", [1, *SCALES, 5])
def test_float32_equals_float64_but_for_a_level_in_a_thousand_pixels(scale):
    rng = np.random.default_rng(scale)
    for _ in range(5):
        height, width = (int(side) * scale for side in rng.integers(1, 60, 2))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        rows = resize_matrix(height, height // scale, 1 / scale).numpy()
        columns = resize_matrix(width, width // scale, 1 / scale).numpy()
        exact = np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float64), columns)
        expected = np.floor(exact + 0.5).clip(0, 255)
        difference = np.abs(reduce_uint8(image, scale) - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("scale", SCALES)
def test_reduction_commutes_with_flips_and_transposition(scale):
    image = _photograph("coffee", 60)
    reduced = reduce_uint8(image, scale).astype(int)
    for move in (np.fliplr, np.flipud, lambda x: x.transpose(1, 0, 2)):
        moved = reduce_uint8(move(image), scale)
        assert np.abs(moved - move(reduced)).max() <= 1
        assert (moved != move(reduced)).mean() < 1e-2


def test_result_is_contiguous_uint8_and_the_input_is_left_alone():
    image = _photograph("astronaut", 48)
    before = image.copy()
    reduced = reduce_uint8(image, 4)
    assert reduced.dtype == np.uint8 and reduced.shape == (12, 12, 3) and reduced.flags.c_contiguous
    np.testing.assert_array_equal(image, before)


def test_overshoot_is_clipped_not_wrapped():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 15:] = 255
    reduced = reduce_uint8(image, 2)
    assert reduced[:, :6].max() < 20 and reduced[:, 9:].min() > 235
    assert reduced.min() == 0 and reduced.max() == 255


@pytest.mark.parametrize("size", [(10, 12), (12, 10), (0, 12), (2, 12)])
def test_sides_that_are_no_multiple_of_the_scale_are_refused(size):
    with pytest.raises(ValueError, match=rf"multiples of 4, got {size[0]}x{size[1]}"):
        reduce_uint8(np.zeros((*size, 3), np.uint8), 4)


@pytest.mark.parametrize("scale", SCALES)
def test_pair_of_a_batch_is_that_of_each_image(scale):
    images = [_photograph(name, 48) for name in ("astronaut", "chelsea", "coffee")]
    hr = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    for dtype in (torch.float32, torch.float64):
        pair = make_pair(hr, scale, dtype)
        assert torch.equal(pair["gt"], hr.float() / 255) and pair["lq"].dtype == torch.float32
        expected = np.stack([reduce_uint8(image, scale) for image in images]).transpose(0, 3, 1, 2)
        difference = np.abs((pair["lq"] * 255).round().numpy() - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


def test_double_precision_is_untouched_by_autocast():
    hr = torch.from_numpy(_photograph("coffee", 96)).permute(2, 0, 1)[None]
    expected = make_pair(hr, 4, torch.float64)["lq"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(make_pair(hr, 4, torch.float64)["lq"], expected)


def test_pair_of_sides_that_are_no_multiple_is_refused():
    with pytest.raises(ValueError, match="multiples of 4, got 12x10"):
        make_pair(torch.zeros(1, 3, 12, 10, dtype=torch.uint8), 4)


def test_reduction_is_the_same_with_one_thread_and_two():
    image = _photograph("astronaut", 240)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = reduce_uint8(image, 3)
        torch.set_num_threads(2)
        two = reduce_uint8(image, 3)
    finally:
        torch.set_num_threads(threads)
    difference = np.abs(one.astype(int) - two)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
