"""Published figures of these networks and of baselines, to stand beside measured ones.

From arXiv:2503.06671: PSNR in dB and SSIM on Y, a border of ``scale`` pixels cropped; and costs, on the
authors' GPU. Without a change of size, from arXiv:2108.10257: PSNR and SSIM on RGB, or of gray images, no
border cropped. They are data, in the CSV files beside this module; an empty cell is not published.
"""

import csv
from importlib import resources
from typing import NamedTuple

PUBLICATION = "arXiv:2503.06671"

RESTORATION = "arXiv:2108.10257"
RESTORATION_SETS = "DIV2K, Flickr2K, BSD500 and WED"  # which all methods there were trained on

# DFLIP is DIV2K + Flickr2K + LSDIR + DiverSeg-IP.
TRAINING_SETS = ("DIV2K", "DFLIP")


class Costs(NamedTuple):
    """Published costs of one image, 1280×720 output, float32, on the authors' GPU.

    Attributes:
        milliseconds: Latency; like the others None where it is not published.
        mebibytes: Peak memory.
        giga: Multiply-adds in G.
        thousands: Parameters in thousands.
    """

    milliseconds: float | None
    mebibytes: float | None
    giga: float | None
    thousands: float | None


class AblationFigures(NamedTuple):
    """A row of the ablation: ESC ×2, trained on DIV2K; PSNR on Y in dB, latency on the authors' GPU."""

    set5: float
    urban100: float
    milliseconds: float


def _table(name: str) -> list[dict[str, str]]:
    text = resources.files("esc_basicsr.metrics").joinpath(f"published_{name}.csv").read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))


# row, as the shipped option files call it -> figures; ESC itself has no name there
ABLATION_FIGURES = {row.pop("row"): AblationFigures(*map(float, row.values())) for row in _table("ablation")}


def published_costs(scale: int) -> dict[str, Costs]:
    """Return the published costs of networks at a scale, by method."""
    return {
        row["method"]: Costs(*(float(row[field]) for field in Costs._fields))
        for row in _table("costs")
        if row["scale"] == str(scale)
    }


def published_figures(training_set: str, scale: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the published quality of networks of a scale that were trained on ``training_set``.

    Returns:
        method -> test set -> ``psnr`` and ``ssim``, as far as they are published; empty for another scale or
        training set.
    """
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for row in _table("quality"):
        if (row.pop("trained_on"), row.pop("scale")) == (training_set, str(scale)):
            by_set = figures.setdefault(row.pop("method"), {})
            for column, figure in row.items():
                test_set, metric = column.split()
                by_set.setdefault(test_set, {}).update({metric: float(figure)} if figure else {})
    return figures


def published_restoration() -> dict[str, dict[str, dict[str, float]]]:
    """Return the published quality of networks that remove noise or JPEG artefacts.

    Returns:
        method -> test set, as the shipped option files call it -> ``psnr`` and ``ssim``, as far as they are
        published.
    """
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for row in _table("restoration"):
        values = {metric: float(row[metric]) for metric in ("psnr", "ssim") if row[metric]}
        figures.setdefault(row["method"], {})[row["set"]] = values
    return figures
