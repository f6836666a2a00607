"""The limit of memory that a study's measurements may take."""

import argparse

import torch

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.memory import available_memory


def add_memory_limit_argument(parser: argparse.ArgumentParser) -> None:
    """Declare ``--memory-limit``, see `memory_limit`."""
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GIB",
        help="leave out what would take more memory than this (default: 0.8 of what is free)",
    )


def memory_limit(args: argparse.Namespace, device: torch.device) -> float:
    """Return the bytes that one forward pass may take.

    Raises:
        UserError: The limit that was given is not positive.
    """
    if args.memory_limit is None:
        return 0.8 * available_memory(device)
    if not args.memory_limit > 0:
        raise UserError(f"--memory-limit must be above 0, got {args.memory_limit}.")
    return float(args.memory_limit * 2**30)
