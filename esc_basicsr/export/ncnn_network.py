"""ESC networks as ncnn models, converted by pnnx from a recording of layers that ncnn has.

ncnn knows no batch, no maps of more than four dimensions, and no index that depends on the image's size.
Here reflections are products with matrices of zeros and ones, windows are cut by moving their pixels into the
channels and back, and position bias is laid out while the network runs.
"""

import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import ncnn
import numpy as np
import pnnx
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.archs.conv_attention import KernelPredictor, LargeKernelConv, SeparableLargeKernelConv
from esc_basicsr.archs.esc_real_arch import ESCRealM, ReflectingConv2d
from esc_basicsr.common.errors import UserError
from esc_basicsr.export.recordable import Layers, recordable, recording

# pnnx's names of the model's input and output
INPUT, OUTPUT = "in0", "out0"


def write_ncnn(network: nn.Module, half: bool, metadata: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Write a network as an ncnn model: its layers (.param) and their weights (.bin).

    Its input is (3, height, width), float32, RGB in [0, 1], any sizes >= 1; its output is
    (3, height·scale, width·scale), float32, not clamped. It takes one image at a time.

    Args:
        network: The network; not changed.
        half: Whether weights are float16. What precision features have is up to who runs it.
        metadata: Not written: an ncnn model has no place for it.

    Raises:
        UserError: PyTorch cannot record it, or pnnx finds no ncnn layer for one of its operators.
    """
    unit = getattr(network, "unshuffle", 1) * max(
        (layer.window_size for layer in network.modules() if isinstance(layer, WindowAttention)), default=8
    )
    # pnnx takes for constant what two examples have in common: here 2×3 and 4×2 windows, 6 and 8 in all.
    examples = [(unit + 1, 2 * unit + 1), (3 * unit + 1, unit + 1)]
    shapes = [f"[1,3,{height},{width}]" for height, width in examples]
    with tempfile.TemporaryDirectory() as folder:
        with recording("ncnn"):
            program = recordable(network, _LAYERS)
            example = torch.zeros(1, 3, *examples[0])
            torch.jit.trace(program, example, check_trace=False).save(str(Path(folder, "network.pt")))
        arguments = [f"inputshape={shapes[0]}", f"inputshape2={shapes[1]}", f"fp16={int(half)}"]
        converted = subprocess.run(
            [pnnx.EXEC_PATH, "network.pt", *arguments], cwd=folder, capture_output=True, text=True
        )
        try:
            layers = Path(folder, "network.ncnn.param").read_bytes()
            weights = Path(folder, "network.ncnn.bin").read_bytes()
        except FileNotFoundError as error:
            last = (converted.stderr.splitlines() or [f"exit code {converted.returncode}"])[-1]
            raise UserError(f"pnnx {pnnx.__version__} cannot convert this network ({last}).") from error
    # What has no layer in ncnn keeps PyTorch's name, such as torch.unbind.
    operators = {line.split()[0] for line in layers.decode().splitlines()[2:]}
    if unknown := sorted(name for name in operators if "." in name):
        raise UserError(
            f"{type(network).__name__} with these options cannot be written as ncnn, which has no layer for "
            f"{', '.join(unknown)}: write TorchScript, by an OUT that ends in .pt."
        )
    return layers, weights


def read_ncnn(content: tuple[bytes, bytes]) -> Callable[[Tensor], Tensor]:
    """Load what `write_ncnn` wrote, on the CPU, in float32, with as many threads as PyTorch.

    Returns:
        What runs it for one image after another of a batch.

    Raises:
        UserError: ncnn does not take it.
    """
    model = ncnn.Net()
    model.opt.num_threads = torch.get_num_threads()
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(model.opt, name, False)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("network.param", "network.bin")]
        for file, part in zip(files, content, strict=True):
            file.write_bytes(part)
        if model.load_param(str(files[0])) or model.load_model(str(files[1])):
            raise UserError(f"ncnn {ncnn.__version__} does not take this network. Nothing was written.")

    def run(lr: Tensor) -> Tensor:
        images = []
        for image in lr:
            extractor = model.create_extractor()
            extractor.input(INPUT, ncnn.Mat(np.ascontiguousarray(image.numpy())))
            error, output = extractor.extract(OUTPUT)
            if error:
                raise RuntimeError(f"ncnn's error {error}")
            images.append(torch.from_numpy(np.array(output)))
        return torch.stack(images)

    return run


class _WindowAttention(WindowAttention):
    """Window attention head by head over windows that lie in the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window."""
        dim, height, width = x.shape[1:]
        w, heads = self.window_size, self.num_heads
        # [1, 3C, (rows w), (columns w)] -> [1, (3C w w), rows, columns] -> [3C, (w w), (rows columns)]
        qkv = F.pixel_unshuffle(self.to_qkv(_pad_to_multiple(x, w)), w)
        rows, columns = qkv.shape[-2:]
        pieces = qkv.reshape(3 * dim, w * w, -1).split([dim // heads] * (3 * heads))
        # pnnx would lay a constant bias out in the file
        nothing = 0 * x[:, :1, :1, :1]
        outs = []
        for head, table in enumerate(self.relative_position_bias):
            # [C / heads, (w w), (rows columns)] -> [(rows columns), (w w), C / heads]
            q, k, v = (piece.permute(2, 1, 0) for piece in pieces[head::heads])
            # Bias slides backwards with the query (`expand_position_bias`): with keys in reverse, forwards.
            k, v = k.flip(1), v.flip(1)
            reverse = table.flip(0).view(1, 1, 2 * w - 1, 2 * w - 1)
            bias = F.unfold(reverse + nothing, w).transpose(1, 2)
            outs.append(F.scaled_dot_product_attention(q, k, v, bias).permute(2, 1, 0))
        out = F.pixel_shuffle(torch.cat(outs).reshape(1, dim * w * w, rows, columns), w)
        return self.to_out(out[:, :, :height, :width])


class _LargeKernelConv(LargeKernelConv):
    def forward(self, x: Tensor, large_kernel: Tensor) -> Tensor:
        """Convolve with both kernels and add."""
        out = F.conv2d(x, large_kernel, padding=large_kernel.shape[-1] // 2)
        return out if self.dwc_proj is None else out + _depthwise(x, self.dwc_proj, x)


class _SeparableLargeKernelConv(SeparableLargeKernelConv):
    def forward(self, x: Tensor, lk_channel: Tensor, lk_spatial: Tensor) -> Tensor:
        """Mix channels, then convolve with the shared and the predicted kernel apart."""
        mixed = F.conv2d(x, lk_channel)
        shared = F.conv2d(mixed, lk_spatial, padding=lk_spatial.shape[-1] // 2, groups=len(lk_spatial))
        return shared + _depthwise(mixed, self.proj, x)


class _ReflectingConv2d(ReflectingConv2d):
    def forward(self, x: Tensor) -> Tensor:
        """Reflect, then convolve."""
        return nn.Conv2d.forward(self, _reflect(x, self.border, self.border))


class _ESCRealM(ESCRealM):
    def forward(self, x: Tensor) -> Tensor:
        """Restore and upscale an image, padded beforehand."""
        height, width = (side * self.upscaling_factor for side in x.shape[-2:])
        return super().forward(_pad_to_multiple(x, self.unshuffle))[:, :, :height, :width]


_LAYERS: Layers = {
    WindowAttention: _WindowAttention,
    LargeKernelConv: _LargeKernelConv,
    SeparableLargeKernelConv: _SeparableLargeKernelConv,
    ReflectingConv2d: _ReflectingConv2d,
    ESCRealM: _ESCRealM,
}


def _depthwise(x: Tensor, predictor: KernelPredictor, source: Tensor) -> Tensor:
    """Convolve an image's channels, each by a kernel that is predicted from ``source``."""
    kernels = predictor(source)
    size = kernels.shape[-1]
    return F.conv2d(x, kernels.reshape(-1, 1, size, size), padding=size // 2, groups=x.shape[1])


def _pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Do as `archs.layers.pad_to_multiple` does."""
    height, width = ((side + multiple - 1) // multiple * multiple for side in x.shape[-2:])
    return _reflect(x, 0, multiple - 1)[:, :, :height, :width]


def _reflect(x: Tensor, before: int, after: int) -> Tensor:
    """Reflect both axes, at whatever size, by so many pixels ahead of the first and behind the last."""
    for _ in "xy":
        x = _reflect_columns(x, before, after).transpose(2, 3)
    return x


def _reflect_columns(x: Tensor, before: int, after: int) -> Tensor:
    ones = 0 * x.transpose(2, 3)[:, :1, :, :1] + 1  # one for each column
    # Each side counts from itself: float16 counts to 2048, bfloat16 to 256, far beyond what is reflected.
    column = ones.cumsum(2) - 1
    period = (2 * ones.sum(2, keepdim=True) - 2).clamp(1, 2048)  # one column is repeated

    def border(column: Tensor, distance: Tensor) -> Tensor:
        """Give columns of ``x`` for distances, (n,), beyond the side that ``column`` counts from."""
        distance = distance.to(x.dtype).view(1, 1, 1, -1)
        distance = distance - (distance / period).floor() * period
        source = torch.minimum(distance, period - distance)
        return x @ (1 - (column - source).abs()).clamp(min=0)  # (width, n): one where column is source

    ahead = [border(column, torch.arange(before, 0, -1))] if before else []
    behind = [border(column.flip(2), torch.arange(1, after + 1))] if after else []
    return torch.cat([*ahead, x, *behind], dim=3)
