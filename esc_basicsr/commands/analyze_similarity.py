"""Inter-layer similarity: how much adjacent attention layers repeat each other.

Measured on images, for all pairs of a network's attention layers: linear CKA of the features that
attention extracts, and cosine of the attention maps; beside them what tells how much such a number says: the
cosine with a uniform map, the cosine after subtracting means, layers two apart, and the same network with
random weights.

  python -m esc_basicsr analyze similarity --network SwinIR-light -o DIR
  python -m esc_basicsr analyze similarity --network a.pth --modules "layers.*.attn" --images Set5 -o DIR

A network is what 'python -m esc_basicsr bench --help' lists. Images are high-resolution ones: their
central parts are reduced by Pillow's bicubic filter. Writes similarity.json, similarity.md and
similarity.png.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.lab.analysis.attention_maps import (
    Layer,
    attention_names,
    group_of,
    locate,
    refuse_compiled,
    see,
    tile_of,
)
from esc_basicsr.lab.analysis.drawing import Compared, draw_similarity
from esc_basicsr.lab.analysis.features import Values
from esc_basicsr.lab.analysis.images import add_images_argument, central_lr, image_names, to_tensor
from esc_basicsr.lab.analysis.networks import Bar, Row, Subject, analyze, subjects_of
from esc_basicsr.lab.analysis.random_twins import random_twin
from esc_basicsr.lab.analysis.similarity import (
    LEAST_ROWS,
    ImageCKA,
    MapSimilarity,
    PixelCKA,
    Statistic,
    centred_cosine,
    cosine,
    uniform_cosine,
)
from esc_basicsr.metrics.quality import Image

_SIZE = 128
_ROWS = ("pixels", "images")
_TITLES = {
    "cka": "CKA of features",
    "cka_unbiased": "CKA, unbiased",
    "map_pixel": "cosine of maps, by pixel",
    "map_window": "cosine of maps, mean window",
    "map_relative": "cosine of maps, by displacement",
}


def _figures(statistic: Statistic, groups: Sequence[str]) -> dict[str, float | None]:
    """Average over pairs of layers: adjacent, adjacent within groups, two apart; None if undefined."""
    layers = range(len(groups))
    adjacent = list(itertools.pairwise(layers))
    within = [(i, j) for i, j in adjacent if groups[i] == groups[j]]
    both_ways = adjacent + [(j, i) for i, j in adjacent]
    return {
        "adjacent": _mean(statistic.pairs, adjacent),
        "within_groups": _mean(statistic.pairs, within),
        "two_apart": _mean(statistic.pairs, [(i, i + 2) for i in layers[:-2]]),
        "uniform": _mean(statistic.uniform, both_ways),
        "centred": _mean(statistic.centred, adjacent),
    }


def _mean(matrix: Values | None, pairs: Sequence[tuple[int, int]]) -> float | None:
    if matrix is None or not pairs:
        return None
    mean = float(np.mean([matrix[pair] for pair in pairs]))
    return mean if np.isfinite(mean) else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the analysis' arguments."""
    parser.add_argument(
        "--modules",
        nargs="+",
        metavar="PATTERN",
        help="names of the attention modules, with * (default: those of SwinIR's, ESC's, HiT-SRF's, "
        "MambaIRv2's, HAT's, DRCT's, Swin2SR's and ATD's kinds)",
    )
    add_images_argument(parser)
    parser.add_argument(
        "--size",
        type=int,
        default=_SIZE,
        help=f"longest side of the LR images, which are cut to whole windows (default: {_SIZE})",
    )
    parser.add_argument(
        "--rows",
        choices=_ROWS,
        default=_ROWS[0],
        help="what CKA's examples are: pixels (default), or whole images, as arXiv:2010.15327 has it, in "
        "batches; this needs many images of one size",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=8,
        help="images of a batch, with --rows images; those that are left over go with others (default: 8)",
    )


