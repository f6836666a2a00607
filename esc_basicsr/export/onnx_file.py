"""ESC networks as ONNX files, and ONNX Runtime to run them."""

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import onnxruntime
import torch
import torch.nn as nn
from torch import Tensor

from esc_basicsr.archs import ESC, ESCFP
from esc_basicsr.common.errors import UserError
from esc_basicsr.export.onnx_network import INPUT, OUTPUT, build_onnx

__all__ = ["read_onnx", "write_onnx"]


def write_onnx(network: nn.Module, half: bool, metadata: Mapping[str, str], opset: int) -> bytes:
    """Write a network as an ONNX file, see `build_onnx`.

    Raises:
        UserError: The installed package onnx does not know the opset.
    """
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise UserError(
            f"--opset {opset}: the installed onnx {onnx.__version__} knows {newest} at most; update it, or "
            "choose an older one."
        )
    assert isinstance(network, ESC | ESCFP)
    return build_onnx(network, half, opset, metadata).SerializeToString()


def read_onnx(content: bytes) -> Callable[[Tensor], Tensor]:
    """Load an ONNX file into ONNX Runtime, on the CPU and with as many threads as PyTorch.

    Raises:
        UserError: ONNX Runtime does not take it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    try:
        session: Any = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has exceptions of its own, of no common class
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} does not take this network ({error}). Nothing was "
            "written. Update it, or choose an older --opset."
        ) from error
    return lambda lr: torch.from_numpy(session.run([OUTPUT], {INPUT: lr.numpy()})[0])
