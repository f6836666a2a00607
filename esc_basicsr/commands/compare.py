"""The paper's table, measured here: ESC and the networks that it is compared with, or its ablation.

All networks take turns in one run: latency, peak memory, multiply-adds and parameters as 'bench' measures
them, each beside the paper's figure; with --data, PSNR and SSIM on Y of those whose weights are at hand.

  python -m esc_basicsr compare -o DIR
  python -m esc_basicsr compare --scale 4 --weights HiT-SRF_x4=HiT-SRF_x4.pth --data datasets -o DIR
  python -m esc_basicsr compare --ablation -o DIR
  python -m esc_basicsr compare --ablation --weights kernel9_x2=kernel9.pth --data datasets -o DIR

Ratios are to ESC of the same scale. The paper's latencies are of its authors' GPU: compare the ratios. ESC
is as this package computes it, HiT-SRF with its attention factored, MambaIRv2 by our scan; ESC:release is
as ESC's authors released it, on a CPU by naive attention; the others are as BasicSR and spandrel have them.
Baselines of spandrel need the extra esc-basicsr[lab]. Writes comparison.json, .csv, .md and .png (or
ablation.*).
"""

import argparse
import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from esc_basicsr.archs.variants import SCALES, VARIANTS
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.image_folder import read_rgb
from esc_basicsr.lab.measure.benchmark import measure, random_image
from esc_basicsr.lab.measure.comparison_table import RELEASE, Entry, draw, markdown, notes, table
from esc_basicsr.lab.measure.complexity import OUTPUT_HEIGHT, OUTPUT_WIDTH
from esc_basicsr.lab.measure.measure import add_measuring_arguments, check_measuring_arguments
from esc_basicsr.lab.measure.results import make_folder, write_results
from esc_basicsr.lab.networks.by_name import build_network, network_of
from esc_basicsr.lab.networks.selective_scan import implementation
from esc_basicsr.metrics.published import ABLATION_FIGURES, Costs, published_costs, published_figures
from esc_basicsr.metrics.quality import measure_quality, pairs_of_set
from esc_basicsr.metrics.result_files import write_csv, write_text
from esc_basicsr.options.baselines import BASELINES
from esc_basicsr.options.recipes import BENCHMARKS, ablation_rows, option_files
from esc_basicsr.weights.shipped import model_list

METHODS = [*VARIANTS, RELEASE, *BASELINES]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--network", nargs="+", choices=METHODS, help="default: all")
    parser.add_argument("--scale", type=int, nargs="+", choices=SCALES, help="default: 2 3 4")
    parser.add_argument("--ablation", action="store_true", help="the rows of the paper's ablation, at ×2")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="NETWORK_xS=FILE",
        help="trained weights; those that ship need not be named",
    )
    parser.add_argument(
        "--data", type=Path, help="folder with Set5, Set14 ... as 'benchmark-set' lays them out"
    )
    add_measuring_arguments(parser, repeats=3)


