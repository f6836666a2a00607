"""Measure latency, peak memory, multiply-adds and parameters of networks, in turn, in one run.

By the field's convention: one image, 1280×720 output, warm-up, median of several runs. CUDA is timed by
events, in strict float32 (no TF32) unless a precision is asked for, and its memory is that of PyTorch's
allocator; a CPU's is read from the operating system, Linux or macOS, in a fresh process.

  python -m esc_basicsr bench                                        ESC against the release's implementation
  python -m esc_basicsr bench --network ESC:release ESC ESC:kernels --scale 2 3 4 -o DIR
  python -m esc_basicsr bench --network ESC MSRResNet spandrel.DAT weights.pth options.yml

A network is a published variant (ESC, ESC-light, ESC-FP); the same with ':plain' (as the paper writes
it), ':release' (as the authors released it, with naive attention), ':release-flex' (the same, its
attention by compiled Flex), ':kernels' (ours by kernels: C++ for float32 on a CPU, Triton's on CUDA),
':kernels-bf16' (ours by C++ kernels, within autocast to bfloat16), ':graphs' (the kernels, on CUDA
replayed from a graph), ':compiled' (ours by torch.compile), ':onnxruntime', ':openvino' or
':openvino-bf16' (the ONNX file that `export` writes, in these runtimes on the CPU, OpenVINO for the
input's size alone); a baseline of the paper's (SwinIR-light, RCAN, HiT-SRF, MambaIRv2-light, ATD-light,
OmniSR); a network of BasicSR's registry, with options where it needs some
('EDSR,num_in_ch=3,num_out_ch=3'); one of spandrel's architectures (spandrel.DAT); a YAML file with a
network_g section; each of these with ',weights=FILE' if it is to be a trained one; a checkpoint of ESC,
or one that spandrel reads; or a TorchScript file whose code you trust to run, as torchscript:FILE.
Implementations of a variant share their weights, and their outputs and figures are compared with those of
the first of them at that scale. A network with a scale of its own, as a checkpoint has, is measured at
that scale, whatever --scale says.

An option that is the scale (upscale, scale and the like) is filled in. Weights are random, except those
of files. spandrel comes with the extra esc-basicsr[lab], ONNX Runtime with esc-basicsr[onnx], OpenVINO
with esc-basicsr[openvino].
"""

import argparse

from esc_basicsr.archs.variants import SCALES
from esc_basicsr.common.errors import UserError
from esc_basicsr.fast.precision import PRECISIONS
from esc_basicsr.lab.measure.benchmark import Row, draw, markdown, measure, random_image
from esc_basicsr.lab.measure.complexity import OUTPUT_HEIGHT, OUTPUT_WIDTH
from esc_basicsr.lab.measure.measure import add_measuring_arguments, check_measuring_arguments
from esc_basicsr.lab.measure.results import make_folder, publish
from esc_basicsr.lab.networks.by_name import check_implementations, scale_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--network",
        nargs="+",
        default=["ESC:release", "ESC"],
        help="what to measure (default: ESC:release ESC)",
    )
    parser.add_argument(
        "--scale", type=int, nargs="+", choices=SCALES, default=[4], help="upscaling factors (default: 4)"
    )
    parser.add_argument(
        "--input-size", type=int, nargs=2, metavar=("H", "W"), help="default: for 1280×720 output"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="half precision is compared with float32 too (default: fp32)",
    )
    add_measuring_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print a Markdown table, and write it down where asked."""
    device, dtype = check_measuring_arguments(args), PRECISIONS[args.precision]
    if args.input_size is not None and min(args.input_size) < 1:
        raise UserError(f"--input-size must be at least 1 1, got {' '.join(map(str, args.input_size))}.")
    check_implementations(args.network, device, dtype)
    cases: dict[int, list[str]] = {}
    for scale in args.scale:
        for name in args.network:
            names = cases.setdefault(scale_of(name, scale), [])
            if name not in names:
                names.append(name)
    make_folder(args.output)
    rows: list[Row] = []
    for scale, names in cases.items():
        height, width = args.input_size or (OUTPUT_HEIGHT // scale, OUTPUT_WIDTH // scale)
        lq = random_image(height, width, device).to(dtype)
        rows += measure(names, scale, lq, args.repeats, args.warmup)
    settings = {"precision": args.precision, "repeats": args.repeats, "warmup": args.warmup}
    publish(args.output, "bench", markdown(rows), settings, rows, device, lambda: draw(rows))
    return 0
