"""The published variants: one dict of constructor keys each (arXiv:2503.06671, Table 1 and the release)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from esc_basicsr.archs.esc_arch import ESC
from esc_basicsr.archs.esc_fp_arch import ESCFP
from esc_basicsr.archs.esc_real_arch import ESCReal, ESCRealM

__all__ = ["NETWORKS", "RELEASED", "SCALES", "VARIANTS", "build_on_meta", "build_variant", "scales_of"]

# registered name -> class
NETWORKS: dict[str, type[nn.Module]] = {
    "ESC": ESC,
    "ESCFP": ESCFP,
    "ESCReal": ESCReal,
    "ESCRealM": ESCRealM,
}

# scales that are published
SCALES = (2, 3, 4)

_COMMON: dict[str, Any] = {
    "pdim": 16,
    "kernel_size": 13,
    "conv_blocks": 5,
    "window_size": 32,
    "exp_ratio": 1.25,
}

# name of the variant -> `network_g` without `upscaling_factor`; those of the paper's tables
VARIANTS: dict[str, dict[str, Any]] = {
    "ESC": {"type": "ESC", "dim": 64, "n_blocks": 5, "num_heads": 4, **_COMMON},
    "ESC-light": {"type": "ESC", "dim": 64, "n_blocks": 3, "num_heads": 4, **_COMMON},
    "ESC-FP": {"type": "ESCFP", "dim": 48, "n_blocks": 5, "num_heads": 3, **_COMMON},
}

_REAL: dict[str, Any] = {**_COMMON, "dim": 64, "n_blocks": 10, "num_heads": 4, "exp_ratio": 2}

# likewise, with what the release has beside them
RELEASED: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "ESC-XL": {
        **{"type": "ESC", **_COMMON, "dim": 192, "pdim": 48, "n_blocks": 8, "window_size": 48},
        **{"num_heads": 12, "use_ln": True},
    },
    "ESC-Real": {"type": "ESCReal", **_REAL},
    "ESC-RealM": {"type": "ESCRealM", **_REAL, "upsampler": "nearest+conv", "mid_dim": 48},
}


def scales_of(name: str) -> tuple[int, ...]:
    """Give the scales that a variant, a key of `RELEASED`, is built for."""
    return (4,) if RELEASED[name]["type"] == "ESCReal" else SCALES


def build_on_meta(network_g: Mapping[str, Any]) -> nn.Module:
    """Build a network without memory for its weights, and without the time that random ones take.

    ``net.to_empty(device="cpu")`` gives it memory, for weights that are loaded then.

    Args:
        network_g: ``type``, a key of `NETWORKS`, and constructor options.
    """
    options = dict(network_g)
    with torch.device("meta"):
        return NETWORKS[options.pop("type")](**options)


def build_variant(name: str, scale: int) -> nn.Module:
    """Build a published variant with random weights.

    Args:
        name: A key of `RELEASED`.
        scale: Upscaling factor, one of `scales_of`.
    """
    options = dict(RELEASED[name])
    return NETWORKS[options.pop("type")](upscaling_factor=scale, **options)
