"""Principal components, spectra and means are those of the specification."""

import numpy as np
import pytest

from esc_basicsr.lab.analysis.features import (
    as_colours,
    channel_mean,
    channel_norm,
    principal_axes,
    relative_log_amplitude,
)

X = np.array([[1.0, 2, 0], [0, 1, 1], [2, 0, 1], [1, 1, 3], [3, 2, 1]])


def test_principal_axes_of_the_specification():
    variances, vectors = principal_axes(X)
    np.testing.assert_allclose(variances, [1.479958, 1.172632, 0.547409], atol=5e-7)
    np.testing.assert_allclose(vectors[:, 0], [0.669225, 0.375363, -0.641280], atol=5e-7)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    assert all(vector[np.abs(vector).argmax()] > 0 for vector in vectors.T)
    _, turned = principal_axes(-X)  # an axis has no direction of its own
    np.testing.assert_allclose(turned, vectors, atol=1e-12)


def test_colours_are_components_between_percentiles_common_to_all():
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(6, 7, 5)) * [5, 4, 3, 1, 1] + offset for offset in (0.0, 2.0)]
    colours, variances = as_colours(maps)
    rows = np.concatenate([features.reshape(-1, 5) for features in maps])
    expected, vectors = principal_axes(rows)
    np.testing.assert_allclose(variances, expected)
    components = rows @ vectors[:, :3]
    low, high = np.percentile(components, (1, 99), axis=0)
    found = np.concatenate([image.reshape(-1, 3) for image in colours])
    np.testing.assert_allclose(found, np.clip((components - low) / (high - low), 0, 1), atol=1e-10)
    assert found.min() == 0 and found.max() == 1
    same, _ = as_colours([maps[0], maps[1], maps[0]])
    np.testing.assert_array_equal(same[0], same[2])


def test_constant_features_have_a_colour():
    (colours,), variances = as_colours([np.ones((4, 4, 3))])
    assert np.isfinite(colours).all() and not variances.any()


def test_mean_is_signed_and_norm_euclidean():
    features = np.array([[[3.0, -4], [-6, 8]]])
    np.testing.assert_array_equal(channel_mean(features), [[-0.5, 1]])
    np.testing.assert_array_equal(channel_norm(features), [[5, 10]])


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (12, 40)])
@pytest.mark.parametrize("cycles", [1, 3, 6])
def test_a_wave_stands_at_its_frequency(size, cycles):
    height, width = size
    rows = np.arange(height)[:, None]
    wave = 2 + np.cos(2 * np.pi * cycles * rows / height) * np.ones(width)
    frequencies, spectrum = relative_log_amplitude(wave[..., None])
    assert len(frequencies) == min(size) // 2 + 1 and frequencies[-1] == 0.5
    assert spectrum[0] == 0
    ring = np.abs(frequencies - cycles / height).argmin()
    assert spectrum[1:].argmax() + 1 == ring
    others = np.delete(spectrum, [0, ring])
    assert others.max() < -8  # but for rounding nothing is there


def test_white_noise_is_flat_and_an_impulse_flatter():
    rng = np.random.default_rng(1)
    _, spectrum = relative_log_amplitude(rng.normal(size=(64, 64, 32)))
    assert np.abs(spectrum[4:] - spectrum[4:].mean()).max() < 0.1
    impulse = np.zeros((8, 8, 1))
    impulse[3, 2] = 1
    np.testing.assert_allclose(relative_log_amplitude(impulse)[1], 0, atol=1e-12)


def test_amplitude_is_averaged_over_channels_as_a_logarithm():
    impulse = np.zeros((8, 8, 2))
    impulse[0, 0] = 1, 100
    blurred = impulse + np.roll(impulse, 1, 0)
    _, both = relative_log_amplitude(blurred)
    _, one = relative_log_amplitude(blurred[..., :1])
    np.testing.assert_allclose(both[1:4], one[1:4], atol=1e-6)
