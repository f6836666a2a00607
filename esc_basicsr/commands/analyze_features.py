"""What layers make of an image: feature maps, their spectra, and what one pixel attends to.

Of each layer the mean and the norm over channels, principal components as colours, and how amplitude falls
with frequency; of attention layers the weights of one query, on the image.

  python -m esc_basicsr analyze features --network ESC_x4.pth --image photo.png -o DIR
  python -m esc_basicsr analyze features --network a.pth --layers "body.[0-9]" --query 40 52 -o DIR

A network is what 'python -m esc_basicsr bench --help' lists. The photograph is a high-resolution one: its
central part is reduced by Pillow's bicubic filter. Writes features.json, features.md and features.png.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from esc_basicsr.common.errors import UserError
from esc_basicsr.lab.analysis.attention_maps import (
    Layer,
    Seen,
    attention_names,
    attention_row,
    has_attention,
    locate,
    match_names,
    refuse_compiled,
    see,
    tile_of,
)
from esc_basicsr.lab.analysis.crops import central_lr
from esc_basicsr.lab.analysis.features import (
    Values,
    as_colours,
    channel_mean,
    channel_norm,
    relative_log_amplitude,
)
from esc_basicsr.lab.analysis.features_drawing import Drawn, Glance, View, draw
from esc_basicsr.lab.analysis.images import IMAGE_HELP, Pixels, to_tensor
from esc_basicsr.lab.analysis.networks import (
    Subject,
    add_network_arguments,
    note_on_failures,
    note_on_weights,
    of_those_that_work,
    subjects_of,
)
from esc_basicsr.lab.measure.measure import describe_machine
from esc_basicsr.lab.measure.report import make_folder, markdown_table, write_report

# fine texture beside smooth parts
DEFAULT_IMAGE = "astronaut"
_SIZE = 128
_MOST = 6  # layers of a network that are shown where none are named

_T = TypeVar("_T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the analysis' arguments."""
    add_network_arguments(parser)
    parser.add_argument("--image", default=DEFAULT_IMAGE, help=f"{IMAGE_HELP} (default: {DEFAULT_IMAGE})")
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="PATTERN",
        help="names of modules whose output is shown, with *, which stands for dots too, and [0-9] (default: "
        f"the network's stages, at most {_MOST})",
    )
    parser.add_argument(
        "--modules",
        nargs="+",
        metavar="PATTERN",
        help="names of attention modules of which a query is shown (default: those that 'analyze similarity' "
        f"knows, at most {_MOST})",
    )
    parser.add_argument(
        "--query",
        type=int,
        nargs=2,
        metavar=("X", "Y"),
        help="the pixel whose attention is shown, in the LR image (default: one near its centre, inside of "
        "windows)",
    )
    parser.add_argument(
        "--size", type=int, default=_SIZE, help=f"longest side of the LR image (default: {_SIZE})"
    )


