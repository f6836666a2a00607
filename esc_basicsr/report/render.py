"""Experiments as one HTML page that needs nothing else: no network, no other file."""

import base64
import hashlib
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import warn_once
from esc_basicsr.common.version import __version__
from esc_basicsr.metrics.comparison_images import WITH_GT, WITHOUT_GT, Panel, cut
from esc_basicsr.report.events import Comparison
from esc_basicsr.report.experiment import Experiment

__all__ = ["MAX_IMAGE_BYTES", "MAX_POINTS", "render"]

MAX_POINTS = 1000  # of a curve; more are averaged in equal groups
MAX_IMAGE_BYTES = 24 * 2**20  # bytes of all images, as text

_DIGITS = 6


def render(experiments: Sequence[Experiment]) -> tuple[str, int]:
    """Draw up the page of experiments of different names.

    Returns:
        The page, and how many comparison images were skipped because others took their room.
    """
    sources, images, skipped = _images(experiments)
    data = {
        "names": [experiment.name for experiment in experiments],
        "charts": _charts(experiments),
        "sources": sources,
        "images": images,
    }
    names = ", ".join(experiment.name for experiment in experiments)
    parts = {
        "title": html.escape(f"Training: {names}"),
        "style": _resource("page.css"),
        "metrics": _metrics_table(experiments),
        "settings": _settings_table(experiments),
        "version": html.escape(__version__),
        # no text of theirs can end the element that it is in
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": _resource("page.js"),
    }
    pieces = _resource("page.html").split("@@")  # text, name, text, name, ..., text
    pieces[1::2] = [parts[name] for name in pieces[1::2]]
    return "".join(pieces), skipped


def _resource(name: str) -> str:
    return resources.files("esc_basicsr.report").joinpath(name).read_text(encoding="utf-8")


# Curves


