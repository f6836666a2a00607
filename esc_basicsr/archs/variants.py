"""The published variants: one dict of constructor keys each (arXiv:2503.06671, Table 1 and the release)."""

from typing import Any

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