def run(args: argparse.Namespace) -> int:
    """Look at each network's layers, print a table, write the report."""
    jobs: list[tuple[Subject, list[str], list[Layer]]] = []
    for subject in subjects_of(args):
        refuse_compiled(subject)
        shown = stage_names(subject) if args.layers is None else _named(subject, args.layers)
        attention: list[str] = []
        if args.modules is not None or has_attention(subject.net):
            attention = attention_names(subject.net, subject.name, args.modules)
        jobs.append((subject, shown, locate(subject, list(dict.fromkeys([*shown, *attention])))))
    scale = jobs[0][0].scale
    tile = math.lcm(*(tile_of(subject.net, [layer.name for layer in layers]) for subject, _, layers in jobs))
    lr = central_lr(args.image, args.size, tile, tile, scale)
    height, width = lr.shape[:2]
    # near the centre, which is a corner of windows: inside of regular and of half-shifted ones
    x, y = args.query or (width // 2 + tile // 4, height // 2 + tile // 4)
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(f"--query {x} {y} does not lie in the LR image of {width}×{height}.")
    make_folder(args.output)
    with tqdm(total=len(jobs), desc="features", unit="network") as bar:

        def look(job: tuple[Subject, list[str], list[Layer]]) -> tuple[dict[str, Any], Drawn]:
            bar.set_postfix_str(job[0].network)
            found = _look(*job, lr, (x, y), torch.device(args.device))
            bar.update()
            return found

        found, failures = of_those_that_work(look, jobs)
    rows, drawn = [row for row, _ in found], [one for _, one in found]
    caption = _caption(args, [subject for subject, _, _ in jobs], rows, lr, (x, y))
    caption += note_on_failures(failures)
    text = f"{_table(rows)}\n\n{caption}"
    print(text)
    settings = {
        "image": args.image,
        "lr_size": [height, width],
        "scale": scale,
        "query": [x, y],
        "machine": describe_machine(torch.device(args.device)),
    }
    results = {"settings": settings, "rows": rows}
    write_report(args.output, "features", results, text, draw(drawn, (x, y), caption))
    if failures:
        raise UserError(failures)
    return 0


def stage_names(subject: Subject) -> list[str]:
    """A network's stages: the children of its largest list of modules, of those nearest to the root.

    Returns:
        At most 6 names, evenly chosen, the first and the last among them.

    Raises:
        UserError: There is no such list.
    """
    lists = [
        (name, module)
        for name, module in subject.net.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    ]
    if not lists:
        children = ", ".join(name for name, _ in subject.net.named_children())
        if not children:
            raise UserError(f"{subject.name}: it has no layers to look into.")
        raise UserError(f"{subject.name}: it has no list of layers; name some by --layers, of: {children}.")
    depth = min(name.count(".") for name, _ in lists)
    nearest = [(name, module) for name, module in lists if name.count(".") == depth]
    name, module = max(nearest, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return _evenly([f"{name}.{child}".lstrip(".") for child, _ in module.named_children()])


def _evenly(items: Sequence[_T]) -> list[_T]:
    chosen = np.linspace(0, len(items) - 1, min(len(items), _MOST)).round().astype(int)
    return [items[index] for index in chosen]


def _named(subject: Subject, patterns: Sequence[str]) -> list[str]:
    names = [name for name, _ in subject.net.named_modules() if name]
    top = [name for name in names if name.count(".") <= 1]
    return match_names(subject.net, subject.name, patterns, top)


def _look(
    subject: Subject,
    shown: Sequence[str],
    layers: Sequence[Layer],
    lr: Pixels,
    query: tuple[int, int],
    device: torch.device,
) -> tuple[dict[str, Any], Drawn]:
    """One network's figures, and what is drawn of it."""
    seen = see(subject, layers, to_tensor(lr, device))
    order = [layer.name for layer in layers if layer.name in shown]
    features = {name: seen[name].features.double().cpu().numpy() for name in order}
    for name, values in features.items():
        if not np.isfinite(values).all():
            raise UserError(f"{subject.name}: {name} gives values that are not finite.")
    colours, variances = _colours(features)
    views, figures = {}, []
    for name, values in features.items():
        frequencies, spectrum = relative_log_amplitude(values)
        views[name] = View(
            channel_mean(values), channel_norm(values), colours.get(name), frequencies, spectrum
        )
        explained = variances.get(name)
        figures.append(
            {
                "layer": name,
                "size": list(values.shape),
                "mean": float(values.mean()),
                "norm": float(views[name].norm.mean()),
                "explained": None if explained is None else [float(share) for share in explained],
                "frequencies": [float(frequency) for frequency in frequencies],
                "relative_log_amplitude": [float(value) for value in spectrum],
            }
        )
    glances = _glances(layers, seen, query)
    row = {
        "network": subject.network,
        "weights": subject.weights,
        "params": subject.params,
        "layers": figures,
        "attention": [
            {
                "layer": name,
                "window": [glance.left, glance.top, len(glance.weights)],
                "weights": [[float(w) if np.isfinite(w) else None for w in line] for line in glance.weights],
            }
            for name, glance in glances.items()
        ],
    }
    chosen = {name: glances[name] for name in _evenly(list(glances))} if glances else {}
    return row, Drawn(subject.label, lr, views, chosen)


def _colours(features: dict[str, Values]) -> tuple[dict[str, Values], dict[str, Values]]:
    """Principal components, one basis for layers of equally many channels; and shares of variance."""
    colours: dict[str, Values] = {}
    shares: dict[str, Values] = {}
    for channels in {values.shape[-1] for values in features.values()}:
        names = [name for name, values in features.items() if values.shape[-1] == channels]
        if channels < 3:
            continue
        drawn, variances = as_colours([features[name] for name in names])
        colours |= dict(zip(names, drawn, strict=True))
        total = variances.sum()
        shares |= dict.fromkeys(names, variances[:3] / total if total > 0 else variances[:3])
    return colours, shares


def _glances(layers: Sequence[Layer], seen: dict[str, Seen], query: tuple[int, int]) -> dict[str, Glance]:
    x, y = query
    glances = {}
    for layer in layers:
        maps = seen[layer.name].maps
        if maps is None:
            continue
        weights, (top, left) = attention_row(maps, y, x)
        side, (rows, columns) = maps.window, seen[layer.name].features.shape[:2]
        values = weights.double().cpu().numpy()
        values[: max(-top, 0)] = values[side - max(top + side - rows, 0) :] = np.nan
        values[:, : max(-left, 0)] = values[:, side - max(left + side - columns, 0) :] = np.nan
        glances[layer.name] = Glance(values, left, top)
    return glances


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["network", "weights", "layer", "size", "mean", "mean norm", "variance of 3 components"]
    lines = []
    for row in rows:
        for layer in row["layers"]:
            explained, (height, width, channels) = layer["explained"], layer["size"]
            lines.append(
                [
                    row["network"],
                    row["weights"],
                    layer["layer"],
                    f"{channels}×{height}×{width}",
                    f"{layer['mean']:.3g}",
                    f"{layer['norm']:.3g}",
                    "–" if explained is None else f"{sum(explained):.1%}",
                    f"{layer['relative_log_amplitude'][-1]:.2f}",
                ]
            )
    return markdown_table([*head, "log amplitude at the highest frequency"], lines)


def _attention_notes(rows: Sequence[dict[str, Any]], query: tuple[int, int]) -> list[str]:
    notes = []
    if any(row["attention"] for row in rows):
        notes.append(
            f"Attention: after softmax, mean over heads, of the query at x {query[0]}, y {query[1]} of the "
            "LR image; its window is outlined; a logarithmic scale."
        )
    without = [row["network"] for row in rows if not row["attention"]]
    if without:
        notes.append(f"No attention by windows was seen in {', '.join(without)}.")
    return notes


def _caption(
    args: argparse.Namespace,
    subjects: Sequence[Subject],
    rows: Sequence[dict[str, Any]],
    lr: Pixels,
    query: tuple[int, int],
) -> str:
    height, width = lr.shape[:2]
    parts = [
        f"Features that layers make of {args.image}: its centre, LR {width}×{height} at "
        f"×{subjects[0].scale} by Pillow's bicubic filter. Channel mean (signed) and L2 norm over channels, "
        "on logarithmic colour scales that are one for the figure, the mean's linear around 0. Principal "
        "components: the first three as red, green and blue, 1st to 99th percentile, one basis for all "
        "layers of a network that have equally many channels. Relative log amplitude: mean over channels and "
        "directions of log10(|FFT2| + 1e-8), minus that at frequency 0.",
        *_attention_notes(rows, query),
        "How ESC's authors drew features was not found; these definitions are ours.",
        note_on_weights(subjects),
    ]
    return " ".join(parts).rstrip()
