"""The published variants: one dict of constructor keys each (arXiv:2503.06671, Table 1 and the release)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from esc_basicsr.archs.esc_arch import ESC
from esc_basicsr.archs.esc_fp_arch import ESCFP
from esc_basicsr.archs.esc_real_arch import ESCReal, ESCRealM

__all__ = ["NETWORKS", "SCALES", "VARIANTS", "build_on_meta", "build_variant"]

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

# name of the variant -> `network_g` without `upscaling_factor`
VARIANTS: dict[str, dict[str, Any]] = {
    "ESC": {"type": "ESC", "dim": 64, "n_blocks": 5, "num_heads": 4, **_COMMON},
    "ESC-light": {"type": "ESC", "dim": 64, "n_blocks": 3, "num_heads": 4, **_COMMON},
    "ESC-FP": {"type": "ESCFP", "dim": 48, "n_blocks": 5, "num_heads": 3, **_COMMON},
}


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
        name: A key of `VARIANTS`.
        scale: Upscaling factor.
    """
    options = dict(VARIANTS[name])
    return NETWORKS[options.pop("type")](upscaling_factor=scale, **options)
