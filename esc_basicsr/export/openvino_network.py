"""ESC networks as OpenVINO's intermediate representation (IR), made of their ONNX model."""

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import openvino
import torch
import torch.nn as nn
from torch import Tensor

from esc_basicsr.export.onnx_network import write_onnx

# where a model's own information lies in the file
_METADATA = "esc_basicsr"


@functools.cache
def core() -> Any:
    """Return the process's one OpenVINO.

    Each gives the thread a stack for signals as it begins, and what was before as it ends: of two, the one
    that ends last gives a stack that is gone, and the next signal ends the process.
    """
    return openvino.Core()


def write_openvino(network: nn.Module, half: bool, metadata: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Write a network as OpenVINO IR: the graph (.xml) and its weights (.bin).

    Arguments, input, output and errors are those of `write_onnx`; ``metadata`` is in the graph's ``rt_info``,
    below ``esc_basicsr``.
    """
    model = core().read_model(write_onnx(network, half, {}))
    for key, value in metadata.items():
        model.set_rt_info(value, [_METADATA, key])
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder, "network.xml")
        openvino.save_model(model, graph, compress_to_fp16=False)  # `half` is in the ONNX model
        return graph.read_bytes(), graph.with_suffix(".bin").read_bytes()


def read_openvino(content: tuple[bytes, bytes]) -> Callable[[Tensor], Tensor]:
    """Load what `write_openvino` wrote, on the CPU and with as many threads as PyTorch, in float32."""
    return compiled(core().read_model(*content))


def compiled(model: Any, precision: str = "f32") -> Callable[[Tensor], Tensor]:
    """Compile a model of OpenVINO for the CPU, with as many threads as PyTorch.

    Args:
        model: An ``openvino.Model`` of one input and one output.
        precision: OpenVINO's name of that which it may compute in: ``f32`` or ``bf16``.

    Returns:
        What runs it, on a float32 tensor on the CPU.
    """
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core().compile_model(model, "CPU", settings)
    return lambda lr: torch.from_numpy(request([lr.contiguous().numpy()])[0].copy())
