"""Train by an option file, through BasicSR's own pipeline.

What it writes goes to experiments/NAME and tb_logger/NAME under the working directory; NAME is the option
file's ``name``.

  python -m esc_basicsr.train -opt FILE
  torchrun --nproc_per_node=4 -m esc_basicsr.train -opt FILE --launcher pytorch
  srun python -m esc_basicsr.train -opt FILE --launcher slurm
"""

import argparse
import sys

# Spawned data workers import this module, when it is the main one: what is heavy waits.
from esc_basicsr.common.command_line import run_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from esc_basicsr.basicsr_host.parse import add_arguments as add

    add(parser, is_train=True)


def run(args: argparse.Namespace) -> int:
    """Run BasicSR's train_pipeline."""
    from esc_basicsr.basicsr_host import pipeline

    return pipeline.run(args, is_train=True)


if __name__ == "__main__":
    sys.exit(run_command("esc_basicsr.train", sys.argv[1:], prog="python -m esc_basicsr.train"))
