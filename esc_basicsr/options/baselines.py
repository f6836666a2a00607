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

from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Baseline(NamedTuple):
    """A published network."""

    network: dict[str, Any]  # `network_g` without the scale
    scale_key: str  # the option that takes the scale


BASELINES = {
    name: Baseline(**entry)
    for name, entry in yaml.safe_load(Path(__file__).with_suffix(".yml").read_text()).items()
}