def run(args: argparse.Namespace) -> int:
    """Compare each network's layers, print a table, write the report."""
    if args.batch < LEAST_ROWS:
        raise UserError(f"--batch must be at least {LEAST_ROWS}, got {args.batch}.")
    names = image_names(args.images)
    if args.rows == "images" and len(names) < LEAST_ROWS:
        raise UserError(f"--rows images needs at least {LEAST_ROWS} images, got {len(names)}.")
    subjects: list[tuple[Subject, list[Layer]]] = []
    tiles, least = [], 1
    for subject in subjects_of(args):
        refuse_compiled(subject)
        modules = attention_names(subject.net, subject.name, args.modules)
        if len(modules) < 2:
            raise UserError(f"{subject.name}: layers are compared, and there is but one: {modules[0]}.")
        layers = locate(subject, modules)
        tiles.append(tile_of(subject.net, modules))
        least = max(least, tiles[-1] * (2 if any(layer.shift for layer in layers) else 1))
        subjects += [(one, layers) for one in (subject, random_twin(subject)) if one is not None]
    scale = subjects[0][0].scale
    # the same parts of the images for all networks
    images = [central_lr(name, args.size, math.lcm(*tiles), least, scale) for name in names]
    sizes = sorted({image.shape[:2] for image in images})
    if args.rows == "images" and len(sizes) > 1:
        raise UserError(
            f"--rows images needs LR images of one size, got {', '.join(f'{w}×{h}' for h, w in sizes)}. "
            "Leave some out, or ask for a smaller --size."
        )
    return analyze(
        args,
        "similarity",
        [(subject, partial(_measure, subject, layers, images, args)) for subject, layers in subjects],
        steps=len(subjects) * len(images),
        table=_table,
        caption=lambda rows: _caption(args, rows, len(images)),
        settings={
            "images": names,
            "lr_sizes": sizes,
            "scale": scale,
            "rows": args.rows,
            "batch": args.batch if args.rows == "images" else None,
        },
        draw=draw_similarity,
    )


def _measure(
    subject: Subject, layers: list[Layer], images: Sequence[Image], args: argparse.Namespace, bar: Bar
) -> tuple[Row, Compared]:
    """Compare one network's layers."""
    names = [layer.name for layer in layers]
    try:
        statistics = _statistics(subject, layers, images, args, bar)
    except ValueError as error:
        raise UserError(f"{subject.name}: {error}. Try other --modules or --images.") from error
    groups = [group_of(name) for name in names]
    figures = {
        key: _figures(statistic, groups) | {"pairs": _listed(statistic.pairs)}
        for key, statistic in statistics.items()
    }
    features = next(iter(statistics))
    compared = Compared(
        subject.label, groups, _TITLES[features], statistics[features].pairs, statistics.get("map_pixel")
    )
    return {"layers": names, "groups": groups, "statistics": figures}, compared


