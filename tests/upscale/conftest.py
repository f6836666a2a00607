"""What the tests of upscaling share."""

from pathlib import Path
from typing import Any

import pytest
import torch

from esc_basicsr.archs.variants import NETWORKS


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ×2 checkpoint of a small ESC, random but for what makes its pictures look like the input."""
    options: dict[str, Any] = {
        **{"upscaling_factor": 2, "dim": 16, "pdim": 4, "kernel_size": 5, "n_blocks": 1, "conv_blocks": 2},
        **{"window_size": 8, "num_heads": 2},
    }
    torch.manual_seed(0)
    network = NETWORKS["ESC"](**options)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.startswith("to_img"):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    file = tmp_path_factory.mktemp("model") / "small_x2.pth"
    torch.save({"params": network.state_dict(), "params_ema": network.state_dict()}, file)
    return file
