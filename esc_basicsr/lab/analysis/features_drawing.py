"""Pictures of feature maps: a block of rows for each network, a column for each layer."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from esc_basicsr.lab.analysis.features import Values
from esc_basicsr.lab.analysis.images import Pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure, SubFigure

__all__ = ["Drawn", "Glance", "View", "draw"]

_PERCENTILES = (1, 99)
_COLOURS = ("RdBu_r", "magma", "inferno")
# of the largest value, where a logarithmic scale begins
_LEAST = 1e-3
_TINY = 1e-12


class View(NamedTuple):
    """What is shown of a layer.

    Attributes:
        mean: Channels' mean, (H, W).
        norm: Channels' norm, (H, W).
        colours: Principal components, (H, W, 3) in [0, 1]; None if there are fewer than three channels.
        frequencies: Cycles per pixel.
        spectrum: Relative log amplitude at each.
    """

    mean: Values
    norm: Values
    colours: Values | None
    frequencies: Values
    spectrum: Values


class Glance(NamedTuple):
    """What a query attends to.

    Attributes:
        weights: (w, w), without what is masked: NaN.
        left: Column where the window begins; negative if part of it lies beyond the image.
        top: Row where it begins.
    """

    weights: Values
    left: int
    top: int


class Drawn(NamedTuple):
    """What is shown of one network.

    Attributes:
        label: Its name.
        lr: The image that it is given, (H, W, 3).
        views: By layers' names.
        glances: By attention layers' names.
    """

    label: str
    lr: Pixels
    views: Mapping[str, View]
    glances: Mapping[str, Glance]


def draw(networks: Sequence[Drawn], query: tuple[int, int], caption: str) -> "Figure":
    """Each network's layers: mean, norm, principal components, spectra; and what one query attends to.

    Args:
        networks: At least one.
        query: Column and row of a pixel.
        caption: What stands below.
    """
    from matplotlib.figure import Figure

    scales = _scales(networks)
    columns = max(max(len(one.views), len(one.glances)) for one in networks)
    rows = [4 if one.glances else 3 for one in networks]
    width = max(1.9 * columns + 3.6, 10.0)
    figure = Figure(figsize=(width, 2.2 * sum(rows) + 0.4 * len(rows) + 1.2), layout="constrained")
    parts = figure.subfigures(len(networks) + 1, 1, squeeze=False, height_ratios=[*rows, 0.5])[:, 0]
    for part, network, count in zip(parts, networks, rows, strict=False):
        _draw_network(part, network, query, scales, count, columns)
    parts[-1].text(0.01, 0.9, textwrap.fill(caption, int(15 * width)), fontsize=8, va="top")
    return figure


def _scales(networks: Sequence[Drawn]) -> tuple["Normalize", "Normalize", "Normalize"]:
    """Colour scales of means, norms and attention, each for all networks and layers.

    They are logarithmic: a network's last features may be a hundred times as large as its first.
    """
    from matplotlib.colors import LogNorm, SymLogNorm

    views = [view for network in networks for view in network.views.values()]
    means = np.concatenate([abs(view.mean).ravel() for view in views])
    norms = np.concatenate([view.norm.ravel() for view in views])
    largest = max([np.nanmax(g.weights) for one in networks for g in one.glances.values()], default=1.0)
    low, high = np.percentile(means, _PERCENTILES)
    low, high = max(low, high * _LEAST, _TINY), max(high, 2 * _TINY)
    least, most = np.percentile(norms, _PERCENTILES)
    least, most = max(least, most * _LEAST, _TINY), max(most, 2 * _TINY)
    return (
        SymLogNorm(low, vmin=-high, vmax=high, clip=True),
        LogNorm(least, most, clip=True),
        LogNorm(largest * _LEAST, largest, clip=True),
    )


def _draw_network(
    figure: "SubFigure",
    network: Drawn,
    query: tuple[int, int],
    scales: tuple["Normalize", "Normalize", "Normalize"],
    rows: int,
    columns: int,
) -> None:
    from matplotlib.cm import ScalarMappable

    figure.suptitle(network.label, fontsize=10)
    grid = figure.add_gridspec(rows, columns + 2, width_ratios=[1.3] + [1] * columns + [0.07])
    axes = np.array([[figure.add_subplot(grid[r, c + 1]) for c in range(columns)] for r in range(rows)])
    for axis in axes.flat:
        axis.axis("off")
    image = figure.add_subplot(grid[0, 0])
    image.imshow(network.lr, interpolation="nearest")
    image.plot(*query, "r+", markersize=9)
    image.set_title(f"LR, {network.lr.shape[1]}×{network.lr.shape[0]}", fontsize=8)
    image.axis("off")
    spectra = figure.add_subplot(grid[1:3, 0])
    for column, (name, view) in enumerate(network.views.items()):
        axes[0, column].imshow(view.mean, cmap=_COLOURS[0], norm=scales[0])
        axes[0, column].set_title(_short(name), fontsize=8)
        axes[1, column].imshow(view.norm, cmap=_COLOURS[1], norm=scales[1])
        if view.colours is None:
            axes[2, column].text(0.5, 0.5, "fewer than 3 channels", ha="center", fontsize=7)
        else:
            axes[2, column].imshow(view.colours)
            axes[2, column].set_title("principal components", fontsize=7)
        spectra.plot(view.frequencies, view.spectrum, label=_short(name), linewidth=1)
    spectra.set_title("relative log amplitude", fontsize=8)
    spectra.set_xlabel("cycles per pixel", fontsize=7)
    spectra.tick_params(labelsize=7)
    spectra.grid(alpha=0.3)
    spectra.legend(fontsize=6)
    for column, (name, glance) in enumerate(network.glances.items()):
        _draw_glance(axes[3, column], network.lr, glance, query, scales[2])
        axes[3, column].set_title(f"attention of the query (+)\n{_short(name)}", fontsize=7)
    for row, label in ((0, "channel mean"), (1, "L2 norm"), (3, "attention weight")):
        if row < rows:
            norm, colours = (scales[min(row, 2)], _COLOURS[min(row, 2)])
            bar = figure.colorbar(ScalarMappable(norm, colours), cax=figure.add_subplot(grid[row, -1]))
            bar.set_label(label, fontsize=7)
            bar.ax.tick_params(labelsize=6)


def _draw_glance(
    axis: "Axes", lr: Pixels, glance: Glance, query: tuple[int, int], scale: "Normalize"
) -> None:
    from matplotlib.patches import Rectangle

    side = len(glance.weights)
    left, top = glance.left - 0.5, glance.top - 0.5
    extent = (left, left + side, top + side, top)
    axis.imshow(lr, interpolation="nearest", alpha=0.6)
    axis.imshow(glance.weights, cmap=_COLOURS[2], norm=scale, extent=extent, interpolation="nearest")
    axis.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="cyan", linewidth=1))
    axis.plot(*query, "c+", markersize=7)
    height, width = lr.shape[:2]
    axis.set_xlim(max(left - side, -0.5), min(left + 2 * side, width - 0.5))
    axis.set_ylim(min(top + 2 * side, height - 0.5), max(top - side, -0.5))


def _short(name: str) -> str:
    """A module's name without what all have: containers of containers."""
    return name.replace(".residual_group.", ".").removeprefix("model.")
