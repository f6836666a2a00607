"""ESC networks as ONNX models of standard operators, for any batch, height and width.

They are written operator by operator, so that what a runtime gets depends on no version of a tracer: sizes
are computed in the graph, convolutions with nothing between them are one, and attention goes head by head,
which bounds its memory to one head's scores.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn as nn
from onnx import TensorProto, helper
from torch import Tensor

from esc_basicsr.archs import ESC, ESCFP
from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.archs.block import ESCBlock
from esc_basicsr.archs.conv_attention import (
    DYNAMIC_KERNEL_SIZE,
    AttentionMixer,
    ConvAttention,
    LargeKernelConv,
    SeparableLargeKernelConv,
    UnsharedConvAttention,
    average_over_symmetries,
)
from esc_basicsr.archs.esc_real_arch import ESCRealM, ReflectingConv2d
from esc_basicsr.archs.layers import ConvFFN, matrix_and_bias
from esc_basicsr.archs.upsamplers import DySample
from esc_basicsr.common.errors import UserError
from esc_basicsr.export import DEFAULT_OPSET
from esc_basicsr.export.onnx_graph import Graph

# What a network hands to its mixers: ESC's kernel, ESC-FP's two filters, or nothing.
LargeKernel = tuple[Tensor, ...]

# names of the model's input and output
INPUT, OUTPUT = "lr", "sr"

# Slice's end that means "up to the end"
_END = int(np.iinfo(np.int64).max)


def write_onnx(
    network: nn.Module, half: bool, metadata: Mapping[str, str], opset: int = DEFAULT_OPSET
) -> bytes:
    """Write a network as an ONNX file, of operators of the domain ai.onnx alone.

    Its input ``lr`` is (batch, 3, height, width), float32, RGB in [0, 1], any sizes >= 1; its output ``sr``
    is (batch, 3, height·scale, width·scale), float32, not clamped.

    Args:
        network: An `ESC`, `ESCFP`, or `ESCRealM` without unshuffling and DySample; not changed.
        half: Whether weights and features are float16. Input and output, and the upscaled input that the
            network adds its result to, are float32 all the same.
        metadata: What the model says of itself, by key.
        opset: Version of ai.onnx, 17 or newer.

    Raises:
        UserError: It is another network, or the installed package onnx does not know the opset.
    """
    if not isinstance(network, ESC | ESCFP | ESCRealM):
        raise UserError(
            f"{type(network).__name__} cannot be written as ONNX, which is for ESC, ESC-FP and ESC-RealM."
        )
    unconverted = isinstance(network, ESCRealM) and _without_conversion(network)
    if unconverted:
        raise UserError(
            f"{type(network).__name__} with {unconverted} cannot be written as ONNX: write TorchScript, "
            "by an OUT that ends in .pt."
        )
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise UserError(
            f"--opset {opset}: the installed onnx {onnx.__version__} knows {newest} at most; update it, or "
            "choose an older one."
        )
    scale = network.upscaling_factor
    graph = Graph(np.float16 if half else np.float32)
    _Writer(graph, network).write()
    upscaled: list[str | int | None] = ["batch", 3, f"height*{scale}", f"width*{scale}"]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            type(network).__name__,
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, "height", "width"])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, upscaled)],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        producer_name="esc_basicsr",
    )
    # the oldest format that has these operators: older runtimes read it
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


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


def _without_conversion(network: ESCRealM) -> str | None:
    if network.unshuffle > 1:
        return "unshuffle_mod at scale 1 or 2"
    return "dysample" if any(isinstance(layer, DySample) for layer in network.modules()) else None


class _Grid(NamedTuple):
    """Names of vectors of int64 that say how windows lie on a map.

    Attributes:
        batch: Images.
        rows: Windows below one another.
        columns: Windows beside one another.
        row_index: Rows to read, reflected at the bottom until they fill windows.
        column_index: The same of columns.
        sides: (height, width) of the map itself.
    """

    batch: str
    rows: str
    columns: str
    row_index: str
    column_index: str
    sides: str


class _Writer:
    """Writes a network into a graph, layer by layer; a map is (B, C, H, W) unless it is said otherwise."""

    def __init__(self, graph: Graph, network: ESC | ESCFP | ESCRealM) -> None:
        self.graph = graph
        self.network = network
        self._grids: dict[int, _Grid] = {}
        self._positions_in_table: dict[int, str] = {}

    def write(self) -> None:
        """Write the whole network, from INPUT to OUTPUT."""
        graph, network = self.graph, self.network
        is_half = graph.dtype == np.float16
        x = graph.add("Cast", INPUT, to=TensorProto.FLOAT16) if is_half else INPUT
        large_kernel: LargeKernel = ()
        if isinstance(network, ESCFP):
            large_kernel = network.lk_channel, network.lk_spatial
        elif network.plk_filter is not None:
            large_kernel = (average_over_symmetries(network.plk_filter),)
        feat = out = self._layer(x, network.proj)
        for block in network.blocks:
            assert isinstance(block, ESCBlock)
            out = self._block(out, block, large_kernel)
        if isinstance(network, ESCFP):
            out = self._norm(out, network.ln_last)
        out = graph.add("Add", self._conv(out, network.last), feat)
        if isinstance(network, ESCRealM):
            out = self._layer(graph.add("Add", out, self._layer(x, network.skip)), network.to_img)
            graph.add("Cast", out, output=OUTPUT, to=TensorProto.FLOAT)
            return
        out = self._conv(out, network.to_img)
        out = graph.add("DepthToSpace", out, blocksize=network.upscaling_factor, mode="CRD")
        if is_half:
            out = graph.add("Cast", out, to=TensorProto.FLOAT)
        graph.add("Add", out, self._upscaled_input(), output=OUTPUT)

    def _layer(self, x: str, layer: nn.Module) -> str:
        """Write a layer of ESCReal's skip or upsampler."""
        graph = self.graph
        match layer:
            case nn.Sequential():
                for each in layer:
                    x = self._layer(x, each)
                return x
            case ReflectingConv2d():
                for axis in (2, 3):
                    x = graph.add("Gather", x, self._reflected_border(axis, layer.border), axis=axis)
                return self._convolve(x, layer.weight, layer.bias, layer.groups, border=0)
            case nn.Conv2d():
                return self._conv(x, layer)
            case nn.ConvTranspose2d():
                assert layer.bias is not None
                pads, strides = [*layer.padding] * 2, [*layer.stride]
                return graph.add("ConvTranspose", x, layer.weight, layer.bias, pads=pads, strides=strides)
            case nn.Upsample():
                return self._repeat_pixels(x, int(cast(float, layer.scale_factor)))
            case nn.PixelShuffle():
                return graph.add("DepthToSpace", x, blocksize=layer.upscale_factor, mode="CRD")
            case nn.GELU():
                return self._gelu(x)
            case _:
                assert isinstance(layer, nn.LeakyReLU)
                return graph.add("LeakyRelu", x, alpha=layer.negative_slope)

    def _repeat_pixels(self, x: str, scale: int) -> str:
        """Upscale by nearest neighbour."""
        return self._resize(x, scale, "nearest", "asymmetric", nearest_mode="floor")

    def _resize(self, x: str, scale: int, mode: str, coordinates: str, **how: Any) -> str:
        scales = np.array([1, 1, scale, scale], np.float32)
        how |= {"mode": mode, "coordinate_transformation_mode": coordinates}
        return self.graph.add("Resize", x, "", scales, **how)

    def _reflected_border(self, axis: int, border: int) -> str:
        """Index an axis of the input, with a border reflected at both ends."""
        graph = self.graph
        side = graph.add("Gather", graph.add("Shape", INPUT), axis, axis=0)
        position = graph.add("Range", -border, graph.add("Add", side, border), 1)
        return self._there_and_back(position, side)

    def _there_and_back(self, position: str, side: str) -> str:
        """Fold positions into 0, 1, ..., side - 1, ..., 1, 0, 1, ...; a side of one pixel repeats it."""
        graph = self.graph
        period = graph.add("Mul", graph.add("Sub", side, 1), 2)
        position = graph.add("Mod", position, graph.add("Max", period, 1))
        return graph.add("Min", position, graph.add("Sub", period, position))

    def _upscaled_input(self) -> str:
        """Upscale INPUT by nearest neighbour (ESC) or by PyTorch's bicubic interpolation (ESC-FP)."""
        scale = self.network.upscaling_factor
        if not isinstance(self.network, ESCFP):
            return self._repeat_pixels(INPUT, scale)
        return self._resize(INPUT, scale, "cubic", "half_pixel", cubic_coeff_a=-0.75)

    def _block(self, x: str, block: ESCBlock, large_kernel: LargeKernel) -> str:
        y = self._conv_ffn(self._norm(x, block.ln_proj), block.proj)
        if block.attn is not None and block.ln_attn is not None:
            y = self._add_attention(y, block.ln_attn, y, block.attn)
        for norm, convffn, mixer in zip(block.lns, block.convffns, block.pconvs, strict=True):
            assert isinstance(convffn, ConvFFN)
            normalised = self._norm(y, norm)
            if isinstance(mixer, AttentionMixer):
                source = self._conv_ffn(normalised, convffn)
                y = self._add_attention(y, mixer.norm, source, mixer.attn)
            else:
                assert isinstance(mixer, ConvAttention)
                y = self._add_conv_attention(y, normalised, convffn, mixer, large_kernel)
        return self.graph.add("Add", self._conv(self._norm(y, block.ln_out), block.conv_out), x)

    def _conv(self, x: str, conv: nn.Conv2d) -> str:
        return self._convolve(x, conv.weight, conv.bias, conv.groups)

    def _convolve(
        self, x: str, weight: Tensor, bias: Tensor | None = None, groups: int = 1, border: int | None = None
    ) -> str:
        """Convolve with a border of zeros; by default that which keeps the size."""
        constants = [tensor for tensor in (weight, bias) if tensor is not None]
        size = weight.shape[-1]
        pads = [size // 2 if border is None else border] * 4
        return self.graph.add("Conv", x, *constants, kernel_shape=[size] * 2, pads=pads, group=groups)

    def _norm(self, x: str, norm: nn.Module) -> str:
        if isinstance(norm, nn.Identity):
            return x
        return self.graph.add("Transpose", self._norm_channels_last(x, norm), perm=[0, 3, 1, 2])

    def _norm_channels_last(self, x: str, norm: nn.Module) -> str:
        assert isinstance(norm, nn.LayerNorm)
        x = self.graph.add("Transpose", x, perm=[0, 2, 3, 1])
        return self.graph.add("LayerNormalization", x, norm.weight, norm.bias, axis=-1, epsilon=norm.eps)

    def _gelu(self, x: str) -> str:
        """Write exact GELU in the form that runtimes recognise and fuse."""
        graph = self.graph
        erf = graph.add("Erf", graph.add("Div", x, math.sqrt(2)))
        return graph.add("Mul", graph.add("Mul", x, graph.add("Add", erf, 1.0)), 0.5)

    def _conv_ffn(self, x: str, convffn: ConvFFN) -> str:
        return self._conv(self._hidden(x, convffn), convffn.aggr)

    def _hidden(self, x: str, convffn: ConvFFN) -> str:
        """Compute what a ConvFFN makes of ``x`` before its last convolution."""
        x = self._gelu(self._conv(x, convffn.proj))
        return self.graph.add("Add", self._gelu(self._conv(x, convffn.dwc)), x)

    def _add_conv_attention(
        self, x: str, normalised: str, convffn: ConvFFN, mixer: ConvAttention, large_kernel: LargeKernel
    ) -> str:
        """Add ConvAttn of ``convffn(normalised)`` to ``x``."""
        if isinstance(mixer, UnsharedConvAttention):
            large_kernel = (average_over_symmetries(mixer.plk_filter),)
        pdim = mixer.pdim
        hidden = self._hidden(normalised, convffn)
        inner, inner_bias = (tensor.double() for tensor in matrix_and_bias(convffn.aggr))
        outer, outer_bias = (tensor.double() for tensor in matrix_and_bias(mixer.aggr))
        convolved = self._convolve(hidden, inner[:pdim, :, None, None], inner_bias[:pdim])
        convolved = self._large_and_dynamic_kernel(convolved, mixer.plk, large_kernel)
        # On the channels that are not convolved the ConvFFN's last convolution and ConvAttn's are one.
        weight = torch.cat((outer[:, :pdim], outer[:, pdim:] @ inner[pdim:]), dim=1)
        bias = outer_bias + outer[:, pdim:] @ inner_bias[pdim:]
        joined = self.graph.add("Concat", convolved, hidden, axis=1)
        return self.graph.add("Add", self._convolve(joined, weight[:, :, None, None], bias), x)

    def _large_and_dynamic_kernel(self, x: str, core: nn.Module, large_kernel: LargeKernel) -> str:
        """Write ConvAttn's core: the sum of the convolutions with the large and the predicted kernel."""
        if isinstance(core, LargeKernelConv):
            out = self._convolve(x, large_kernel[0])
            predictor, convolved = core.dwc_proj, x
        else:
            assert isinstance(core, SeparableLargeKernelConv)
            lk_channel, lk_spatial = large_kernel
            predictor, convolved = core.proj, self._convolve(x, lk_channel)
            out = self._convolve(convolved, lk_spatial, groups=len(lk_spatial))
        if predictor is None:
            return out
        _, reduce, _, expand = predictor
        assert isinstance(reduce, nn.Conv2d) and isinstance(expand, nn.Conv2d)
        pooled = self.graph.add("GlobalAveragePool", x)
        kernels = self._conv(self._gelu(self._conv(pooled, reduce)), expand)
        return self.graph.add("Add", out, self._depthwise_per_image(convolved, kernels))

    def _depthwise_per_image(self, x: str, kernels: str) -> str:
        """Convolve each channel of each image with a kernel of its own, (B, C·k², 1, 1).

        It is a sum of shifted maps: operators have no number of groups that depends on the batch.
        """
        graph, k = self.graph, DYNAMIC_KERNEL_SIZE
        border = k // 2
        padded = graph.add("Pad", x, [0, 0, border, border, 0, 0, border, border])
        kernels = graph.add("Reshape", kernels, [0, -1, 1, k * k])
        terms = []
        taps = graph.split(kernels, [1] * k * k, axis=3)
        for tap, (top, left) in zip(taps, np.ndindex(k, k), strict=True):
            ends = [start + 1 - k if start + 1 < k else _END for start in (top, left)]
            shifted = graph.add("Slice", padded, [top, left], ends, [2, 3])
            terms.append(graph.add("Mul", shifted, tap))
        return graph.add("Sum", *terms)

    def _add_attention(self, x: str, norm: nn.Module, source: str, layer: WindowAttention) -> str:
        """Add window attention over the normalised ``source`` to ``x``."""
        graph, w, heads = self.graph, layer.window_size, layer.num_heads
        dim = layer.to_out.out_channels
        grid, side = self._grid(w), [w]
        y = self._norm_channels_last(source, norm)
        y = graph.add("Gather", y, grid.row_index, axis=1)
        y = graph.add("Gather", y, grid.column_index, axis=2)
        # Queries are scaled beforehand, so that their products stay small in half precision, too.
        matrix, bias = matrix_and_bias(layer.to_qkv)
        scaling = bias.new_ones(3 * dim)
        scaling[:dim] = (dim // heads) ** -0.5
        y = self._linear(y, matrix * scaling[:, None], bias * scaling)
        # [B, (rows w), (columns w), 3C] -> [(B rows columns), (w w), 3C]
        shape = graph.add("Concat", grid.batch, grid.rows, side, grid.columns, side, [-1], axis=0)
        y = graph.add("Transpose", graph.add("Reshape", y, shape), perm=[0, 1, 3, 2, 4, 5])
        y = graph.add("Reshape", y, [-1, w * w, 3 * dim])
        outs = []
        # split in two steps: WebGPU lets an operator have ten inputs and outputs
        parts = [
            graph.split(part, [dim // heads] * heads, axis=2) for part in graph.split(y, [dim] * 3, axis=2)
        ]
        for q, k, v, table in zip(*parts, layer.relative_position_bias, strict=True):
            position_bias = graph.add("Gather", table, self._position_in_table(w), axis=0)
            scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 2, 1]))
            weights = graph.add("Softmax", graph.add("Add", scores, position_bias), axis=-1)
            outs.append(graph.add("MatMul", weights, v))
        y = self._linear(graph.add("Concat", *outs, axis=2), *matrix_and_bias(layer.to_out))
        # [(B rows columns), (w w), C] -> [B, C, (rows w), (columns w)]
        shape = graph.add("Concat", grid.batch, grid.rows, grid.columns, side, side, [-1], axis=0)
        y = graph.add("Transpose", graph.add("Reshape", y, shape), perm=[0, 5, 1, 3, 2, 4])
        sides = graph.add("Mul", graph.add("Concat", grid.rows, grid.columns, axis=0), side)
        y = graph.add("Reshape", y, graph.add("Concat", grid.batch, [dim], sides, axis=0))
        y = graph.add("Slice", y, [0, 0], grid.sides, [2, 3])
        return graph.add("Add", x, y)

    def _linear(self, x: str, matrix: Tensor, bias: Tensor) -> str:
        """Write a 1×1 convolution where channels come last."""
        return self.graph.add("Add", self.graph.add("MatMul", x, matrix.T), bias)

    def _grid(self, window_size: int) -> _Grid:
        """Compute, once in the graph, how windows of a side lie on the input."""
        if window_size in self._grids:
            return self._grids[window_size]
        graph, w = self.graph, [window_size]
        batch, _, height, width = graph.split(graph.add("Shape", INPUT), [1, 1, 1, 1], axis=0)

        def count_and_index(side: str) -> tuple[str, str]:
            count = graph.add("Div", graph.add("Add", side, [window_size - 1]), w)
            end = graph.add("Squeeze", graph.add("Mul", count, w), [0])
            position = graph.add("Range", 0, end, 1)
            return count, self._there_and_back(position, side)

        (rows, row_index), (columns, column_index) = count_and_index(height), count_and_index(width)
        sides = graph.add("Concat", height, width, axis=0)
        self._grids[window_size] = _Grid(batch, rows, columns, row_index, column_index, sides)
        return self._grids[window_size]

    def _position_in_table(self, window_size: int) -> str:
        """Index a head's table by query and key, (w², w²); see `expand_position_bias`.

        A difference of two short constants: the large array is in the runtime's memory, not in the file.
        """
        w = window_size
        if w not in self._positions_in_table:
            pixel = np.arange(w * w, dtype=np.int64)
            position = pixel // w * (2 * w - 1) + pixel % w
            of_key, of_query = position[None] + 2 * w * (w - 1), position[:, None]
            self._positions_in_table[w] = self.graph.add("Sub", of_key, of_query)
        return self._positions_in_table[w]
