"""ONNX graphs, written operator by operator."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

# An operator's input: the name of another's output, or a constant. Integers are int64, alone or as a vector;
# floats and tensors are in the weights' precision; an array is taken as it is.
Input: TypeAlias = str | int | float | Sequence[int] | Tensor | np.ndarray[Any, Any]


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

    def add(self, operator: str, *inputs: Input, output: str = "", **attributes: Any) -> str:
        """Add an operator of one output, and return that one's name."""
        name = output or f"{operator}_{len(self.nodes)}"
        self._append(operator, inputs, [name], name, attributes)
        return name

    def split(self, x: str, sizes: list[int], axis: int) -> list[str]:
        """Split into pieces of ``sizes`` along ``axis``, and return their names."""
        name = f"Split_{len(self.nodes)}"
        pieces = [f"{name}_{piece}" for piece in range(len(sizes))]
        self._append("Split", (x, sizes), pieces, name, {"axis": axis})
        return pieces

    def _append(
        self,
        operator: str,
        inputs: Sequence[Input],
        outputs: list[str],
        name: str,
        attributes: dict[str, Any],
    ) -> None:
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        self.nodes.append(helper.make_node(operator, names, outputs, name=name, **attributes))

    def _constant(self, value: int | float | Sequence[int] | Tensor | np.ndarray[Any, Any]) -> str:
        match value:
            case np.ndarray():
                array = value
            case Tensor():
                array = np.ascontiguousarray(value.detach().cpu().numpy().astype(self.dtype))
            case float():
                array = np.array(value, self.dtype)
            case _:
                array = np.array(value, np.int64)
        key = (array.tobytes(), array.shape, str(array.dtype))
        if key not in self._known:
            self._known[key] = f"constant_{len(self.constants)}"
            self.constants.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]
