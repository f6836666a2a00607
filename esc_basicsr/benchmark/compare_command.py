"""The paper's table, measured here: ESC and the networks that it is compared with, or its ablation.

All networks take turns in one run: latency, peak memory, multiply-adds and parameters as 'bench' measures
them, each beside the paper's figure; with --data, PSNR and SSIM on Y of those whose weights are at hand.

  python -m esc_basicsr compare -o DIR
  python -m esc_basicsr compare --scale 4 --weights HiT-SRF_x4=HiT-SRF_x4.pth --data datasets -o DIR
  python -m esc_basicsr compare --ablation -o DIR

Ratios are to ESC of the same scale. The paper's latencies are of its authors' GPU: compare the ratios. ESC
is as this package computes it, HiT-SRF with its attention factored, MambaIRv2 by our scan; ESC:release is
as ESC's authors released it, on a CPU by naive attention; the others are as BasicSR and spandrel have them.
Rivals of spandrel need the extra esc-basicsr[spandrel]. Writes comparison.json, .csv, .md and .png (or
ablation.*).
"""

import argparse
import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from esc_basicsr.archs.variants import SCALES, VARIANTS
from esc_basicsr.benchmark.bench_command import Row, measure
from esc_basicsr.benchmark.measure import add_measuring_arguments, describe_machine, device_to_measure_on
from esc_basicsr.benchmark.report import (
    make_folder,
    markdown_table,
    mebibytes,
    milliseconds,
    write_report,
)
from esc_basicsr.complexity import OUTPUT_HEIGHT, OUTPUT_WIDTH
from esc_basicsr.config.recipes import BENCHMARKS, option_files, recipes
from esc_basicsr.errors import UserError
from esc_basicsr.evaluation.published import (
    ABLATION,
    PUBLICATION,
    AblationFigures,
    Costs,
    published_costs,
    published_figures,
)
from esc_basicsr.evaluation.quality import measure_quality, pairs_of_set
from esc_basicsr.evaluation.result_files import write_csv, write_text
from esc_basicsr.pretrained import model_list
from esc_basicsr.rivals.selective_scan import implementation
from esc_basicsr.rivals.variants import RIVALS
from esc_basicsr.zoo import build, network_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

YARDSTICK = "ESC"
RELEASE = "ESC:release"
_NOTHING = "—"
# method -> what its figures are of
_REMARKS = {
    RELEASE: "ESC:release is ESC as its authors released it, on a CPU by naive attention.",
    "HiT-SRF": "HiT-SRF's latency and memory are of factored attention, its multiply-adds of the plain one.",
    "MambaIRv2-light": "MambaIRv2's selective scan is that of {scan}.",
    "OmniSR": "OmniSR's published parameters leave out position biases, norms and temperatures.",
}
_TOLERANCE = 0.01  # of multiply-adds and parameters


