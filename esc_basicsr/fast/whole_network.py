"""Running a network as a whole, without gradients: compiled, by CUDA graphs, in half precision.

Compilations and graphs save what it costs to start many small operations; what is computed is the same.
Neither is made anew for each image: a compilation serves all sizes into which windows fit, or do not fit,
alike, and graphs are kept by size.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esc_basicsr.common.errors import UserError
from esc_basicsr.fast.precision import HALF_PRECISIONS

WHOLE = ("eager", "compiled", "graphs")
# Graphs that are kept: each holds its input and output, and all share what lies between.
_MOST_GRAPHS = 8

Replay = Callable[[Tensor], Tensor]


def run_whole(net: nn.Module, mode: str) -> nn.Module:
    """Give a network whose forward pass runs in a mode.

    Args:
        net: The network, where it is to run; its weights are shared, and may be changed in their place.
        mode: ``eager``; ``compiled``, by torch.compile, for sizes that vary; ``graphs``, by a CUDA graph for
            each of the last sizes, elsewhere than on CUDA as ``eager``; any of them followed by ``+fp16`` or
            ``+bf16`` for half precision by autocast, with softmax and sums in float32.

    Raises:
        UserError: There is no such mode.
    """
    whole, separator, precision = mode.partition("+")
    if whole not in WHOLE or (separator and precision not in HALF_PRECISIONS):
        halves = " or ".join(f"+{name}" for name in HALF_PRECISIONS)
        raise UserError(f"mode must be one of {', '.join(WHOLE)}, with {halves} or without, got {mode!r}.")
    if precision:
        net = InHalfPrecision(net, HALF_PRECISIONS[precision])
    if whole == "compiled":
        net.compile(dynamic=True)
    return ByGraphs(net) if whole == "graphs" else net


class InHalfPrecision(nn.Module):
    """A network in half precision where autocast deems that safe.

    Shape:
        Input: the network's, float32. Output: the network's, float32.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Run the network."""
        with torch.autocast(x.device.type, self.dtype):
            return self.net(x).to(x.dtype)


class ByGraphs(nn.Module):
    """A network whose forward pass is captured as a CUDA graph at each size, and replayed.

    With gradients, and elsewhere than on CUDA, it is the network itself.

    Args:
        net: The network. Graphs read its weights in their place: they may be changed there, not moved.
        capture: Makes a replay of a function, for inputs like one.
    """

    def __init__(self, net: nn.Module, capture: Callable[..., Replay] | None = None) -> None:
        super().__init__()
        self.net = net
        self._capture = capture
        self._pool: Any = None  # of CUDA memory
        # the least recently used first
        self._replays: OrderedDict[tuple[object, ...], Replay] = OrderedDict()

    def forward(self, x: Tensor) -> Tensor:
        """Run the network."""
        is_recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if is_recorded or (self._capture is None and x.device.type != "cuda"):
            return self.net(x)
        autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
        key = (x.shape, x.dtype, x.device, autocast)
        if key not in self._replays:
            while len(self._replays) >= _MOST_GRAPHS:
                self._replays.popitem(last=False)
            self._replays[key] = (self._capture or self._capture_on_cuda)(self.net, x)
        self._replays.move_to_end(key)
        return self._replays[key](x)

    def _capture_on_cuda(self, run: Replay, x: Tensor) -> Replay:
        """Capture ``run`` for inputs like ``x``; replays copy their input in and their output out.

        All graphs use the same memory for what lies between, since no two of them run at once.
        """
        with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
            given = x.clone()  # no inference tensor, which could not be written to later
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run(given)  # libraries load, and kernels are compiled, which a capture does not allow
            torch.cuda.current_stream().wait_stream(stream)
            # A graph casts weights itself: what autocast keeps is freed where the caller's autocast ends.
            torch.clear_autocast_cache()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                made = run(given)
            torch.clear_autocast_cache()  # casts of the capture are the graph's

        def replay(x: Tensor) -> Tensor:
            given.copy_(x)
            graph.replay()
            return made.clone()

        return replay
