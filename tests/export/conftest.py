"""What the tests of exporting share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from esc_basicsr.archs.variants import NETWORKS


@pytest.fixture
def lively_network(tiny_network) -> Callable[..., nn.Module]:
    """Build a tiny network in which every part has a say, dynamic kernels and position bias too."""

    def build(**options: Any) -> nn.Module:
        keys = tiny_network | options
        net = NETWORKS[keys.pop("type")](**keys).eval().requires_grad_(False)
        for name, parameter in net.named_parameters():
            if name.endswith("relative_position_bias") or not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
        return net

    return build


@pytest.fixture
def checkpoint(lively_network, tmp_path):
    """A checkpoint file of a tiny ESC."""
    path = tmp_path / "tiny_x2.pth"
    torch.save({"params": lively_network().state_dict()}, path)
    return path
