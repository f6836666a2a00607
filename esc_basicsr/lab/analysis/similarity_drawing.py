"""Pictures of inter-layer similarity: heat maps of all pairs, and adjacent layers along the network."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from esc_basicsr.lab.analysis.similarity import Matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["Panel", "draw"]


class Panel(NamedTuple):
    """What is shown of one network.

    Attributes:
        label: The network's name.
        groups: Each layer's group.
        title: What ``features`` are.
        features: CKA of all pairs of layers.
        maps: Cosine of their attention maps; None if it has none.
        uniform: Cosine of each with a uniform map, on the keys shared with another.
        centred: Cosine after subtracting means.
    """

    label: str
    groups: Sequence[str]
    title: str
    features: Matrix
    maps: Matrix | None
    uniform: Matrix | None
    centred: Matrix | None


def draw(panels: Sequence[Panel], caption: str) -> "Figure":
    """A row for each network: CKA, cosine of maps, and adjacent layers.

    Args:
        panels: Networks.
        caption: What stands below.
    """
    from matplotlib.figure import Figure

    width = 13.0
    figure = Figure(figsize=(width, 3.9 * len(panels) + 1.8), layout="constrained")
    axes = figure.subplots(len(panels), 3, squeeze=False, gridspec_kw={"width_ratios": [1, 1, 1.5]})
    for panel, (features, maps, curve) in zip(panels, axes, strict=True):
        image = _heat(features, panel, f"{textwrap.fill(panel.label, 45)}\n{panel.title}", panel.features)
        if panel.maps is None:
            maps.axis("off")
            maps.text(0.5, 0.5, "no attention maps", ha="center", fontsize=9)
        else:
            _heat(maps, panel, "cosine of attention maps, by pixel", panel.maps)
        figure.colorbar(image, ax=maps, shrink=0.8)
        _adjacent(curve, panel)
    labelled = max(axes[:, 2], key=lambda axis: len(axis.get_lines()))
    figure.legend(*labelled.get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=8)
    figure.supxlabel(textwrap.fill(caption, int(15.5 * width)), fontsize=8, x=0.02, ha="left")
    return figure


def _boundaries(panel: Panel) -> list[int]:
    """Layers, counted from 0, that begin a group."""
    groups = panel.groups
    return [number for number in range(1, len(groups)) if groups[number] != groups[number - 1]]


def _heat(axis: "Axes", panel: Panel, title: str, matrix: Matrix) -> "AxesImage":
    count = len(matrix)
    image = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis", extent=(0.5, count + 0.5, count + 0.5, 0.5))
    for boundary in _boundaries(panel):
        axis.axhline(boundary + 0.5, color="white", linewidth=0.6)
        axis.axvline(boundary + 0.5, color="white", linewidth=0.6)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("layer", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.locator_params(integer=True)
    return image


def _adjacent(axis: "Axes", panel: Panel) -> None:
    count = len(panel.groups)
    first = np.arange(count - 1)
    curves = {f"{panel.title}": (panel.features[first, first + 1], "C0-o")}
    if panel.maps is not None and panel.uniform is not None and panel.centred is not None:
        uniform = (panel.uniform[first, first + 1] + panel.uniform[first + 1, first]) / 2
        curves |= {
            "cosine of maps": (panel.maps[first, first + 1], "C1-o"),
            "cosine with a uniform map": (uniform, "C1--"),
            "centred cosine of maps": (panel.centred[first, first + 1], "C1:"),
        }
    for label, (values, style) in curves.items():
        axis.plot(first + 1.5, values, style, label=label, markersize=3)
    for boundary in _boundaries(panel):
        axis.axvline(boundary + 0.5, color="gray", linewidth=0.6, label="_between groups")
    axis.locator_params(axis="x", integer=True)
    axis.set_xlim(0.5, count + 0.5)
    axis.set_ylim(
        min(0, *(float(np.nanmin(values, initial=0)) for values, _ in curves.values())) - 0.02, 1.02
    )
    axis.set_xlabel("layer; a point between two adjacent ones, lines between groups", fontsize=8)
    axis.set_ylabel("similarity of adjacent layers", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
