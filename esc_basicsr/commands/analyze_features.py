"""Show what layers make of an image: feature maps, their spectra, and what one pixel attends to.

Of each layer the mean and the norm over channels, principal components as colours, and how amplitude falls
with frequency; of attention layers the weights of one query, on the image.

  python -m esc_basicsr analyze features --network ESC_x4.pth --image photo.png -o DIR
  python -m esc_basicsr analyze features --network a.pth --layers "body.[0-9]" --query 40 52 -o DIR

A network is what 'python -m esc_basicsr bench --help' lists. The image is a high-resolution one: its
central part is reduced by Pillow's bicubic filter. Writes features.json, features.md and features.png.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.nn as nn

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.lab.analysis.attention_maps import (
    Layer,
    Seen,
    attention_names,
    attention_row,
    known_attention,
    locate,
    match_names,
    refuse_compiled,
    see,
    tile_of,
)
from esc_basicsr.lab.analysis.drawing import Attention, Featured, View, draw_features
from esc_basicsr.lab.analysis.features import (
    Values,
    as_colours,
    channel_mean,
    channel_norm,
    relative_log_amplitude,
)
from esc_basicsr.lab.analysis.images import add_image_argument, central_lr, to_tensor
from esc_basicsr.lab.analysis.networks import Bar, Row, Subject, analyze, subjects_of
from esc_basicsr.metrics.quality import Image

# fine texture beside smooth parts
DEFAULT_IMAGE = "astronaut"
_SIZE = 128
_MOST = 6  # layers of a network that are shown where none are named

_T = TypeVar("_T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the analysis' arguments."""
    add_image_argument(parser, DEFAULT_IMAGE)
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
    chosen = [(subject, *_layers(subject, args)) for subject in subjects_of(args)]
    scale = chosen[0][0].scale
    tile = math.lcm(
        *(tile_of(subject.net, [layer.name for layer in layers]) for subject, _, layers in chosen)
    )
    lr = central_lr(args.image, args.size, tile, tile, scale)
    height, width = lr.shape[:2]
    # near the centre, which is a corner of windows: inside of regular and of half-shifted ones
    x, y = query = args.query or (width // 2 + tile // 4, height // 2 + tile // 4)
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(f"--query {x} {y} does not lie in the LR image of {width}×{height}.")
    return analyze(
        args,
        "features",
        [
            (subject, partial(_look, subject, shown, layers, lr, query, torch.device(args.device)))
            for subject, shown, layers in chosen
        ],
        steps=len(chosen),
        table=_table,
        caption=lambda rows: _caption(args.image, scale, rows, lr, query),
        settings={"image": args.image, "lr_size": [height, width], "scale": scale, "query": [x, y]},
        draw=lambda networks, caption: draw_features(networks, query, caption),
    )


def _layers(subject: Subject, args: argparse.Namespace) -> tuple[list[str], list[Layer]]:
    """Find the layers whose features are shown, and locate these and the attention layers."""
    refuse_compiled(subject)
    if args.layers is None:
        shown = stage_names(subject)
    else:
        names = [name for name, _ in subject.net.named_modules() if name]
        top = [name for name in names if name.count(".") <= 1]
        shown = match_names(subject.net, subject.name, args.layers, top)
    attention = known_attention(subject.net)
    if args.modules is not None:
        attention = attention_names(subject.net, subject.name, args.modules)
    return shown, locate(subject, list(dict.fromkeys([*shown, *attention])))


def stage_names(subject: Subject) -> list[str]:
    """List a network's stages: the children of its largest list of modules, of those nearest to the root.

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


def _look(
    subject: Subject,
    shown: list[str],
    layers: list[Layer],
    lr: Image,
    query: tuple[int, int],
    device: torch.device,
    bar: Bar,
) -> tuple[Row, Featured]:
    """Measure and draw one network's layers."""
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
        norm = channel_norm(values)
        views[name] = View(channel_mean(values), norm, colours.get(name), frequencies, spectrum)
        figures.append(
            {
                "layer": name,
                "size": list(values.shape),
                "mean": float(values.mean()),
                "norm": float(norm.mean()),
                "explained": variances[name].tolist() if name in variances else None,
                "frequencies": frequencies.tolist(),
                "relative_log_amplitude": spectrum.tolist(),
            }
        )
    attention = _attention(layers, seen, query, len(lr))
    windows = [
        {
            "layer": name,
            "window": [one.left, one.top, len(one.weights)],
            "weights": [[float(w) if np.isfinite(w) else None for w in line] for line in one.weights],
        }
        for name, one in attention.items()
    ]
    bar.update()
    chosen = {name: attention[name] for name in _evenly(list(attention))} if attention else {}
    return {"layers": figures, "attention": windows}, Featured(subject.label, lr, views, chosen)


def _colours(features: dict[str, Values]) -> tuple[dict[str, Values], dict[str, Values]]:
    """Find principal components, one basis for layers of equally many channels; and shares of variance."""
    colours: dict[str, Values] = {}
    shares: dict[str, Values] = {}
    for channels in {values.shape[-1] for values in features.values()}:
        if channels < 3:
            continue
        names = [name for name, values in features.items() if values.shape[-1] == channels]
        drawn, variances = as_colours([features[name] for name in names])
        colours |= dict(zip(names, drawn, strict=True))
        total = variances.sum()
        shares |= dict.fromkeys(names, variances[:3] / total if total > 0 else variances[:3])
    return colours, shares


def _attention(
    layers: Sequence[Layer], seen: dict[str, Seen], query: tuple[int, int], height: int
) -> dict[str, Attention]:
    """Give what a query attends to, by layer; not of layers that have fewer pixels than the image."""
    x, y = query
    found = {}
    for layer in layers:
        maps = seen[layer.name].maps
        if maps is None or 2 * len(seen[layer.name].features) <= height:
            continue
        weights, (top, left) = attention_row(maps, y, x)
        side, (rows, columns) = maps.window, seen[layer.name].features.shape[:2]
        values = weights.double().cpu().numpy()
        values[: max(-top, 0)] = values[side - max(top + side - rows, 0) :] = np.nan
        values[:, : max(-left, 0)] = values[:, side - max(left + side - columns, 0) :] = np.nan
        found[layer.name] = Attention(values, left, top)
    return found


def _table(rows: Sequence[Row]) -> str:
    head = ["network", "weights", "layer", "size", "mean", "mean norm", "variance of 3 components"]
    lines = []
    for row in rows:
        for layer in row["layers"]:
            explained, (height, width, channels) = layer["explained"], layer["size"]
            cells = [row["network"], row["weights"], layer["layer"], f"{channels}×{height}×{width}"]
            cells += [f"{layer['mean']:.3g}", f"{layer['norm']:.3g}"]
            cells += ["–" if explained is None else f"{sum(explained):.1%}"]
            lines.append([*cells, f"{layer['relative_log_amplitude'][-1]:.2f}"])
    return markdown_table([*head, "log amplitude at the highest frequency"], lines)


def _caption(image: str, scale: int, rows: Sequence[Row], lr: Image, query: tuple[int, int]) -> list[str]:
    height, width = lr.shape[:2]
    sentences = [
        f"Features that layers make of {image}: its centre, LR {width}×{height} at "
        f"×{scale} by Pillow's bicubic filter. Channel mean (signed) and L2 norm over channels, "
        "on logarithmic colour scales that are one for the figure, the mean's linear around 0. Principal "
        "components: the first three as red, green and blue, 1st to 99th percentile, one basis for all "
        "layers of a network that have equally many channels. Relative log amplitude: mean over channels and "
        "directions of log10(|FFT2| + 1e-8), minus that at frequency 0."
    ]
    if any(row["attention"] for row in rows):
        sentences.append(
            f"Attention: after softmax, mean over heads, of the query at x {query[0]}, y {query[1]} of the "
            "LR image; its window is outlined; a logarithmic scale."
        )
    without = [row["network"] for row in rows if not row["attention"]]
    if without:
        sentences.append(f"No attention by windows was seen in {', '.join(without)}.")
    return [*sentences, "How ESC's authors drew features was not found; these definitions are ours."]
