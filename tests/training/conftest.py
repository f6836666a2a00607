"""What the tests of models share."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esc_basicsr.training.esc_model import ESCModel


@pytest.fixture
def options(tiny_network: dict[str, Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Options to train on a CPU: ``train`` holds what is added to that section, other keywords sections."""

    def make(train: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
        return {
            "model_type": "ESCModel",
            "num_gpu": 0,
            "is_train": True,
            "dist": False,
            "rank": 0,
            "world_size": 1,
            "datasets": {"train": {"batch_size_per_gpu": 8}},
            "logger": {},
            "network_g": tiny_network,
            "path": {"models": str(tmp_path), "training_states": str(tmp_path)},
            "train": {
                "ema_decay": 0.9,
                # with this eps a step is close to one of gradient descent, which does not magnify rounding
                "optim_g": {"type": "AdamW", "lr": 0.1, "weight_decay": 0, "betas": [0.5, 0.5], "eps": 1.0},
                "scheduler": {"type": "MultiStepLR", "milestones": [100], "gamma": 0.5},
                "pixel_opt": {"type": "L1Loss"},
                **(train or {}),
            },
            "val": {},
            **sections,
        }

    return make


@pytest.fixture
def build(options: Callable[..., dict[str, Any]]) -> Callable[..., ESCModel]:
    """Build a model by such options, from the same weights each time."""

    def make(**changes: Any) -> ESCModel:
        torch.manual_seed(0)
        return ESCModel(copy.deepcopy(options(**changes)))

    return make
