"""Inter-layer similarity: how much adjacent attention layers repeat each other.

Measured on photographs, for all pairs of a network's attention layers: linear CKA of the features that
attention extracts, and cosine of the attention maps; beside them what tells how much such a number says: the
cosine with a uniform map, the cosine after subtracting means, layers two apart, and the same network with
random weights.

  python -m esc_basicsr analyze similarity --network SwinIR-light -o DIR
  python -m esc_basicsr analyze similarity --network a.pth --modules "layers.*.attn" --images Set5 -o DIR

A network is what 'python -m esc_basicsr bench --help' lists. Photographs are high-resolution ones: their
central parts are reduced by Pillow's bicubic filter. Writes similarity.json, similarity.md and
similarity.png.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from esc_basicsr.common.errors import UserError
from esc_basicsr.lab.analysis.attention_maps import (
    Layer,
    attention_names,
    group_of,
    locate,
    refuse_compiled,
    see,
    tile_of,
)
from esc_basicsr.lab.analysis.crops import central_lr
from esc_basicsr.lab.analysis.images import Pixels, add_images_argument, image_names, to_tensor
from esc_basicsr.lab.analysis.networks import (
    Subject,
    add_network_arguments,
    note_on_failures,
    note_on_weights,
    of_those_that_work,
    subjects_of,
)
from esc_basicsr.lab.analysis.random_twins import random_twin
from esc_basicsr.lab.analysis.similarity import (
    LEAST_ROWS,
    ImageCKA,
    MapSimilarity,
    Matrix,
    PixelCKA,
    centred_cosine,
    cosine,
    uniform_cosine,
)
from esc_basicsr.lab.analysis.similarity_drawing import Panel, draw
from esc_basicsr.lab.measure.measure import describe_machine
from esc_basicsr.lab.measure.report import make_folder, markdown_table, write_report

_SIZE = 128
_ROWS = ("pixels", "images")
_TITLES = {
    "cka": "CKA of features",
    "cka_unbiased": "CKA, unbiased",
    "map_pixel": "cosine of maps, by pixel",
    "map_window": "cosine of maps, mean window",
    "map_relative": "cosine of maps, by displacement",
}


@dataclass(frozen=True)
class Statistic:
    """One way to compare layers.

    Attributes:
        pairs: Of all pairs of layers, (layers, layers); NaN where it is undefined.
        uniform: For maps, of each layer's with a uniform one, on the keys shared with another layer.
        centred: For maps, after subtracting means.
    """

    pairs: Matrix
    uniform: Matrix | None = None
    centred: Matrix | None = None

    def figures(self, groups: Sequence[str]) -> dict[str, float | None]:
        """Means over pairs of layers: adjacent, adjacent within groups, two apart; None if undefined."""
        layers = range(len(self.pairs))
        adjacent = [(i, i + 1) for i in layers[:-1]]
        within = [(i, j) for i, j in adjacent if groups[i] == groups[j]]
        both_ways = adjacent + [(j, i) for i, j in adjacent]
        return {
            "adjacent": _mean(self.pairs, adjacent),
            "within_groups": _mean(self.pairs, within),
            "two_apart": _mean(self.pairs, [(i, i + 2) for i in layers[:-2]]),
            "uniform": _mean(self.uniform, both_ways),
            "centred": _mean(self.centred, adjacent),
        }


@dataclass(frozen=True)
class Measured:
    """What was found of one network.

    Attributes:
        subject: The network.
        layers: Its attention layers, in order.
        statistics: By their keys, those of `_TITLES`.
        seconds: What it took.
    """

    subject: Subject
    layers: Sequence[str]
    statistics: dict[str, Statistic]
    seconds: float

    @property
    def groups(self) -> list[str]:
        """Each layer's group."""
        return [group_of(name) for name in self.layers]


