"""Pictures come by name or file; LR is Pillow's."""

import numpy as np
import pytest
import torch
from PIL import Image

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.photos import load_photograph
from esc_basicsr.lab.analysis.images import load_image, reduce_by_pillow, to_tensor


def test_an_image_is_a_file_or_a_photograph(tmp_path):
    part = load_photograph("coffee")[:20, :30]
    file = tmp_path / "part.png"
    Image.fromarray(part).save(file)
    assert np.array_equal(load_image(str(file)), part)
    assert np.array_equal(load_image("coffee"), load_photograph("coffee"))
    with pytest.raises(UserError, match="cofee: there is no such file; expected a file, or one of"):
        load_image("cofee")


def test_reduction_keeps_a_constant_image_and_its_tensor_is_in_range():
    lr = reduce_by_pillow(np.full((12, 24, 3), 255, np.uint8), 3)
    assert lr.shape == (4, 8, 3) and (lr == 255).all()
    tensor = to_tensor(lr, torch.device("cpu"))
    assert tensor.shape == (1, 3, 4, 8) and (tensor == 1).all()
