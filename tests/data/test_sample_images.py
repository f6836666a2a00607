import importlib.util

import numpy as np
import pytest
from skimage import data

from esc_basicsr.common.errors import UserError
from esc_basicsr.data import sample_images
from esc_basicsr.data.sample_images import load_sample_image, sample_image_names

GRAY = {"brick", "camera", "grass", "gravel"}


@pytest.mark.parametrize("name", sample_image_names())
def test_photograph_is_there_in_three_channels(name):
    image = load_sample_image(name)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert min(image.shape[:2]) >= 300 and max(image.shape[:2]) <= 1411
    assert image.std() > 10
    assert (image[..., 0] == image[..., 2]).all() == (name in GRAY)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "camera"])
def test_photograph_equals_the_one_scikit_image_loads(name):
    expected = getattr(data, name)()
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)
    np.testing.assert_array_equal(load_sample_image(name), expected)


def test_unknown_photograph_is_refused_with_the_known_names():
    with pytest.raises(UserError, match=r"'lena'; there are: astronaut, brick"):
        load_sample_image("lena")


def test_missing_scikit_image_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-image"):
        load_sample_image("astronaut")


def test_photograph_lacking_in_the_wheel_is_told(monkeypatch):
    monkeypatch.setitem(sample_images._FILES, "astronaut", "no_such_file.png")
    with pytest.raises(UserError, match=r"lacks .*no_such_file\.png"):
        load_sample_image("astronaut")
