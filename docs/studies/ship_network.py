"""Put a trained network among those that ship with this package, with what it was measured to reach.

  python -m esc_basicsr export NET.pth -o ESC-light_x2.safetensors --precision fp16
  python -m esc_basicsr test -opt TEST.yml --force_yml path:pretrain_network_g=ESC-light_x2.safetensors
  python docs/studies/ship_network.py ESC-light_x2.safetensors --results results/NAME/results.csv ...

The figures are those of the file that ships: its name is the network's, and the results must be of it. In a
checkout of the repository; what it writes there is to be committed. Networks are listed as they come: the
first of a scale is the default one.
"""

import argparse
import csv
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import written_whole
from esc_basicsr.weights import shipped
from esc_basicsr.weights.read import is_safetensors
from esc_basicsr.weights.shipped import ListedModel, load_network, model_list

_FOLDER = shipped._FOLDER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("file", type=Path, help="weights, as 'export --precision fp16' writes them")
    parser.add_argument("--results", type=Path, required=True, help="results.csv of a test with this file")
    parser.add_argument("--data", required=True, help="what it was trained on, and for how long")
    parser.add_argument("--licence", required=True, help="of the weights")


def run(args: argparse.Namespace) -> int:
    """Copy the file into the package, and list it."""
    name = args.file.stem
    if not is_safetensors(args.file):
        raise UserError(f"{args.file} is no .safetensors file: write one with 'export'.")
    trained = load_network(args.file)
    if trained.variant is None:
        raise UserError(f"{args.file} is none of the published variants, which alone ship.")
    content = args.file.read_bytes()
    listed = ListedModel(
        file=args.file.name,
        sha256=hashlib.sha256(content).hexdigest(),
        variant=trained.variant,
        scale=trained.scale,
        psnr=_measured_psnr(args.results),
        data=args.data,
        licence=args.licence,
    )
    entries = {**{key: asdict(value) for key, value in model_list().items()}, name: asdict(listed)}
    with written_whole(_FOLDER / listed.file) as file:
        file.write(content)
    with written_whole(_FOLDER / "models.json") as file:
        file.write((json.dumps(entries, indent=1, ensure_ascii=False) + "\n").encode())
    figures = ", ".join(f"{key} {value:.2f} dB" for key, value in listed.psnr.items())
    print(f"{name} ships: {trained.variant} ×{trained.scale}, {len(content) / 2**20:.1f} MiB; {figures}.")
    return 0


def _measured_psnr(path: Path) -> dict[str, float]:
    """PSNR by test set, as a test run wrote it down."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("figures_from") == "measured"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table: {error}.") from error
    if len(rows) != 1:
        raise UserError(f"{path}: expected the results of one test, found {len(rows)} that were measured.")
    figures = {
        key.removesuffix(" psnr"): round(float(value), 4)
        for row in rows
        for key, value in row.items()
        if key.endswith(" psnr") and value
    }
    if not figures:
        raise UserError(f"{path} has no PSNR that was measured: give the results.csv of a test.")
    return figures


if __name__ == "__main__":
    sys.exit(run_command("ship_network", sys.argv[1:], prog="python docs/studies/ship_network.py"))
