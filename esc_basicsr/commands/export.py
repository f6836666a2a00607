"""Write a trained network for other programs: ONNX, OpenVINO, ncnn, TorchScript, weights; or as a page.

The file takes any number of images (ncnn: one) of any size (batch×3×height×width, RGB in [0, 1]; from one
pixel, of no multiple, but for torch-export, which takes no single pixel), and float32 in and out, whatever
the precision inside. Before it gets its name it is run, on the CPU, and compared with the network at several
sizes.

  python -m esc_basicsr export ESC_x4.pth -o ESC_x4.onnx
  python -m esc_basicsr export ESC_x4.pth -o ESC_x4_fp16.onnx --precision fp16 --opset 20
  python -m esc_basicsr export ESC_x4.pth -o ESC_x4.xml
  python -m esc_basicsr export ESC_x4.pth -o ESC_x4.ncnn.param
  python -m esc_basicsr export ESC_x4.pth -o ESC_x4.pt --time 180x320

OpenVINO and ncnn have two files: OUT, the graph, and its weights beside it, of the same name and the ending
.bin. Packages come with the extras: pip install 'esc-basicsr[onnx]', '...[openvino]', '...[ncnn]'.

Not converted: DySample to ONNX, OpenVINO (no GridSample is written) and ncnn (no layer for its positions);
unshuffle_mod at scales 1 and 2 to ONNX and OpenVINO. TorchScript takes all.

--format web writes a folder for any web server: a page on which the network runs in the visitor's browser, by
onnxruntime-web, whose npm package is copied from. It needs, and takes, what ONNX does.

  npm install onnxruntime-web@1.30.0
  python -m esc_basicsr export ESC-light_x2 -o page --format web
"""

import argparse
import contextlib
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esc_basicsr import fast
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import make_folder_of, written_whole
from esc_basicsr.common.tables import markdown_table, milliseconds, scientific
from esc_basicsr.common.timing import median_times
from esc_basicsr.export import DEFAULT_OPSET, OPSETS, torch_formats
from esc_basicsr.export.description import describe
from esc_basicsr.export.verification import TOLERANCES, verify
from esc_basicsr.web.static_page import find_runtime, write_page
from esc_basicsr.weights.shipped import TrainedNetwork, load_network, model_list

Run = Callable[[Tensor], Tensor]

# format -> endings of its files' names, by the first of which it is told
_ENDINGS = {
    "onnx": (".onnx",),
    "openvino": (".xml", ".bin"),
    "ncnn": (".param", ".bin"),
    "torchscript": (".pt",),
    "torch-export": (".pt2",),
    "safetensors": (".safetensors",),
}
_PAGE = "web"  # a folder: ONNX, and what shows and runs it
_ONNX = ("onnx", _PAGE)
# what runs a file, where that is not called as its format
_RUNTIMES = {"onnx": "ONNX Runtime", _PAGE: "ONNX Runtime", "openvino": "OpenVINO"}
_REPEATS = 5
# of a network that has no windows
_WINDOW = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    names = ", ".join(model_list())
    parser.add_argument(
        "model", metavar="MODEL", help=f"checkpoint (.pth, .safetensors), or a name ({names})"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="the file (web: folder) to write"
    )
    endings = ", ".join(f"{ending[0]}: {name}" for name, ending in _ENDINGS.items())
    parser.add_argument("--format", choices=[*_ENDINGS, _PAGE], help=f"default: by OUT's ending ({endings})")
    parser.add_argument(
        "--runtime",
        type=Path,
        default=Path("node_modules", "onnxruntime-web"),
        metavar="FOLDER",
        help="of web: the npm package onnxruntime-web (default: %(default)s)",
    )
    tolerances = ", ".join(f"{name} {value:g}" for name, value in TOLERANCES.items())
    parser.add_argument(
        "--precision",
        choices=[*TOLERANCES],
        default="fp32",
        help="of weights and features (default: fp32). What differs from the network by more is not written, "
        f"for outputs up to 1: {tolerances}",
    )
    parser.add_argument(
        "--opset",
        type=int,
        choices=OPSETS,
        metavar="N",
        help=f"of ONNX, {OPSETS[0]} to {OPSETS[-1]} (default: {DEFAULT_OPSET})",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--time",
        metavar="HxW",
        help=f"then time it on the CPU for one image of this size, such as 180x320, in turn with the network "
        f"itself: medians of {_REPEATS}",
    )


