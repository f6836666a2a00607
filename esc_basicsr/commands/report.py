"""Draw up experiments as one HTML page: curves, best metrics, images, settings that differ.

The page needs no network and no other file. It shows what exists of train_*.log, metrics/*.csv, and beside
experiments/ the folder tb_logger/ with TensorBoard's events, where the images are. A curve has 1,000 points
at most (means of equal groups where there are more), and all images together take 24 MiB at most.

For example:
  python -m esc_basicsr report experiments/ESC_x2_DIV2K -o report.html
  python -m esc_basicsr report experiments/* -o all.html --overwrite
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.metrics.result_files import write_text
from esc_basicsr.report.experiment import Experiment, read_experiment
from esc_basicsr.report.render import render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "experiments",
        type=Path,
        nargs="+",
        metavar="EXPERIMENT",
        help="an experiment's folder, experiments/NAME; the first ones are drawn first",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the page to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the page if it exists")


def run(args: argparse.Namespace) -> int:
    """Write the page and return 0."""
    output: Path = args.output
    if output.is_dir():
        raise UserError(f"{output} is a folder; expected a file to write, such as {output / 'report.html'}.")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists: name another file, or add --overwrite.")
    page, skipped = render(read_experiments(args.experiments))
    write_text(output, page)
    print(f"{output}: {output.stat().st_size:,} bytes. Open it in a browser.")
    if skipped:
        print(f"{skipped} older comparison images were skipped to keep it small.")
    return 0


def read_experiments(folders: Sequence[Path]) -> list[Experiment]:
    """Read experiments, each once; those of one name are named by their paths.

    Among several a folder that cannot be read as one, as experiments/* may hold, is skipped with a warning.

    Raises:
        UserError: No folder is an experiment's that can be read.
    """
    experiments: dict[Path, Experiment] = {}
    errors = []
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        try:
            experiments[folder] = read_experiment(folder)
        except UserError as error:
            errors.append(str(error))
    if not experiments:
        raise UserError("\n  ".join(errors))
    for reason in errors:
        logger.warning("Skipped: %s", reason)
    names = Counter(experiment.name for experiment in experiments.values())
    return [
        experiment if names[experiment.name] == 1 else replace(experiment, name=str(folder))
        for folder, experiment in experiments.items()
    ]
