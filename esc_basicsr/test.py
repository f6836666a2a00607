"""Measure a network on test sets, through BasicSR's own pipeline.

What it writes goes to results/NAME under the working directory; NAME is the option file's ``name``.

  python -m esc_basicsr.test -opt FILE
  torchrun --nproc_per_node=4 -m esc_basicsr.test -opt FILE --launcher pytorch
  srun python -m esc_basicsr.test -opt FILE --launcher slurm
"""

import argparse
import sys

from esc_basicsr.common.command_line import run_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from esc_basicsr.basicsr_host.parse import add_arguments as add

    add(parser, is_train=False)


def run(args: argparse.Namespace) -> int:
    """Run BasicSR's test_pipeline."""
    from esc_basicsr.basicsr_host import pipeline

    return pipeline.run(args, is_train=False)


if __name__ == "__main__":
    sys.exit(run_command("esc_basicsr.test", sys.argv[1:], prog="python -m esc_basicsr.test"))
