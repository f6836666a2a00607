"""The loss is L1 on the luma that BasicSR's metrics use, and, on demand, its chroma term."""

import numpy as np
import pytest
import torch

from esc_basicsr.training.y_channel_loss import YChannelL1Loss


@pytest.fixture
def images():
    return torch.rand(2, 3, 6, 5), torch.rand(2, 3, 6, 5)


def basicsr_ycbcr(image):
    """(B, 3, H, W) RGB in [0, 1] to YCbCr in [0, 1], by BasicSR's own conversion."""
    from basicsr.utils import rgb2ycbcr

    planes = [rgb2ycbcr(one.permute(1, 2, 0).numpy()) for one in image]
    return np.stack(planes).transpose(0, 3, 1, 2)


def test_luma_loss_is_l1_on_the_luma_of_basicsr_metrics(images):
    difference = np.abs(basicsr_ycbcr(images[0]) - basicsr_ycbcr(images[1]))
    loss = YChannelL1Loss()(*images)
    assert loss.item() == pytest.approx(difference[:, 0].mean(), rel=1e-4)


def test_chroma_term_is_the_weighted_mean_of_both_chroma_errors(images):
    difference = np.abs(basicsr_ycbcr(images[0]) - basicsr_ycbcr(images[1]))
    expected = difference[:, 0].mean() + 0.3 * difference[:, 1:].mean()
    assert YChannelL1Loss(chroma_weight=0.3)(*images).item() == pytest.approx(expected, rel=1e-4)


def test_reductions_and_loss_weight(images):
    none = YChannelL1Loss(reduction="none")(*images)
    assert none.shape == (2, 1, 6, 5)
    assert torch.allclose(YChannelL1Loss(reduction="sum")(*images), none.sum())
    assert torch.allclose(YChannelL1Loss(reduction="mean")(*images), none.mean())
    assert torch.allclose(YChannelL1Loss(loss_weight=2.5)(*images), 2.5 * none.mean())


def test_luma_alone_is_the_default_and_blind_to_a_tint_and_the_chroma_term_is_not():
    gray = torch.full((1, 3, 4, 4), 0.5)
    # a change of blue that green takes back in luma
    tinted = gray + torch.tensor([0.0, -0.02, 0.02 * 128.553 / 24.966]).view(1, 3, 1, 1)
    assert YChannelL1Loss()(tinted, gray).item() == pytest.approx(0, abs=1e-7)
    assert YChannelL1Loss(chroma_weight=0.2)(tinted, gray).item() > 1e-3


def test_gradients_are_right():
    pred = torch.rand(1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    target = torch.rand(1, 3, 3, 3, dtype=torch.float64)
    loss = YChannelL1Loss(chroma_weight=0.2)
    # the loss computes in float32: a coarse step
    assert torch.autograd.gradcheck(lambda x: loss(x, target).double(), pred, eps=1e-3, atol=1e-3)


def test_half_precision_output_is_compared_in_float32(images):
    pred, target = images
    assert YChannelL1Loss()(pred.bfloat16(), target).dtype == torch.float32


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reduction": "avg"}, "reduction must be one of none, mean, sum, got 'avg'"),
        ({"chroma_weight": -1}, "chroma_weight must not be negative, got -1"),
    ],
)
def test_impossible_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        YChannelL1Loss(**options)


@pytest.mark.parametrize(
    "shapes", [[(1, 3, 4, 4), (1, 3, 4, 5)], [(1, 1, 4, 4), (1, 1, 4, 4)], [(3, 4, 4), (3, 4, 4)]]
)
def test_images_that_are_not_rgb_batches_of_one_shape_are_refused(shapes):
    with pytest.raises(ValueError, match="expected two RGB batches"):
        YChannelL1Loss()(torch.rand(shapes[0]), torch.rand(shapes[1]))


def test_basicsr_builds_it_from_an_option_file():
    from basicsr.losses import build_loss

    loss = build_loss({"type": "YChannelL1Loss", "loss_weight": 1.0, "reduction": "mean"})
    assert isinstance(loss, YChannelL1Loss)
