"""ESC as a user of its ONNX file runs it on a CPU: by ONNX Runtime, or by OpenVINO."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from esc_basicsr.common.errors import UserError
from esc_basicsr.lab.networks.baselines import imported

Run = Callable[[Tensor], Tensor]
# Gives the function that runs an ONNX file's content on inputs of one size.
Runtime = Callable[[bytes, torch.Size], Run]


class ExportedNetwork(nn.Module):
    """A network as its ONNX file runs in another runtime, on the CPU and without gradients.

    Args:
        net: The network; what it is now is exported.
        runtime: What runs it; prepared anew for each size of the input.

    Raises:
        UserError: The package onnx is not installed.

    Shape:
        As the network's; float32.
    """

    def __init__(self, net: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.net = net  # its parameters are counted
        imported("onnx", "an exported network")
        imported("onnxruntime", "an exported network")
        from esc_basicsr.export.onnx_network import write_onnx

        self._content = write_onnx(net, half=False, metadata={})
        self._runtime = runtime
        self._runs: dict[torch.Size, Run] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Upscale a batch of images.

        Raises:
            UserError: Gradients are wanted; or the runtime is not installed, or refuses the network.
        """
        if torch.is_grad_enabled():
            raise UserError("a runtime of ONNX files has no gradients: it can be measured by bench alone.")
        if x.shape not in self._runs:
            self._runs[x.shape] = self._runtime(self._content, x.shape)
        return self._runs[x.shape](x)


def run_by_onnxruntime(content: bytes, size: torch.Size) -> Run:
    """Load an ONNX file into ONNX Runtime, with as many threads as PyTorch."""
    from esc_basicsr.export.onnx_network import read_onnx

    return read_onnx(content)  # of any size: fixing it gains nothing there


def run_by_openvino(content: bytes, size: torch.Size, bf16: bool) -> Run:
    """Compile an ONNX file by OpenVINO, with as many threads as PyTorch, for one size: so it is fastest.

    Args:
        content: The file's.
        size: Of the input, (B, 3, H, W).
        bf16: Whether it may compute in bfloat16 where it deems that safe; else in float32.

    Raises:
        UserError: OpenVINO is not installed, or knows no bfloat16 on this processor.
    """
    imported("openvino", "this implementation")
    from esc_basicsr.export.openvino_network import compiled, core

    if bf16 and "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UserError("OpenVINO computes in float32 on this processor, which has no bfloat16.")
    model = core().read_model(content)
    model.reshape(list(size))
    return compiled(model, "bf16" if bf16 else "f32")
