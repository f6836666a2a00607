"""What the tests share."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from fixtures.networks import GOLDEN
from slow import SLOW

from esc_basicsr.archs.variants import NETWORKS
from esc_basicsr.common import log
from esc_basicsr.common.log import logger

if not torch.cuda.is_available():  # Triton's interpreter; read when Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = [
    "fixtures.films",
    "fixtures.images",
    "fixtures.kernels",
    "fixtures.networks",
    "fixtures.option_files",
    "fixtures.upscaling",
]

# As many test processes as cores (pytest-xdist): each, and what it starts, has its share of them.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if _WORKERS > 1:
    threads = max(1, (os.cpu_count() or 1) // _WORKERS)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the real test sets, which are never committed."""
    folder = os.environ.get("ESC_BASICSR_DATA")
    if not folder:
        pytest.skip("ESC_BASICSR_DATA is not set to a folder that holds Set5, Set14 and train")
    return Path(folder)


@pytest.fixture(scope="session")
def build_network() -> Callable[..., nn.Module]:
    """Build a network from `network_g`, with options on top."""

    def build(network_g: dict[str, Any], **options: Any) -> nn.Module:
        keys = network_g | options
        return NETWORKS[keys.pop("type")](**keys)

    return build


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """Read a golden file: its arrays by name, `config` parsed, and `weights`, the state dict."""

    def read(name: str) -> dict[str, Any]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays: dict[str, Any] = {key: file[key] for key in file.files}
        weights = {key.removeprefix("weight/"): arrays[key] for key in arrays if key.startswith("weight/")}
        arrays["weights"] = {key: torch.from_numpy(value) for key, value in weights.items()}
        arrays["config"] = json.loads(str(arrays["config"]))
        return arrays

    return read


@pytest.fixture(scope="session")
def published() -> dict[str, Any]:
    """Keys, shapes and parameter counts of the published networks."""
    return json.loads((GOLDEN / "state_dict_keys.json").read_text())


@pytest.fixture
def tiny_network() -> dict[str, Any]:
    """`network_g` of an ESC that runs in milliseconds."""
    return {
        "type": "ESC",
        "upscaling_factor": 2,
        "dim": 16,
        "pdim": 4,
        "kernel_size": 5,
        "n_blocks": 1,
        "conv_blocks": 2,
        "window_size": 4,
        "num_heads": 2,
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `SLOW`."""
    folder = Path(__file__).parent
    for item in items:
        if any(item.path.is_relative_to(folder / name) for name in SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def esc_log() -> Iterator[list[str]]:
    """What this package logs during the test. BasicSR's logger, its parent, hides it from caplog."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    log._logged.clear()
    yield messages
    logger.setLevel(level)
    logger.removeHandler(handler)