def _statistics(
    subject: Subject, layers: list[Layer], images: Sequence[Image], args: argparse.Namespace, bar: Bar
) -> dict[str, Statistic]:
    names = [layer.name for layer in layers]
    maps: MapSimilarity | None = MapSimilarity(len(names))
    pixels, wholes = PixelCKA(names), ImageCKA(names)
    whole = args.rows == "images"
    count = max(len(images) // args.batch, 1) if whole else len(images)
    for batch in np.array_split(np.arange(len(images)), count):
        kept: list[list[Tensor]] = [[] for _ in names]
        for index in batch:
            seen = see(subject, layers, to_tensor(images[index], torch.device(args.device)))
            for name, features in zip(names, kept, strict=True):
                _check_size(subject, name, seen[name].features, images[index])
                features.append(seen[name].features)
            all_maps = [found for name in names if (found := seen[name].maps) is not None]
            if maps is not None and len(all_maps) == len(names):
                maps.update(all_maps)
            else:
                maps = None
            bar.update()
        if whole:
            wholes.update(kept)
        else:
            pixels.update([features[0].flatten(0, 1) for features in kept])
    statistics = {} if whole else {"cka": Statistic(pixels.biased())}
    statistics["cka_unbiased"] = Statistic((wholes if whole else pixels).unbiased())
    if maps is not None:
        statistics["map_pixel"] = maps.pixel()
        for key, means in (("map_window", maps.window_means()), ("map_relative", maps.displacement_means())):
            uniform = np.array([[uniform_cosine(a)] * len(means) for a in means])
            statistics[key] = Statistic(_of_pairs(cosine, means), uniform, _of_pairs(centred_cosine, means))
    return statistics


def _check_size(subject: Subject, name: str, features: Tensor, image: Image) -> None:
    if features.shape[:2] != image.shape[:2]:
        raise UserError(
            f"{subject.name}: {name} has {tuple(features.shape[:2])} pixels of an image of "
            f"{image.shape[:2]}, and cannot be compared pixel by pixel. Leave it out of --modules."
        )


def _of_pairs(compare: Callable[[Tensor, Tensor], float], means: Sequence[Tensor]) -> Values:
    """Compare all pairs; NaN where windows differ in size."""
    matrix = np.full((len(means), len(means)), np.nan)
    for i, a in enumerate(means):
        for j, b in enumerate(means[: i + 1]):
            if a.shape == b.shape:
                matrix[i, j] = matrix[j, i] = compare(a, b)
    return matrix


def _listed(matrix: Values) -> list[list[float | None]]:
    """Convert a matrix to what JSON has, which knows no NaN."""
    return [[float(value) if np.isfinite(value) else None for value in row] for row in matrix]


def _table(rows: Sequence[Row]) -> str:
    head = ["network", "weights", "statistic", "adjacent layers", "within groups", "l and l+2"]
    lines = []
    for row in rows:
        for key, statistic in row["statistics"].items():
            figures = [value for name, value in statistic.items() if name != "pairs"]
            shown = [f"{100 * value:.2f} %" if value is not None else "–" for value in figures]
            lines.append([row["network"], row["weights"], _TITLES[key], *shown])
    return markdown_table([*head, "with a uniform map", "centred"], lines)


def _caption(args: argparse.Namespace, rows: Sequence[Row], images: int) -> list[str]:
    pairs = ", ".join(dict.fromkeys(f"{row['network']}: {_pairs(row['groups'])}" for row in rows))
    examples = "pixels, pooled over images" if args.rows == "pixels" else "whole images"
    batches = "images" if args.rows == "pixels" else f"batches of at least {args.batch} images"
    features = "what attention's output projection gives, before it is added to the residual"
    if args.modules is not None:
        features = f"what {' and '.join(args.modules)} give"
    sentences = [
        f"Similarity of attention layers on {images} images, LR at most {args.size} a side by "
        f"Pillow's bicubic filter. Means over pairs of adjacent layers, of those within a group, and of "
        f"layers two apart ({pairs}). CKA: linear, of {features}; rows are {examples}; unbiased: HSIC1, "
        f"summed over {batches}, then divided.",
        "Maps: after softmax, mean over heads. By pixel: each query's row in image coordinates, on the keys "
        "that both layers' windows have (a regular and a shifted one share a quarter, equal ones all, so "
        "that l and l+2 are compared on more keys), cosine of each, mean. Mean window: of maps averaged over "
        "images and unmasked windows; by displacement: of those averaged by key minus query. With a uniform "
        "map, and centred (each map's mean subtracted): of adjacent layers.",
        "ESC (arXiv:2503.06671) reports 87 % (CKA) and 89 % (cosine) for adjacent layers of trained "
        "SwinIR-light; its scale, images and definitions were not found, and these are ours.",
    ]
    without = dict.fromkeys(row["network"] for row in rows if "map_pixel" not in row["statistics"])
    if without:
        sentences.append(
            f"No attention maps by windows were seen in every layer of {', '.join(without)}: there is no "
            "softmax, or none that can be seen."
        )
    return sentences


def _pairs(groups: Sequence[str]) -> str:
    adjacent = len(groups) - 1
    within = sum(a == b for a, b in itertools.pairwise(groups))
    return f"{adjacent}, {within} and {adjacent - 1}"
