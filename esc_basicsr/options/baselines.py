"""The networks that the paper compares ESC with, by the names of its tables; options as published.

| baseline | code | parameters ×2 / ×3 / ×4 |
|---|---|---|
| SwinIR-light | BasicSR's SwinIR, padded to whole windows | 910,152 / 918,267 / 929,628 |
| RCAN | BasicSR's | 15,444,643 / 15,629,283 / 15,592,355 |
| HiT-SRF | this package's `HiT_SRF` | 846,944 / 855,059 / 866,420 |
| MambaIRv2-light | this package's `MambaIRv2Light` | 774,092 / 780,587 / 789,680 |
| ATD-light | spandrel's ATD | 753,204 / 759,699 / 768,792 |
| OmniSR | spandrel's | 784,604 / 793,259 / 805,376 |

The paper's figures are these, rounded to thousands, but for OmniSR: its 792 thousand at ×4 leave out 9,000
position biases, 3,840 weights of normalisations and 40 temperatures, for which usual counters know no layer.
SRFormer-light is in neither package, and is not built.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Baseline(NamedTuple):
    """A published network."""

    network: Mapping[str, Any]  # `network_g` without the scale
    scale_key: str = "upscale"  # the option that takes the scale


def _light(kind: str, depths: int, heads: int, **options: Any) -> Baseline:
    """Describe a light network by its class, the depth and the heads of its four stages, and the rest."""
    stages = {"depths": [depths] * 4, "num_heads": [heads] * 4}
    tail = {"img_range": 1.0, "upsampler": "pixelshuffledirect", "resi_connection": "1conv"}
    return Baseline({"type": kind, **stages, **options, **tail})


BASELINES = {
    "SwinIR-light": _light("PaddedSwinIR", 6, 6, img_size=64, window_size=8, embed_dim=60, mlp_ratio=2),
    "RCAN": Baseline(
        {
            "type": "RCAN",
            "num_in_ch": 3,
            "num_out_ch": 3,
            "num_feat": 64,
            "num_group": 10,
            "num_block": 20,
            "squeeze_factor": 16,
            "res_scale": 1,
            "img_range": 255.0,
            "rgb_mean": [0.4488, 0.4371, 0.4040],
        }
    ),
    "HiT-SRF": _light(
        "HiT_SRF",
        6,
        6,
        embed_dim=60,
        base_win_size=[8, 8],
        hier_win_ratios=[0.5, 1, 2, 4, 6, 8],
        mlp_ratio=2.0,
    ),
    "MambaIRv2-light": _light(
        "MambaIRv2Light",
        5,
        4,
        embed_dim=48,
        d_state=8,
        window_size=16,
        inner_rank=32,
        num_tokens=64,
        convffn_kernel_size=5,
        mlp_ratio=1.0,
    ),
    "ATD-light": _light(
        "Spandrel",
        6,
        4,
        architecture="ATD",
        embed_dim=48,
        window_size=16,
        category_size=128,
        num_tokens=64,
        reducted_dim=8,
        convffn_kernel_size=7,
        mlp_ratio=1,
    ),
    "OmniSR": Baseline(
        {
            "type": "Spandrel",
            "architecture": "OmniSR",
            "num_feat": 64,
            "block_num": 1,
            "res_num": 5,
            "window_size": 8,
            "pe": True,
            "bias": True,
        },
        scale_key="up_scale",
    ),
}
