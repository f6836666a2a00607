"""ONNX graphs, written operator by operator."""

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor


class Graph:
    """A graph in the making: nodes in the order in which they run, and constants, each once.

    Args:
        dtype: Precision of weights, float32 or float16.
    """

    def __init__(self, dtype: type[np.floating[Any]]) -> None:
        self.dtype = dtype
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self._known: dict[tuple[bytes, tuple[int, ...], str], str] = {}

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add an operator of one output, and return that one's name."""
        name = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def split(self, x: str, sizes: list[int], axis: int) -> list[str]:
        """Split into pieces of ``sizes`` along ``axis``, and return their names."""
        name = f"Split_{len(self.nodes)}"
        pieces = [f"{name}_{piece}" for piece in range(len(sizes))]
        node = helper.make_node("Split", [x, self.integers(*sizes)], pieces, name=name, axis=axis)
        self.nodes.append(node)
        return pieces

    def constant(self, array: np.ndarray[Any, Any]) -> str:
        """Name a constant."""
        key = (array.tobytes(), array.shape, str(array.dtype))
        if key not in self._known:
            self._known[key] = f"constant_{len(self.constants)}"
            self.constants.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def integers(self, *values: int) -> str:
        """Name a constant vector of int64."""
        return self.constant(np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """Name a constant int64."""
        return self.constant(np.array(value, np.int64))

    def number(self, value: float) -> str:
        """Name a constant in the weights' precision."""
        return self.constant(np.array(value, self.dtype))

    def weight(self, tensor: Tensor) -> str:
        """Name a constant in the weights' precision."""
        return self.constant(np.ascontiguousarray(tensor.detach().cpu().numpy().astype(self.dtype)))
