"""Stored PNGs are PNGs to everyone, and give up any window unchanged."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from esc_basicsr.data.image_codec import encode_png
from esc_basicsr.data.stored_png import crop_stored_png, encode_stored_png, has_stored_form


@pytest.fixture
def image(photographs):
    return np.ascontiguousarray(photographs["astronaut"][:, :, ::-1])  # 113 x 125


def _windows(height, width):
    """Windows at every corner, of one pixel, one row, one column, and the whole."""
    yield from [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1)]
    yield from [(height - 1, 0, 1, width), (0, width - 1, height, 1)]
    for top in (0, 3, height - 48):
        for left in (0, 5, width - 48):
            yield top, left, 48, 48


def test_every_reader_reads_it(image):
    data = encode_stored_png(image)
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED), image)
    Image.open(io.BytesIO(data)).verify()  # the checksums of all chunks
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), image[:, :, ::-1])


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (2, 21844), (3, 4000)])
def test_every_size_is_stored(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    data = encode_png(image, 0)
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), image)
    np.testing.assert_array_equal(crop_stored_png(data, size, 0, 0, *size), image)
    assert len(data) == size[0] * (3 * size[1] + 6) + 63


def test_row_too_long_for_a_block_is_written_as_an_ordinary_png():
    image = np.random.default_rng(0).integers(0, 256, (2, 21845, 3), dtype=np.uint8)
    assert not has_stored_form(2, 21845)
    data = encode_png(image, 0)
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), image)
    assert crop_stored_png(data, (2, 21845), 0, 0, 1, 1) is None


def test_windows_are_those_of_the_image(image):
    size = image.shape[:2]
    data = memoryview(encode_stored_png(image))
    for top, left, height, width in _windows(*size):
        crop = crop_stored_png(data, size, top, left, height, width)
        np.testing.assert_array_equal(crop, image[top : top + height, left : left + width])
        crop[:] = 0  # a copy, that may be written
    np.testing.assert_array_equal(crop_stored_png(data, size, 0, 0, *size), image)


def test_other_images_are_not_taken_for_stored_ones(image):
    size = image.shape[:2]
    gray = cv2.imencode(".png", image[..., 0])[1].tobytes()
    jpeg = cv2.imencode(".jpg", image)[1].tobytes()
    cv2_stored = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 0])[1].tobytes()
    for data in (b"", b"no image", gray, jpeg, cv2_stored, *(encode_png(image, level) for level in (1, 9))):
        assert crop_stored_png(data, size, 0, 0, 8, 8) is None


def test_another_size_and_a_cut_file_are_not_taken_for_stored_ones(image):
    data = encode_stored_png(image)
    height, width = image.shape[:2]
    for size in ((height, width + 1), (height - 1, width), (width, height)):
        assert crop_stored_png(data, size, 0, 0, 8, 8) is None
    assert crop_stored_png(data[:-1], (height, width), 0, 0, 8, 8) is None


@pytest.mark.parametrize("byte", range(6))
def test_row_that_is_not_stored_plainly_is_noticed_where_it_is_read(image, byte):
    size = image.shape[:2]
    data = bytearray(encode_stored_png(image))
    data[43 + 20 * (3 * size[1] + 6) + byte] ^= 1  # byte 5 is the filter
    assert crop_stored_png(bytes(data), size, 10, 0, 30, 9) is None
    np.testing.assert_array_equal(crop_stored_png(bytes(data), size, 21, 0, 30, 9), image[21:51, :9])