def _charts(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """Collect curves by name: losses, metrics by set, learning rate, throughput, the rest."""
    names = sorted({name for experiment in experiments for name in experiment.curves}, key=_order)
    return [
        {
            "name": name,
            "title": _title(name),
            "noisy": name.startswith("losses/") or name == "images_per_second",
            "curves": [
                {"of": number, **_thinned(experiment.curves[name])}
                for number, experiment in enumerate(experiments)
                if name in experiment.curves
            ],
        }
        for name in names
    ]


def _order(name: str) -> tuple[int, str]:
    groups = ("losses/", "metrics/", "lr", "images_per_second")
    return next((n for n, group in enumerate(groups) if name.startswith(group)), len(groups)), name


def _title(name: str) -> str:
    if name.startswith("metrics/"):
        _, *of, metric = name.split("/")
        return f"{'/'.join(of)}: {_metric_title(metric)}"
    known = {"lr": "Learning rate", "images_per_second": "Images a second"}
    return known.get(name, f"Loss {name.removeprefix('losses/')}" if name.startswith("losses/") else name)


def _metric_title(metric: str) -> str:
    return {"psnr": "PSNR (dB)", "ssim": "SSIM"}.get(metric, metric)


def _thinned(curve: Mapping[int, float]) -> dict[str, Any]:
    """Return a curve's ``x`` and ``y``, means of ``each`` points."""
    each = math.ceil(len(curve) / MAX_POINTS)
    points = list(curve.items())
    groups = [points[first : first + each] for first in range(0, len(points), each)]
    return {
        "each": each,
        "x": [round(sum(x for x, _ in group) / len(group)) for group in groups],
        # divided first: the sum of large values may be none
        "y": [_short(math.fsum(y / len(group) for _, y in group)) for group in groups],
    }


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


# Images


def _images(experiments: Sequence[Experiment]) -> tuple[list[str], list[dict[str, Any]], int]:
    """Return sources as data URLs, each once; the images; and how many comparisons were skipped."""
    sources: dict[str, int] = {}
    urls: dict[bytes, str] = {}
    shown: dict[str, dict[str, Any]] = {}
    comparisons = _newest_first(experiments)
    room = MAX_IMAGE_BYTES
    for done, (number, comparison) in enumerate(comparisons):
        kinds, _, image = comparison.tag.partition("/")
        try:
            # no other reader of Pillow's is let loose on a log
            with Image.open(io.BytesIO(comparison.png()), formats=("PNG", "JPEG")) as png:
                panels = cut(np.asarray(png.convert("RGB")), kinds)
            if min(panels[0].image.shape) == 0:
                raise ValueError("too small")
        except UserError:
            raise
        except Exception as error:  # what a damaged image raises has no limits
            warn_once(
                f"{comparison.file}: {comparison.tag} cannot be shown ({type(error).__name__}: {error})."
            )
            continue
        keys = [hashlib.sha256(panel.image.tobytes()).digest() for panel in panels]
        for key, panel in zip(keys, panels, strict=True):
            if key not in urls:  # bicubic and GT are the same every time
                urls[key] = _data_url(panel)
        room -= sum(len(urls[key]) for key in {*keys} if urls[key] not in sources)
        if room < 0:
            return list(sources), [shown[key] for key in sorted(shown)], len(comparisons) - done
        height, width = panels[0].image.shape[:2]
        shown_image = shown.setdefault(
            f"{image} {width}×{height}", {"name": image, "width": width, "height": height, "panels": []}
        )
        metrics = _metrics_of(experiments[number], image, comparison.iteration)
        for key, panel in zip(keys, panels, strict=True):
            entry: dict[str, Any] = {
                "kind": panel.kind,
                "src": sources.setdefault(urls[key], len(sources)),
            }
            if panel.kind == "SR":
                entry |= {"of": number, "iter": comparison.iteration, "metrics": metrics}
            if entry not in shown_image["panels"]:
                shown_image["panels"].append(entry)
    return list(sources), [shown[key] for key in sorted(shown)], 0


def _newest_first(experiments: Sequence[Experiment]) -> list[tuple[int, Comparison]]:
    """Sort comparisons, with their experiment's number: the newest of every image, then the ones before."""
    waiting = []
    for number, experiment in enumerate(experiments):
        ages: dict[str, int] = {}
        for comparison in reversed(experiment.comparisons):
            kinds, _, _ = comparison.tag.partition("/")
            if tuple(kinds.split("_")) in (WITH_GT, WITHOUT_GT):  # else it is another program's image
                ages[comparison.tag] = ages.get(comparison.tag, -1) + 1
                waiting.append((ages[comparison.tag], comparison.tag, number, comparison))
    return [(number, comparison) for _, _, number, comparison in sorted(waiting)]


def _data_url(panel: Panel) -> str:
    png = io.BytesIO()
    Image.fromarray(panel.image).save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def _metrics_of(experiment: Experiment, image: str, iteration: int) -> str:
    """Format an image's metrics if they are of this iteration."""
    of, _, name = image.partition("/")
    known = dict(experiment.images.get(of, {}).get(name, {}))
    if known.pop("iter", None) != iteration:
        return ""
    return ", ".join(
        f"PSNR {value:.2f} dB" if metric == "psnr" else f"{_metric_title(metric)} {value:#.4g}"
        for metric, value in known.items()
    )


# Tables


def _table(kind: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table of a kind that page.css knows, whose first column names its rows."""
    cells = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in head)
    lines = [
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(text)}</td>" for text in rest)
        + "</tr>"
        for first, *rest in rows
    ]
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
        f'<table class="{kind}">'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{cells}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _metrics_table(experiments: Sequence[Experiment]) -> str:
    names = sorted(
        {name for experiment in experiments for name in experiment.curves if name.startswith("metrics/")}
    )
    rows = []
    for name in names:
        for experiment in experiments:
            curve = experiment.curves.get(name)
            if not curve:
                continue
            lower = experiment.options.get(f"val.metrics.{name.split('/')[-1]}.better") == "lower"
            best = (min if lower else max)(curve, key=curve.__getitem__)
            last = max(curve)
            rows.append(
                [_title(name), experiment.name]
                + [text for at in (best, last) for text in (f"{curve[at]:.4f}", f"{at:,}")]
            )
    if not rows:
        return "<p>No validation was recorded.</p>"
    head = ("Set and metric", "Experiment", "Best", "at iteration", "Last", "at iteration")
    return _table("numbers", "Best and last metrics", head, rows)


def _settings_table(experiments: Sequence[Experiment]) -> str:
    known = [experiment for experiment in experiments if experiment.options]
    if len(known) < 2:
        return ""
    keys = dict.fromkeys(key for experiment in known for key in experiment.options)
    rows = []
    for key in keys:
        values = [experiment.options.get(key, "–") for experiment in known]
        if len({*values}) > 1:
            rows.append([key, *values])
    if not rows:
        return "<h2>Settings</h2><p>All experiments have the same settings.</p>"
    head = ("Setting", *(experiment.name for experiment in known))
    return f"<h2>Settings</h2>{_table('settings', 'Settings that differ', head, rows)}"