class Candidate(NamedTuple):
    """A network that is to be measured."""

    method: str  # what the paper calls it
    name: str  # what `build_network` knows it by
    published: Costs  # the paper's
    published_quality: Mapping[str, Mapping[str, float]]  # the paper's, on DIV2K; of the ablation, PSNR alone


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write it down where asked: after each scale, as they take long."""
    device = check_measuring_arguments(args)
    if args.ablation and (args.network or args.scale):
        raise UserError("--ablation takes no --network and no --scale: its rows are the paper's, at ×2.")
    args.network = args.network or METHODS
    args.scale = [2] if args.ablation else args.scale or list(SCALES)
    sets = _test_sets(args)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plan = {2: _ablation(folder)} if args.ablation else {s: _comparison(args, s) for s in args.scale}
        weights = _weights(args.weights, plan)
        make_folder(args.output)
        entries: list[Entry] = []
        missing: list[str] = []
        for scale, candidates in plan.items():
            entries += _measure(candidates, scale, weights, sets[scale], device, args)
            kept = {entry.method for entry in entries if entry.row.scale == scale}
            missing += [f"{one.method} ×{scale}" for one in candidates if one.method not in kept]
            text = f"{markdown(entries)}\n\n{notes(entries, missing, device)}"
            if args.output is not None:
                _write(args, device, entries, missing, text)
    print(text)
    return 0


def _write(
    args: argparse.Namespace, device: torch.device, entries: list[Entry], missing: list[str], text: str
) -> None:
    settings = {"repeats": args.repeats, "warmup": args.warmup}
    settings |= {"selective_scan": implementation(device), "skipped": [*missing]}
    rows = [
        {**entry.row._asdict(), "network": entry.method}
        | {key: value for key, value in entry._asdict().items() if key not in ("method", "row")}
        for entry in entries
    ]
    stem = "ablation" if args.ablation else "comparison"
    write_results(args.output, stem, text, settings, rows, device, lambda: draw(entries))
    write_csv(args.output / f"{stem}.csv", *table(entries))


# HR and LR files of a scale's test sets, by name
Sets = Mapping[str, Sequence[tuple[Path, Path]]]


def _test_sets(args: argparse.Namespace) -> dict[int, Sets]:
    """Find the test sets, by scale; all images are read once, before the measuring."""
    if args.data is None:
        if args.weights:
            raise UserError("--weights: PSNR is measured on test sets: give their folder by --data.")
        return {scale: {} for scale in args.scale}
    found: dict[int, Sets] = {}
    for scale in args.scale:
        sets = {name: pairs_of_set(args.data, name, scale) for name in BENCHMARKS}
        found[scale] = {name: pairs for name, pairs in sets.items() if pairs}
        if not found[scale]:
            raise UserError(
                f"--data {args.data}: none of {', '.join(BENCHMARKS)} exists at ×{scale}, as HR/X{scale} "
                f"and LR_bicubic/X{scale}; 'benchmark-set' makes them."
            )
        files = [file for pairs in sets.values() for pair in pairs for file in pair]
        for file in tqdm(files, desc=f"test sets, ×{scale}", unit="image", leave=False):
            read_rgb(file)  # a damaged one is reported now, not when hours went by
    return found


def _comparison(args: argparse.Namespace, scale: int) -> list[Candidate]:
    costs, figures = published_costs(scale), published_figures("DIV2K", scale)
    nothing = Costs(None, None, None, None)
    return [
        Candidate(method, method, costs.get(network_of(method), nothing), figures.get(network_of(method), {}))
        for method in args.network
    ]


def _ablation(folder: Path) -> list[Candidate]:
    """Build each row from the option file that ships for it, a copy of which goes into ``folder``."""
    texts = {path.name: text for path, text in option_files().items() if path.parts[0] == "train"}
    candidates = []
    for name, recipe in ablation_rows().items():
        file, figures = folder / f"{recipe.name}.yml", ABLATION_FIGURES[recipe.row]
        write_text(file, texts[file.name])
        costs = Costs(figures.milliseconds, None, None, None)
        quality = {"Set5": {"psnr": figures.set5}, "Urban100": {"psnr": figures.urban100}}
        candidates.append(Candidate(name, str(file), costs, quality))
    return candidates


def _weights(given: Sequence[str], plan: Mapping[int, Sequence[Candidate]]) -> dict[tuple[str, int], str]:
    """List trained weights by method and scale: those that ship, then the user's, which are tried."""
    found = {(listed.variant, listed.scale): name for name, listed in reversed(model_list().items())}
    measured = [(one, scale) for scale, candidates in plan.items() for one in candidates]
    known = {f"{one.method}_x{scale}": (one, scale) for one, scale in measured if one.method != RELEASE}
    for text in given:
        key, _, file = text.partition("=")
        if not file or key not in known:
            raise UserError(
                f"--weights {text}: expected NETWORK_xSCALE=FILE, of what is measured: {', '.join(known)}."
            )
        candidate, scale = known[key]
        build_network(f"{candidate.name},weights={file}", scale)
        found[candidate.method, scale] = file
    return found


def _measure(
    candidates: Sequence[Candidate],
    scale: int,
    weights: Mapping[tuple[str, int], str],
    sets: Sets,
    device: torch.device,
    args: argparse.Namespace,
) -> list[Entry]:
    lq = random_image(OUTPUT_HEIGHT // scale, OUTPUT_WIDTH // scale, device)
    names = [candidate.name for candidate in candidates]
    rows = {row.network: row for row in measure(names, scale, lq, args.repeats, args.warmup)}
    entries = []
    for one in candidates:
        if one.name not in rows:
            continue
        file = weights.get((one.method, scale)) if sets else None
        quality = {}
        if file is not None:
            net = build_network(f"{one.name},weights={file}", scale).to(device).eval()
            for test, pairs in sets.items():
                bar = f"{one.method} ×{scale}, {test}"
                quality[test] = measure_quality(net, pairs, scale, device, bar)
        entries.append(Entry(one.method, rows[one.name], one.published, file, quality, one.published_quality))
    return entries