def run(args: argparse.Namespace) -> int:
    """Write the file, once what is to be in it has been found to give what the network gives."""
    kind = _format(args)
    size = _size_to_time(args.time)
    paths = [args.output, *(args.output.with_suffix(ending) for ending in _ENDINGS.get(kind, ())[1:])]
    for path in paths:
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} exists. Add --overwrite to replace it, or give another name.")
    if kind == _PAGE:
        find_runtime(args.runtime)
    make_folder_of(args.output)
    opset = args.opset or DEFAULT_OPSET
    write, read = _writer_and_reader(kind, opset)  # what is missing is told before the work
    trained = load_network(args.model)
    if kind == "ncnn":
        print("pnnx converts the network, which takes minutes.")
    content = write(trained.network, args.precision == "fp16", describe(trained, args.precision))
    exported = read(content)
    window = int(trained.options.get("window_size", _WINDOW))
    for shape, difference, allowed in verify(trained.network, exported, args.precision, window):
        print(f"{shape:>12}: differs by {difference:.1e} at most ({allowed:.1e} allowed)")
    parts = content if isinstance(content, tuple) else (content,)
    if kind == _PAGE:
        write_page(args.output, content, trained, args.runtime)
    else:
        with contextlib.ExitStack() as files:
            for path, part in zip(paths, parts, strict=True):
                files.enter_context(written_whole(path)).write(part)
    what = f"{trained.variant or trained.options['type']} ×{trained.scale}, {kind}, {args.precision}"
    with_opset = f", opset {opset}" if kind in _ONNX else ""
    print(f"{', '.join(map(str, paths))}: {what}{with_opset}, {sum(map(len, parts)) / 1e6:.1f} MB")
    if size is not None:
        _time(trained, exported, _RUNTIMES.get(kind, kind), size)
    return 0


def _format(args: argparse.Namespace) -> str:
    by_ending = {endings[0]: name for name, endings in _ENDINGS.items()}
    told = by_ending.get(args.output.suffix.lower())
    kind = args.format or told
    if told not in (None, kind):
        raise UserError(
            f"--format {kind} contradicts the name {args.output}: leave it out, or give another name."
        )
    if kind is None:
        raise UserError(
            f"{args.output}: its ending tells no format. Give --format, or one of {', '.join(by_ending)}."
        )
    if args.opset is not None and kind not in _ONNX:
        raise UserError(f"--opset is ONNX's, and {args.output} is to be {kind}: leave it out.")
    if args.time is not None and kind == "safetensors":
        raise UserError("--time: a .safetensors file holds weights, nothing that runs. Leave it out.")
    return str(kind)


def _size_to_time(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", text)
    if match is None:
        raise UserError(f"--time {text}: expected height and width of an image to upscale, such as 180x320.")
    return int(match[1]), int(match[2])


def _writer_and_reader(kind: str, opset: int) -> tuple[Callable[..., Any], Callable[[Any], Run]]:
    """Find what writes a format, given the network, whether in half precision, and metadata; and reads it.

    What is written, and read, is the content of the format's file; of its files where there are several.
    """
    match kind:
        case "onnx" | "web":
            from esc_basicsr.export.onnx_network import read_onnx, write_onnx

            return functools.partial(write_onnx, opset=opset), read_onnx
        case "openvino":
            from esc_basicsr.export.openvino_network import read_openvino, write_openvino

            return write_openvino, read_openvino
        case "ncnn":
            from esc_basicsr.export.ncnn_network import read_ncnn, write_ncnn

            return write_ncnn, read_ncnn
        case "torchscript":
            return torch_formats.write_torchscript, torch_formats.read_torchscript
        case "torch-export":
            return torch_formats.write_exported, torch_formats.read_exported
    return torch_formats.write_weights, torch_formats.read_weights


def _time(trained: TrainedNetwork, exported: Run, runtime: str, size: tuple[int, int]) -> None:
    """Print a table of what runs it, how long it takes, and how far the results are apart."""
    lr = torch.rand((1, 3, *size), generator=torch.Generator().manual_seed(0))
    runs: dict[str, Run] = {"esc_basicsr": fast.prepare(trained.network), runtime: exported}
    try:
        runs["esc_basicsr, C++ kernels"] = fast.prepare(trained.network, kernels=True)
    except UserError as error:
        print(f"without the C++ kernels: {error}")
    with torch.inference_mode():
        calls = {name: functools.partial(run, lr) for name, run in runs.items()}
        seconds = median_times(calls, _REPEATS, warmup=1, device=lr.device)
        outputs = {name: run(lr) for name, run in runs.items()}
    own = "esc_basicsr"
    print(f"\n1×3×{size[0]}×{size[1]}, CPU, {torch.get_num_threads()} threads, medians of {_REPEATS}\n")
    rows = [
        [
            *(name, milliseconds(value), f"{value / seconds[own]:.2f}"),
            scientific(float((outputs[name] - outputs[own]).abs().max())),
        ]
        for name, value in seconds.items()
    ]
    print(markdown_table(["runs by", "time", "ratio", "largest difference"], rows))