def _mean(matrix: Matrix | None, pairs: Sequence[tuple[int, int]]) -> float | None:
    if matrix is None or not pairs:
        return None
    mean = float(np.mean([matrix[pair] for pair in pairs]))
    return mean if np.isfinite(mean) else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the analysis' arguments."""
    add_network_arguments(parser)
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
    jobs: list[tuple[Subject, list[Layer]]] = []
    tiles, least = [], 1
    for subject in subjects_of(args):
        refuse_compiled(subject)
        modules = attention_names(subject.net, subject.name, args.modules)
        if len(modules) < 2:
            raise UserError(f"{subject.name}: layers are compared, and there is but one: {modules[0]}.")
        layers = locate(subject, modules)
        tiles.append(tile_of(subject.net, modules))
        least = max(least, tiles[-1] * (2 if any(layer.shift for layer in layers) else 1))
        jobs.append((subject, layers))
        twin = random_twin(subject)
        if twin is not None:
            jobs.append((twin, layers))
    # the same parts of the photographs for all networks
    images = [central_lr(name, args.size, math.lcm(*tiles), least, jobs[0][0].scale) for name in names]
    sizes = sorted({image.shape[:2] for image in images})
    if args.rows == "images" and len(sizes) > 1:
        raise UserError(
            f"--rows images needs LR images of one size, got {', '.join(f'{w}×{h}' for h, w in sizes)}. "
            "Leave some out, or ask for a smaller --size."
        )
    make_folder(args.output)
    with tqdm(total=len(jobs) * len(images), desc="similarity", unit="image") as bar:
        found, failures = of_those_that_work(lambda job: _measure(*job, images, args, bar), jobs)
    caption = _caption(args, found, names) + note_on_failures(failures)
    text = f"{_table(found)}\n\n{caption}"
    print(text)
    settings = {
        "images": names,
        "lr_sizes": sizes,
        "scale": jobs[0][0].scale,
        "rows": args.rows,
        "batch": args.batch if args.rows == "images" else None,
        "machine": describe_machine(torch.device(args.device)),
    }
    results = {"settings": settings, "rows": [_row(measured) for measured in found]}
    write_report(args.output, "similarity", results, text, draw([_panel(one) for one in found], caption))
    if failures:
        raise UserError(failures)
    return 0