class Entry(NamedTuple):
    """A row of the table.

    Attributes:
        method: What the paper calls it.
        row: What was measured.
        published: The paper's costs; None where it has none.
        quality: What was measured with trained weights: test set -> ``psnr`` and ``ssim``.
        published_quality: The paper's, on DIV2K; of the ablation, PSNR alone.
    """

    method: str
    row: Row
    published: Costs | None
    quality: Mapping[str, Mapping[str, float]]
    published_quality: Mapping[str, Mapping[str, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    methods = [*VARIANTS, RELEASE, *RIVALS]
    parser.add_argument("--network", nargs="+", choices=methods, default=methods, help="default: all")
    parser.add_argument(
        "--scale", type=int, nargs="+", choices=SCALES, default=list(SCALES), help="default: 2 3 4"
    )
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


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write it down where asked."""
    device = device_to_measure_on(args)
    if args.ablation and (args.weights or args.data is not None):
        raise UserError("--ablation takes no --weights and no --data: nothing is trained for its rows.")
    weights = _weights(args.weights)
    _check_data(args)
    make_folder(args.output)
    stem = "ablation" if args.ablation else "comparison"
    entries = _ablation(args, device) if args.ablation else _comparison(args, device, weights)
    notes = _notes(entries, device)
    measured = {(entry.method, entry.row.scale) for entry in entries}
    if not args.ablation:
        missing = [f"{name} ×{s}" for s in args.scale for name in args.network if (name, s) not in measured]
        notes += f"\nLeft out, as the memory was not enough: {', '.join(missing)}." if missing else ""
    text = f"{markdown(entries)}\n\n{notes}"
    print(text)
    if args.output is not None:
        settings = {"repeats": args.repeats, "warmup": args.warmup, "machine": describe_machine(device)}
        settings["selective_scan"] = implementation(device)
        rows = [
            {"method": entry.method, **entry.row._asdict(), "published": entry.published}
            | {"quality": entry.quality, "published_quality": entry.published_quality}
            for entry in entries
        ]
        write_report(args.output, stem, {"settings": settings, "rows": rows}, text, draw(entries))
        write_csv(args.output / f"{stem}.csv", *table(entries))
    return 0


def _weights(given: Sequence[str]) -> dict[tuple[str, int], str]:
    """Trained weights by network and scale: those that ship, then the user's."""
    found = {(listed.variant, listed.scale): name for name, listed in reversed(model_list().items())}
    for text in given:
        network, _, file = text.partition("=")
        method, _, scale = network.rpartition("_x")
        if not (file and scale in map(str, SCALES) and method in (*VARIANTS, *RIVALS)):
            names = ", ".join((*VARIANTS, *RIVALS))
            raise UserError(f"--weights {text}: expected NETWORK_xSCALE=FILE, NETWORK among {names}.")
        if not Path(file).is_file():
            raise UserError(f"--weights {text}: there is no file {file}.")
        found[method, int(scale)] = file
    return found


def _check_data(args: argparse.Namespace) -> None:
    """Refuse a folder without test sets, and weights without any, before the measuring."""
    if args.data is None:
        if args.weights:
            raise UserError("--weights: PSNR is measured on test sets: give their folder by --data.")
        return
    for scale in args.scale:
        if not any(pairs_of_set(args.data, name, scale) for name in BENCHMARKS):
            raise UserError(
                f"--data {args.data}: none of {', '.join(BENCHMARKS)} is there at ×{scale}, as HR/X{scale} "
                f"and LR_bicubic/X{scale}; 'benchmark-set' makes them."
            )


def _comparison(
    args: argparse.Namespace, device: torch.device, weights: Mapping[tuple[str, int], str]
) -> list[Entry]:
    entries = []
    for scale in args.scale:
        rows = _measure([*args.network], scale, device, args)
        costs, figures = published_costs(scale), published_figures("DIV2K", scale)
        for method, row in rows.items():
            quality = {}
            if args.data is not None and (method, scale) in weights:
                trained = build(f"{method},weights={weights[method, scale]}", scale)
                trained = trained.to(device).eval()
                sets = {name: pairs_of_set(args.data, name, scale) for name in BENCHMARKS}
                quality = {
                    name: measure_quality(trained, pairs, scale, device, f"{method} ×{scale}, {name}")
                    for name, pairs in sets.items()
                    if pairs
                }
            published = network_of(method)
            entries.append(Entry(method, row, costs.get(published), quality, figures.get(published, {})))
    return entries


def _ablation(args: argparse.Namespace, device: torch.device) -> list[Entry]:
    """Each row is built from the option file that ships for it; they are left where results are wanted."""
    with contextlib.ExitStack() as stack:
        folder = args.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return _measure_ablation(args, device, folder)


def _measure_ablation(args: argparse.Namespace, device: torch.device, folder: Path) -> list[Entry]:
    files = {
        recipe.row: folder / f"{recipe.name}.yml"
        for recipe in recipes()
        if (recipe.variant, recipe.scale, recipe.data) == ("ESC", 2, "DIV2K") and recipe.row in ABLATION
    }
    texts = {path.name: text for path, text in option_files().items() if path.parts[0] == "train"}
    for file in files.values():
        write_text(file, texts[file.name])
    rows = _measure([str(file) for file in files.values()], 2, device, args)
    entries = []
    for (name, figures), row in zip(((row, ABLATION[row]) for row in files), rows.values(), strict=True):
        costs = Costs(figures.milliseconds, None, None, None)
        entries.append(Entry(name or YARDSTICK, row, costs, {}, _psnr_alone(figures)))
    return entries


def _psnr_alone(figures: AblationFigures) -> dict[str, dict[str, float]]:
    return {"Set5": {"psnr": figures.set5}, "Urban100": {"psnr": figures.urban100}}


def _measure(
    names: Sequence[str], scale: int, device: torch.device, args: argparse.Namespace
) -> dict[str, Row]:
    height, width = OUTPUT_HEIGHT // scale, OUTPUT_WIDTH // scale
    lq = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    return {row.network: row for row in measure(names, scale, lq, args.repeats, args.warmup)}


def _ratio(entry: Entry, entries: Sequence[Entry]) -> tuple[float | None, float | None]:
    """Latency as a multiple of ESC's at this scale: measured here, published."""
    for other in entries:
        if other.method == YARDSTICK and other.row.scale == entry.row.scale:
            times = [costs and costs.milliseconds for costs in (entry.published, other.published)]
            published = times[0] / times[1] if times[0] and times[1] else None
            return entry.row.latency / other.row.latency, published
    return None, None


def table(entries: Sequence[Entry]) -> tuple[list[str], list[list[object]]]:
    """Head and rows of the CSV file: every figure, the paper's behind each."""
    sets = [name for name in BENCHMARKS if any(name in {*e.quality, *e.published_quality} for e in entries)]
    head = ["network", "scale", "ms", "paper ms", "ratio", "paper ratio", "memory bytes", "paper MB"]
    head += ["multiply-adds", "paper G", "parameters", "paper K"]
    head += [
        f"{origin}{name} {kind}" for name in sets for origin in ("", "paper ") for kind in ("psnr", "ssim")
    ]
    rows: list[list[object]] = []
    for entry in entries:
        paper = entry.published or Costs(None, None, None, None)
        ratio, published_ratio = _ratio(entry, entries)
        row = entry.row
        cells: list[object] = [entry.method, row.scale, row.latency * 1e3, paper.milliseconds]
        cells += [ratio, published_ratio, row.memory, paper.mebibytes, row.flops, paper.giga]
        cells += [row.params, paper.thousands]
        for name in sets:
            for quality in (entry.quality, entry.published_quality):
                cells += [quality.get(name, {}).get(kind) for kind in ("psnr", "ssim")]
        rows.append(cells)
    return head, rows


def markdown(entries: Sequence[Entry]) -> str:
    """The table; what is published stands in brackets."""
    sets = [name for name in BENCHMARKS if any(name in e.quality for e in entries)]
    if not sets:
        sets = [name for name in BENCHMARKS if any(name in e.published_quality for e in entries)]
    head = ["network", "scale", "latency", "÷ ESC", "peak memory growth", "multiply-adds", "parameters"]
    lines = []
    for entry in entries:
        row, paper = entry.row, entry.published or Costs(None, None, None, None)
        cells = [
            entry.method,
            f"×{row.scale}",
            _beside(milliseconds(row.latency), _text(paper.milliseconds, 1)),
            _beside(*(_text(value, 2) for value in _ratio(entry, entries))),
            _beside(mebibytes(row.memory), _text(paper.mebibytes, 0)),
            _beside(_text(row.flops and row.flops / 1e9, 1, " G"), _text(paper.giga, 1)),
            _beside(f"{row.params / 1e3:,.0f} K", _text(paper.thousands, 0)),
        ]
        for name in sets:
            qualities = (entry.quality, entry.published_quality)
            cells.append(_beside(*(_figures(quality.get(name)) for quality in qualities)))
        lines.append(cells)
    return markdown_table(head + sets, lines)


def _text(value: float | None, digits: int, unit: str = "") -> str | None:
    return None if value is None else f"{value:,.{digits}f}{unit}"


def _beside(measured: str | None, published: str | None) -> str:
    return f"{measured or _NOTHING}{f' ({published})' if published else ''}"


def _figures(values: Mapping[str, float] | None) -> str | None:
    if not values:
        return None
    return " / ".join(
        f"{values[kind]:.{digits}f}" for kind, digits in (("psnr", 2), ("ssim", 4)) if kind in values
    )


def _notes(entries: Sequence[Entry], device: torch.device) -> str:
    """What a reader must know: where figures come from, what differs by more than it should."""
    notes = [
        f"In brackets: {PUBLICATION}, 1280×720 output, on its authors' GPU. A dash: without trained weights.",
        "Peak memory growth leaves weights and input out, the paper's memory does not.",
    ]
    notes += [
        note.format(scan=implementation(device))
        for method, note in _REMARKS.items()
        if any(entry.method == method for entry in entries)
    ]
    for entry in entries:
        row, paper = entry.row, entry.published
        if paper is None:
            continue
        compared = {
            "multiply-adds": (row.flops and row.flops / 1e9, paper.giga),
            "parameters": (row.params / 1e3, paper.thousands),
        }
        for what, (ours, theirs) in compared.items():
            if ours and theirs and abs(ours / theirs - 1) > _TOLERANCE:
                by = f"{100 * (ours / theirs - 1):+.1f} %"
                notes.append(f"{entry.method} ×{row.scale}: {what} differ from the paper's by {by}.")
    return "\n".join(notes)


def draw(entries: Sequence[Entry]) -> "Figure":
    """The paper's teaser: quality, as published, against latency as a multiple of ESC's, there and here."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    scales = sorted({entry.row.scale for entry in entries})
    figure = Figure(figsize=(11, 4.2 * len(scales)), layout="constrained")
    colours = {
        method: f"C{number % 10}" for number, method in enumerate(dict.fromkeys(e.method for e in entries))
    }
    grid = figure.subplots(len(scales), 2, squeeze=False, sharex=True, sharey="row")
    for axes, scale in zip(grid, scales, strict=True):
        shown = [entry for entry in entries if entry.row.scale == scale]
        for axis, place, title in (
            (axes[0], 1, "published: the authors' GPU"),
            (axes[1], 0, "measured here"),
        ):
            for entry in shown:
                ratio = _ratio(entry, entries)[place]
                psnr = entry.published_quality.get("Urban100", {}).get("psnr")
                if ratio is None or psnr is None:
                    continue
                axis.scatter(
                    ratio, psnr, s=30 + entry.row.params / 1e4, color=colours[entry.method], alpha=0.7
                )
                axis.annotate(
                    entry.method,
                    (ratio, psnr),
                    xytext=(0, 9),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_title(f"×{scale}, {title}")
            axis.set_xlabel("latency ÷ ESC's")
            axis.margins(0.15, 0.15)
            axis.grid(alpha=0.3, which="both")
        axes[0].set_ylabel("PSNR on Urban100, published (dB)")
    figure.suptitle("area: parameters", fontsize=8, x=0.99, ha="right")
    return figure
