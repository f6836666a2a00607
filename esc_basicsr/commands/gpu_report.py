"""Measure what a GPU answers, in one call: correctness, inference, training, window attention, scaling.

It needs PyTorch with Triton, and NumPy, PyYAML, filelock, psutil, tqdm and wrapt, but not BasicSR. Parts come
in the order of their worth, and each result is written as soon as it is known: gpu-report.json has every
figure, gpu-report.md the page, targets first. The same command goes on where it was ended, by --minutes or by
force. It tries again what failed, and says how many cases that were.

  python -m esc_basicsr gpu-report -o DIR --minutes 20
  python -m esc_basicsr gpu-report -o DIR --rehearse         all of it on the CPU, at tiny sizes
"""

import argparse
from pathlib import Path

import torch

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import check_writable
from esc_basicsr.lab.gpu_report.cases import ON_GPU, REHEARSAL
from esc_basicsr.lab.gpu_report.run import PAGE, run_report
from esc_basicsr.lab.measure.measure import device_to_measure_on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="after which nothing more is begun (default: 20)"
    )
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, at tiny sizes")


def run(args: argparse.Namespace) -> int:
    """Measure what the report lacks, and say what is left."""
    if not args.minutes > 0:
        raise UserError(f"--minutes must be above 0, got {args.minutes}.")
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError(
            "this machine has no GPU that PyTorch can use. --rehearse runs everything on the CPU, tiny."
        )
    plan = REHEARSAL if args.rehearse else ON_GPU
    device_to_measure_on(plan.device)
    check_writable(args.output)
    left, failed = run_report(args.output, plan, args.minutes)
    rest = f"; {left} cases are left, the same command goes on" if left else ""
    print(f"{args.output / PAGE} is written; {failed} cases failed or found something wrong{rest}.")
    return 0
