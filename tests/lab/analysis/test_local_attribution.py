"""Attribution maps are what their definition says: known values, exact zeros, symmetries, scipy's density."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import gaussian_kde

from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.lab.analysis.local_attribution import (
    Attribution,
    Window,
    attribute,
    attribution_density,
    blur,
    detail,
    diffusion_index,
    gaussian_kernel,
    gini,
    relative_map,
)


def slope(number: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(number, image)[0]


def attribution_of(net, lq, window, **options) -> Attribution:
    return attribute(lambda image: detail(net(image), window), slope, lq, **options)


def convolutions(scale: int = 2, channels: int = 3) -> nn.Sequential:
    """Three 3×3 convolutions, so an LR radius of 3, with ReLUs between them."""
    layers = [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    last = nn.Conv2d(4, channels * scale**2, 3, padding=1)
    return nn.Sequential(*layers, last, nn.PixelShuffle(scale)).double()


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    """A part of a photograph, (1, 3, 32, 32), float64."""
    pixels = load_sample_image("coffee")[100:228:4, 100:228:4]
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None] / torch.tensor(255.0).double()


@pytest.fixture
def impulse() -> torch.Tensor:
    image = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    image[..., 16, 16] = 1
    return image


IMPULSE_WINDOW = Window(8, 8, 16)


def test_kernel_has_the_known_values():
    kernel = gaussian_kernel(1.2)
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-15)
    expected = {(4, 4): 0.1105479501, (4, 5): 0.0781189706, (0, 0): 1.6524825e-6}
    assert {place: float(kernel[place]) for place in expected} == pytest.approx(expected, rel=1e-8)
    narrow = gaussian_kernel(0.6)
    assert (float(narrow[4, 4]), float(narrow[4, 3])) == pytest.approx((0.44064, 0.10988), abs=5e-6)


@pytest.mark.parametrize("sigma", [0, 0.05, 0.12])
def test_small_sigmas_leave_the_image(sigma, photograph):
    assert (blur(photograph, sigma) - photograph).abs().max() < 1e-14


def test_border_is_reflected_without_repeating_the_edge():
    line = torch.arange(6.0, dtype=torch.float64).expand(1, 1, 6, 6)
    mirrored = torch.tensor([4, 3, 2, 1, 0, 1, 2, 3, 4.0]).double()
    assert float(blur(line, 1.2)[0, 0, 0, 0]) == pytest.approx(float(gaussian_kernel(1.2).sum(0) @ mirrored))


@pytest.mark.parametrize("integration", ["right", "midpoint"])
@pytest.mark.parametrize("fold", [1, 7])
def test_attributions_of_a_linear_functional_are_complete(fold, integration, photograph):
    weight = torch.randn(photograph.shape, dtype=torch.float64)
    found = attribute(lambda image: (weight * image).sum(), slope, photograph, fold, integration)
    gained = (weight * (photograph - blur(photograph, 1.2))).sum()
    assert float(found.values.sum()) == pytest.approx(float(gained), rel=1e-12)


def test_completeness_of_detail_grows_with_the_steps_and_midpoints_are_nearer(photograph):
    net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2)).double()
    window = Window(24, 24, 16)
    ends = [detail(net(image), window) for image in (blur(photograph, 1.2), photograph)]
    gained = (ends[1] - ends[0]).item()

    def error(fold: int, integration: str = "right") -> float:
        found = attribution_of(net, photograph, window, fold=fold, integration=integration)
        return abs(float(found.values.sum()) / gained - 1)

    errors = [error(fold) for fold in (25, 50, 100)]
    assert 0.01 < errors[1] < 0.1
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)
    assert error(50, "midpoint") < 3e-4


def test_an_impulse_gives_the_known_numbers(impulse):
    net = nn.Identity()
    assert float(detail(impulse, IMPULSE_WINDOW)) == pytest.approx(2 + math.sqrt(2), abs=1e-10)
    assert float(detail(blur(impulse, 1.2), IMPULSE_WINDOW)) == pytest.approx(1.0357878709, abs=1e-7)
    found = attribution_of(net, impulse, IMPULSE_WINDOW)
    assert float(found.values.sum()) == pytest.approx(2.3859909372, abs=1e-10)
    finer = attribution_of(net, impulse, IMPULSE_WINDOW, fold=200)
    assert float(finer.values.sum()) == pytest.approx(2.3803501950, abs=1e-10)
    relative = relative_map(found)
    assert diffusion_index(relative) == pytest.approx(0.27295461, abs=1e-8)
    assert 100 * (1 - gini(relative)) == pytest.approx(0.26442854, abs=1e-8)


def test_a_constant_image_has_no_attribution_and_no_nan():
    image = torch.full((1, 3, 32, 32), 0.3, dtype=torch.float64)
    found = attribution_of(nn.Identity(), image, Window(8, 8, 16), fold=3)
    assert not found.values.any()
    with pytest.raises(ValueError, match="zero but for rounding"):
        relative_map(found)


def test_rounding_is_no_map():
    image = torch.full((1, 3, 32, 32), 0.3, dtype=torch.float64)
    found = attribute(lambda lq: (lq * 1e3).sum(), slope, image, 5)
    assert found.values.any()
    with pytest.raises(ValueError, match="zero but for rounding"):
        relative_map(found)


def test_a_network_that_gives_nan_has_no_map(photograph):
    found = attribute(lambda lq: (lq * math.nan).sum(), slope, photograph, 2)
    with pytest.raises(ValueError, match="not finite"):
        relative_map(found)


def test_a_flat_spot_takes_nothing_from_the_rest():
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    image[..., :4, :4] = 0.5
    image.requires_grad_()
    gradient = slope(detail(image, Window(0, 0, 7)), image)[0, 0]
    assert gradient.isfinite().all() and not gradient[:3, :3].any() and gradient[4:7, 4:7].all()


def test_support_of_convolutions_is_their_receptive_field(photograph):
    """Three 3×3 at ×2, window from 24: LR rows 24/2 - 3 to 40/2 + 3; zero to the last bit elsewhere."""
    attribution = attribution_of(convolutions(), photograph, Window(24, 24, 16), fold=4).values.abs().sum(0)
    for axis in (0, 1):
        touched = attribution.sum(axis).nonzero().flatten()
        assert (int(touched[0]), int(touched[-1])) == (9, 23)


def test_transposing_everything_transposes_the_map_and_flipping_does_not_mirror_it(photograph):
    net = convolutions()
    first, second, last = (net[0], net[2], net[4])

    def mirrored(image: torch.Tensor, turn) -> torch.Tensor:
        def convolved(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
            return F.conv2d(x, turn(layer.weight), layer.bias, padding=1)

        x = convolved(convolved(image, first).relu(), second).relu()
        B, _, H, W = x.shape
        sub_pixels = turn(convolved(x, last).view(B, 3, 2, 2, H, W).permute(0, 1, 4, 5, 2, 3))
        return sub_pixels.permute(0, 1, 2, 4, 3, 5).reshape(B, 3, 2 * H, 2 * W)

    plain = relative_map(attribution_of(net, photograph, Window(20, 24, 16), fold=4))
    turned = attribution_of(
        lambda image: mirrored(image, lambda x: x.transpose(-1, -2)),
        photograph.transpose(-1, -2),
        Window(24, 20, 16),
        fold=4,
    )
    np.testing.assert_allclose(relative_map(turned), plain.T, atol=1e-14)
    flipped = attribution_of(
        lambda image: mirrored(image, lambda x: x.flip(-1)),
        photograph.flip(-1),
        Window(64 - 20 - 16, 24, 16),
        fold=4,
    )
    assert np.abs(relative_map(flipped) - plain[:, ::-1]).max() > 0.01


@pytest.mark.parametrize(
    "values, expected",
    [([1, 2, 3, 4], 0.25), ([0, 0, 0, 1], 0.75), ([0.1, 0.5, 0.2, 0.2, 1], 0.42), ([3, 3, 3], 0)],
)
def test_gini_of_known_vectors(values, expected):
    assert gini(values) == pytest.approx(expected, abs=1e-15)


def test_diffusion_index_runs_from_one_pixel_to_all():
    one = np.zeros((10, 10))
    one[3, 4] = 1
    assert diffusion_index(one) == pytest.approx(1, abs=1e-2)
    assert diffusion_index(np.ones((10, 10))) == pytest.approx(100)


def test_density_equals_that_of_scipy():
    relative = np.random.default_rng(0).random((13, 17)) ** 8
    places = np.indices(relative.shape).reshape(2, -1)
    expected = gaussian_kde(places, weights=relative.ravel())(places).reshape(relative.shape)
    np.testing.assert_allclose(attribution_density(relative), expected / expected.max(), atol=1e-13)


@pytest.mark.parametrize("places", [[(3, 4)], [(0, 0), (2, 2), (5, 5)], [(1, 0), (1, 6)]])
def test_what_lies_on_a_line_has_no_density(places):
    relative = np.zeros((7, 7))
    for place in places:
        relative[place] = 1
    with pytest.raises(ValueError, match="on one line"):
        attribution_density(relative)


@pytest.mark.parametrize("window", [Window(-1, 0, 4), Window(0, 4, 4), Window(5, 0, 4), Window(0, 0, 0)])
def test_windows_must_have_neighbours_right_and_below(window):
    with pytest.raises(ValueError, match="within the first 7 rows and 8 columns"):
        detail(torch.zeros(1, 3, 8, 9), window)
    detail(torch.zeros(1, 3, 8, 9), Window(4, 3, 4))