def _measure(
    subject: Subject,
    layers: Sequence[Layer],
    images: Sequence[Pixels],
    args: argparse.Namespace,
    bar: "tqdm[Any]",
) -> Measured:
    """Compare one network's layers."""
    start = time.perf_counter()
    bar.set_postfix_str(subject.label)
    names = [layer.name for layer in layers]
    maps: MapSimilarity | None = MapSimilarity(len(names))
    pixels, wholes = PixelCKA(names), ImageCKA(names)
    whole = args.rows == "images"
    count = max(len(images) // args.batch, 1) if whole else len(images)
    try:
        for batch in np.array_split(np.arange(len(images)), count):
            kept: list[list[Tensor]] = [[] for _ in names]
            for index in batch:
                image = images[index]
                seen = see(subject, layers, to_tensor(image, torch.device(args.device)))
                for name, features in zip(names, kept, strict=True):
                    _check_size(subject, name, seen[name].features, image)
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
    except ValueError as error:
        raise UserError(f"{subject.name}: {error}. Try other --modules or --images.") from error
    if maps is not None:
        statistics |= _map_statistics(maps)
    return Measured(subject, names, statistics, time.perf_counter() - start)


def _check_size(subject: Subject, name: str, features: Tensor, image: Pixels) -> None:
    if features.shape[:2] != image.shape[:2]:
        raise UserError(
            f"{subject.name}: {name} has {tuple(features.shape[:2])} pixels of an image of "
            f"{image.shape[:2]}, and cannot be compared pixel by pixel. Leave it out of --modules."
        )


def _map_statistics(maps: MapSimilarity) -> dict[str, Statistic]:
    statistics = {"map_pixel": Statistic(maps.pixel(), maps.pixel_uniform(), maps.pixel_centred())}
    for key, means in (("map_window", maps.window_means()), ("map_relative", maps.displacement_means())):
        uniform = np.array([[uniform_cosine(a)] * len(means) for a in means])
        statistics[key] = Statistic(_of_pairs(cosine, means), uniform, _of_pairs(centred_cosine, means))
    return statistics


def _of_pairs(compare: Callable[[Tensor, Tensor], float], means: Sequence[Tensor]) -> Matrix:
    """Compare all pairs; NaN where windows differ in size."""
    matrix = np.full((len(means), len(means)), np.nan)
    for i, a in enumerate(means):
        for j, b in enumerate(means[: i + 1]):
            if a.shape == b.shape:
                matrix[i, j] = matrix[j, i] = compare(a, b)
    return matrix


def _row(measured: Measured) -> dict[str, Any]:
    """What the JSON file has of a network."""
    statistics = {
        key: statistic.figures(measured.groups) | {"pairs": _listed(statistic.pairs)}
        for key, statistic in measured.statistics.items()
    }
    return {
        "network": measured.subject.network,
        "weights": measured.subject.weights,
        "params": measured.subject.params,
        "layers": list(measured.layers),
        "groups": measured.groups,
        "statistics": statistics,
        "seconds": measured.seconds,
    }


def _listed(matrix: Matrix) -> list[list[float | None]]:
    """As JSON has it, which knows no NaN."""
    return [[float(value) if np.isfinite(value) else None for value in row] for row in matrix]


def _panel(measured: Measured) -> Panel:
    kept = measured.statistics
    features = "cka" if "cka" in kept else "cka_unbiased"
    maps = kept.get("map_pixel")
    return Panel(
        measured.subject.label,
        measured.groups,
        _TITLES[features],
        kept[features].pairs,
        None if maps is None else maps.pairs,
        None if maps is None else maps.uniform,
        None if maps is None else maps.centred,
    )


def _table(found: Sequence[Measured]) -> str:
    head = ["network", "weights", "statistic", "adjacent layers", "within groups", "l and l+2"]
    lines = []
    for measured in found:
        for key, statistic in measured.statistics.items():
            figures = statistic.figures(measured.groups).values()
            shown = [f"{100 * value:.2f} %" if value is not None else "–" for value in figures]
            lines.append([measured.subject.network, measured.subject.weights, _TITLES[key], *shown])
    return markdown_table([*head, "with a uniform map", "centred"], lines)


def _caption(args: argparse.Namespace, found: Sequence[Measured], images: Sequence[str]) -> str:
    pairs = ", ".join(dict.fromkeys(f"{one.subject.network}: {_pairs(one)}" for one in found))
    rows = "pixels, pooled over images" if args.rows == "pixels" else "whole images"
    features = "what attention's output projection gives, before it is added to the residual"
    if args.modules is not None:
        features = f"what {' and '.join(args.modules)} give"
    parts = [
        f"Similarity of attention layers on {len(images)} photographs, LR at most {args.size} a side by "
        f"Pillow's bicubic filter. Means over pairs of adjacent layers, of those within a group, and of "
        f"layers two apart ({pairs}). CKA: linear, of {features}; rows are {rows}; unbiased: HSIC1, summed "
        "over "
        + ("images" if args.rows == "pixels" else f"batches of at least {args.batch} images")
        + ", then divided.",
        "Maps: after softmax, mean over heads. By pixel: each query's row in image coordinates, on the keys "
        "that both layers' windows have (a regular and a shifted one share a quarter, equal ones all, so "
        "that l and l+2 are compared on more keys), cosine of each, mean. Mean window: of maps averaged over "
        "images and unmasked windows; by displacement: of those averaged by key minus query. With a uniform "
        "map, and centred (each map's mean subtracted): of adjacent layers.",
        "ESC (arXiv:2503.06671) reports 87 % (CKA) and 89 % (cosine) for adjacent layers of trained "
        "SwinIR-light; its scale, images and definitions were not found, and these are ours.",
    ]
    without = dict.fromkeys(one.subject.network for one in found if "map_pixel" not in one.statistics)
    if without:
        parts.append(
            f"No attention maps by windows were seen in every layer of {', '.join(without)}: there is no "
            "softmax, or none that can be seen."
        )
    random = [one.subject for one in found if one.subject.weights == "random"]
    if random:
        parts.append(note_on_weights(random))
    return " ".join(parts)


def _pairs(measured: Measured) -> str:
    groups = measured.groups
    adjacent = len(groups) - 1
    within = sum(a == b for a, b in itertools.pairwise(groups))
    return f"{adjacent}, {within} and {adjacent - 1}"
