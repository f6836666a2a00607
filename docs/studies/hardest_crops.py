"""Keep the hardest crops of LMDBs for training: those that bicubic enlargement misses most.

    python docs/studies/hardest_crops.py HR_sub.lmdb LR_bicubic_X2_sub.lmdb LR_bicubic_X4_sub.lmdb --keep 0.5

Difficulty is the mean absolute difference of luma between HR and the first LR set, enlarged. The images stay
in the LMDBs; their meta_info.txt lists, which alone say what is trained on, are shortened. Another run
shortens them further; 'lmdb --overwrite' makes them anew.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import written_whole
from esc_basicsr.data.lmdb_reader import ImageLMDB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "lmdb", type=Path, nargs="+", help="HR, then LR: made together, by one 'lmdb' command"
    )
    parser.add_argument("--keep", type=float, default=0.5, help="share of the crops (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure every crop, and list the hardest."""
    if len(args.lmdb) < 2 or not 0 < args.keep <= 1:
        raise UserError("give an HR set and its LR sets, and a share above 0 and at most 1.")
    sets = [ImageLMDB(folder) for folder in args.lmdb]
    if any(other.keys != sets[0].keys for other in sets):
        raise UserError("the sets hold different images: give those that one 'lmdb' command made.")
    difficulty = [_difficulty(sets[0], sets[1], index) for index in tqdm(range(len(sets[0])), "crops")]
    kept = sorted(np.argsort(difficulty)[len(difficulty) - max(round(args.keep * len(difficulty)), 1) :])
    with contextlib.ExitStack() as files:  # all are replaced together, at the end
        for folder in args.lmdb:
            lines = (folder / "meta_info.txt").read_bytes().splitlines(keepends=True)
            file = files.enter_context(written_whole(folder / "meta_info.txt"))
            file.writelines(lines[index] for index in kept)
    print(f"{len(kept)} of {len(difficulty)} crops are left.")
    return 0


def _difficulty(hr: ImageLMDB, lr: ImageLMDB, index: int) -> float:
    truth, small = (cv2.cvtColor(part.read(index), cv2.COLOR_BGR2GRAY) for part in (hr, lr))
    enlarged = cv2.resize(small, truth.shape[::-1], interpolation=cv2.INTER_CUBIC)
    return float(cv2.absdiff(enlarged, truth).mean())


if __name__ == "__main__":
    sys.exit(run_command("hardest_crops", sys.argv[1:], prog="python docs/studies/hardest_crops.py"))
