"""ESC networks as TorchScript and torch.export programs, and their weights as .safetensors files."""

import contextlib
import importlib
import inspect
import io
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from esc_basicsr.common.errors import UserError
from esc_basicsr.export.recordable import recordable, recording
from esc_basicsr.weights.shipped import load_network

# Both kinds of files are archives; this file in them says what they hold.
METADATA_FILE = "esc_basicsr.json"

# What is recorded is the same for any image; only at sizes of 1 some operations would take short cuts.
_EXAMPLE = (2, 3, 13, 18)


class _Program(nn.Module):
    """The recorded program: float32 in, float32 out, whatever the network's precision."""

    def __init__(self, network: nn.Module, half: bool) -> None:
        super().__init__()
        self.dtype = torch.float16 if half else torch.float32
        # The name is one that readers of state dicts, spandrel's too, take off.
        self.module = recordable(network).to(self.dtype)

    def forward(self, lr: Tensor) -> Tensor:
        """Upscale a batch of images."""
        sr: Tensor = self.module(lr.to(self.dtype))
        return sr.float()


def write_torchscript(network: nn.Module, half: bool, metadata: Mapping[str, str]) -> bytes:
    """Write a network as a TorchScript file, for any batch, height and width.

    Input (batch, 3, height, width) and output (batch, 3, height·scale, width·scale) are float32, RGB in
    [0, 1], the output not clamped. It may be loaded onto any device.

    Args:
        network: The network; not changed.
        half: Whether weights and features are float16.
        metadata: What the file says of itself, as JSON in its extra file METADATA_FILE.

    Raises:
        UserError: This PyTorch cannot record it.
    """
    file = io.BytesIO()
    with recording("TorchScript"):
        traced = torch.jit.trace(_Program(network, half), torch.zeros(_EXAMPLE), check_trace=False)
        torch.jit.save(traced, file, _extra_files={METADATA_FILE: json.dumps(dict(metadata))})
    return file.getvalue()


def read_torchscript(content: bytes) -> nn.Module:
    """Read the program of a file that `write_torchscript` wrote."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(io.BytesIO(content), map_location="cpu")


def write_exported(network: nn.Module, half: bool, metadata: Mapping[str, str]) -> bytes:
    """Write a network as a torch.export file; arguments, input and output as in `write_torchscript`.

    Batch, height and width are any, but for an image of a single pixel. It runs on the CPU, or where
    torch.export.passes.move_to_device_pass takes it.

    Raises:
        UserError: This PyTorch cannot record it.
    """
    any_size = torch.export.Dim.DYNAMIC
    options: dict[str, Any] = {"prefer_deferred_runtime_asserts_over_guards": True}
    if not options.keys() <= inspect.signature(torch.export.export).parameters.keys():
        raise UserError(
            f"torch.export of PyTorch {torch.__version__} holds a network to sizes like the recorded one's; "
            "update PyTorch, or use --format torchscript or onnx."
        )
    file = io.BytesIO()
    with recording("torch.export"), _sizes_of_one_as_any():
        program = torch.export.export(
            _Program(network, half),
            (torch.zeros(_EXAMPLE),),
            dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},),
            strict=False,
            **options,
        )
        torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(dict(metadata))})
    return file.getvalue()


def read_exported(content: bytes) -> nn.Module:
    """Read the program of a file that `write_exported` wrote."""
    return torch.export.load(io.BytesIO(content)).module()


def write_weights(network: nn.Module, half: bool, metadata: Mapping[str, str]) -> bytes:
    """Write a network's weights as a .safetensors file."""
    from safetensors.torch import save  # as in `weights.write`

    dtype = torch.float16 if half else torch.float32
    weights = {
        name: value.to(dtype if value.is_floating_point() else value.dtype, copy=True).contiguous()
        for name, value in network.state_dict().items()
    }
    return save(weights, dict(metadata))


def read_weights(content: bytes) -> nn.Module:
    """Read the network of a .safetensors file that `write_weights` wrote."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        path.write_bytes(content)
        return load_network(path).network


def _sizes_of_one_as_any() -> contextlib.AbstractContextManager[object]:
    """Have torch.export assume no size to be above 1."""
    config: Any = importlib.import_module("torch.fx.experimental._config")
    return config.patch(backed_size_oblivious=True)
