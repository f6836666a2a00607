"""Views of a feature map: channels' mean and norm, principal components as colours, its spectrum.

How ESC's authors visualised features was not found; these are common methods, and ours in their details.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

# below which an amplitude counts as none
_LEAST_AMPLITUDE = 1e-8
_PERCENTILES = (1, 99)


def channel_mean(features: Values) -> Values:
    """Average over channels, signed: (H, W, C) -> (H, W)."""
    return np.asarray(features.mean(-1))


def channel_norm(features: Values) -> Values:
    """Take the Euclidean norm over channels: (H, W, C) -> (H, W)."""
    return np.linalg.norm(features, axis=-1)


def principal_axes(rows: Values) -> tuple[Values, Values]:
    """Find the principal components of (n, C): variances, descending, (C,), and unit vectors, (C, C).

    Vectors stand in columns. A vector's entry of largest magnitude is positive.
    """
    centred = rows - rows.mean(0)
    variances, vectors = np.linalg.eigh(centred.T @ centred / (len(rows) - 1))
    variances, vectors = variances[::-1], vectors[:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    return variances, vectors * np.sign(largest)


def as_colours(maps: Sequence[Values]) -> tuple[list[Values], Values]:
    """Draw feature maps by the three components that explain most of all of them together.

    Basis and range, the 1st to the 99th percentile of each component, are common to all, so that equal
    colours are equal features.

    Args:
        maps: (H, W, C), C at least 3 and the same in all.

    Returns:
        RGB in [0, 1], (H, W, 3) each; and the components' variances, (C,).
    """
    rows = np.concatenate([features.reshape(-1, features.shape[-1]) for features in maps])
    variances, vectors = principal_axes(rows)
    mean = rows.mean(0)
    low, high = np.percentile((rows - mean) @ vectors[:, :3], _PERCENTILES, axis=0)
    span = np.where(high > low, high - low, 1)
    return [np.clip(((features - mean) @ vectors[:, :3] - low) / span, 0, 1) for features in maps], variances


def relative_log_amplitude(features: Values) -> tuple[Values, Values]:
    """Measure how a feature map's amplitude falls with frequency.

    Args:
        features: (H, W, C).

    Returns:
        Frequencies in cycles per pixel, from 0 to 0.5, or just below it where the shorter side is odd, in
        steps of one cycle per shorter side; and the mean over channels, and over directions, of
        log10(|FFT2| + 1e-8), minus that at frequency 0.
    """
    height, width = features.shape[:2]
    amplitude = np.abs(np.fft.fft2(features, axes=(0, 1)))
    logarithm = np.log10(amplitude + _LEAST_AMPLITUDE).mean(-1)
    shorter = min(height, width)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) * shorter
    ring = np.where(radius > 0, np.maximum(np.rint(radius), 1), 0).astype(np.int64).ravel()
    means = np.bincount(ring, logarithm.ravel()) / np.maximum(np.bincount(ring), 1)
    kept = shorter // 2 + 1
    return np.arange(kept) / shorter, (means - means[0])[:kept]
