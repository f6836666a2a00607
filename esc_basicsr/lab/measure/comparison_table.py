"""The table of a comparison: as Markdown, as CSV, with its notes, and as the paper's teaser figure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from esc_basicsr.common.tables import markdown_table, milliseconds
from esc_basicsr.lab.measure.benchmark import Row
from esc_basicsr.lab.networks.selective_scan import implementation
from esc_basicsr.metrics.published import PUBLICATION, Costs
from esc_basicsr.options.recipes import BENCHMARKS
from esc_basicsr.weights.shipped import model_list

BASELINE = "ESC"
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
    """A row of the table."""

    method: str  # what the paper calls it
    row: Row
    published: Costs  # the paper's
    weights: str | None  # what quality was measured with; None if it was not
    quality: Mapping[str, Mapping[str, float]]  # measured: test set -> `psnr` and `ssim`
    published_quality: Mapping[str, Mapping[str, float]]  # the paper's, on DIV2K; of the ablation, PSNR alone


def _ratio(entry: Entry, entries: Sequence[Entry]) -> tuple[float | None, float | None]:
    """Give latency as a multiple of ESC's at this scale: measured here, published."""
    for other in entries:
        if other.method == BASELINE and other.row.scale == entry.row.scale:
            times = entry.published.milliseconds, other.published.milliseconds
            published = times[0] / times[1] if times[0] and times[1] else None
            return entry.row.latency / other.row.latency, published
    return None, None


def table(entries: Sequence[Entry]) -> tuple[list[str], list[list[object]]]:
    """Give head and rows of the CSV file: every figure, the paper's behind each."""
    sets = [name for name in BENCHMARKS if any(name in {*e.quality, *e.published_quality} for e in entries)]
    head = ["network", "scale", "ms", "paper ms", "ratio", "paper ratio", "memory bytes", "paper MB"]
    head += ["multiply-adds", "paper G", "parameters", "paper K"]
    head += [
        f"{origin}{name} {kind}" for name in sets for origin in ("", "paper ") for kind in ("psnr", "ssim")
    ]
    rows: list[list[object]] = []
    for entry in entries:
        row, paper = entry.row, entry.published
        cells: list[object] = [entry.method, row.scale, row.latency * 1e3, paper.milliseconds]
        cells += [*_ratio(entry, entries), row.memory, paper.mebibytes, row.multiply_adds, paper.giga]
        cells += [row.params, paper.thousands]
        for name in sets:
            for quality in (entry.quality, entry.published_quality):
                cells += [quality.get(name, {}).get(kind) for kind in ("psnr", "ssim")]
        rows.append(cells)
    return head, rows


def markdown(entries: Sequence[Entry]) -> str:
    """Write the table, with what is published in brackets."""
    sets = [name for name in BENCHMARKS if any(name in e.quality for e in entries)]
    if not sets:
        sets = [name for name in BENCHMARKS if any(name in e.published_quality for e in entries)]
    head = ["network", "scale", "latency", "÷ ESC", "peak memory growth", "multiply-adds", "parameters"]
    lines = []
    for entry in entries:
        row, paper = entry.row, entry.published
        cells = [
            entry.method,
            f"×{row.scale}",
            _beside(milliseconds(row.latency), _text(paper.milliseconds, 1)),
            _beside(*(_text(value, 2) for value in _ratio(entry, entries))),
            _beside(_text(row.memory and row.memory / 2**20, 0, " MiB"), _text(paper.mebibytes, 0)),
            _beside(_text(row.multiply_adds and row.multiply_adds / 1e9, 1, " G"), _text(paper.giga, 1)),
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


def notes(entries: Sequence[Entry], missing: Sequence[str], device: torch.device) -> str:
    """Say what a reader must know: where figures come from, what differs by more than it should."""
    lines = [
        f"In brackets: {PUBLICATION}, 1280×720 output, on its authors' GPU. A dash: not measured; quality is "
        "where --data and trained weights were given, or ship.",
        "Peak memory growth leaves weights and input out, the paper's memory does not.",
    ]
    lines += [f"Left out, as the memory was not enough: {', '.join(missing)}."] if missing else []
    lines += [
        f"{entry.method} ×{entry.row.scale}: PSNR and SSIM by {entry.weights}"
        + (f", trained on {model_list()[entry.weights].data}." if entry.weights in model_list() else ".")
        for entry in entries
        if entry.weights
    ]
    lines += [
        note.format(scan=implementation(device))
        for method, note in _REMARKS.items()
        if any(entry.method == method for entry in entries)
    ]
    for entry in entries:
        row, paper = entry.row, entry.published
        compared = {
            "multiply-adds": (row.multiply_adds and row.multiply_adds / 1e9, paper.giga),
            "parameters": (row.params / 1e3, paper.thousands),
        }
        for what, (ours, theirs) in compared.items():
            if ours and theirs and abs(ours / theirs - 1) > _TOLERANCE:
                by = f"{100 * (ours / theirs - 1):+.1f} %"
                lines.append(f"{entry.method} ×{row.scale}: {what} differ from the paper's by {by}.")
    return "\n".join(lines)


def draw(entries: Sequence[Entry]) -> Figure:
    """Draw the paper's teaser: published quality against latency as a multiple of ESC's, there and here."""
    scales = sorted({entry.row.scale for entry in entries})
    figure = Figure(figsize=(11, 4.2 * len(scales)), layout="constrained")
    colours = {
        method: f"C{number % 10}" for number, method in enumerate(dict.fromkeys(e.method for e in entries))
    }
    grid = figure.subplots(len(scales), 2, squeeze=False, sharex=True, sharey="row")
    for axes, scale in zip(grid, scales, strict=True):
        shown = [entry for entry in entries if entry.row.scale == scale]
        for axis, is_published, title in (
            (axes[0], True, "published: the authors' GPU"),
            (axes[1], False, "measured here"),
        ):
            points = []
            for entry in shown:
                ratio = _ratio(entry, entries)[is_published]
                psnr = entry.published_quality.get("Urban100", {}).get("psnr")
                # what is published of the release's implementation is what is published of ESC
                if ratio and psnr and not (is_published and entry.method == RELEASE):
                    points.append((ratio, psnr, entry))
            for number, (ratio, psnr, entry) in enumerate(sorted(points, key=lambda point: point[:2])):
                colour, area = colours[entry.method], 30 + entry.row.params / 1e4
                axis.scatter(ratio, psnr, s=area, color=colour, alpha=0.7)
                axis.annotate(
                    entry.method,
                    (ratio, psnr),
                    xytext=(0, -16 if number % 2 else 9),  # neighbours' names do not overlap
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            if not points:
                nothing = f"nothing published, or no {BASELINE} to compare with"
                axis.text(0.5, 0.5, nothing, transform=axis.transAxes, ha="center")
            axis.set_title(f"×{scale}, {title}")
            axis.set_xlabel("latency ÷ ESC's")
            axis.margins(0.15, 0.15)
            axis.grid(alpha=0.3, which="both")
        axes[0].set_ylabel("PSNR on Urban100, published (dB)")
    figure.suptitle("area: parameters", fontsize=8, x=0.99, ha="right")
    return figure
