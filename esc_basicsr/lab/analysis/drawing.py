"""Figures of the analyses, several networks side by side: attribution, receptive fields, features, CKA."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL.Image import Resampling, fromarray

from esc_basicsr.lab.analysis.features import Values
from esc_basicsr.lab.analysis.local_attribution import Window, attribution_density
from esc_basicsr.lab.analysis.receptive_field import log_scaled, smallest_squares, square_shares
from esc_basicsr.lab.analysis.similarity import Statistic
from esc_basicsr.metrics.quality import Image


def _figure(width: float, height: float, caption: str) -> Figure:
    """Make a figure with a caption below."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.supxlabel(textwrap.fill(caption, int(15.5 * width)), fontsize=8, x=0.02, ha="left")
    return figure


def _label(axis: Axes, x: str, y: str, grid: bool = True) -> None:
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=7)
    if grid:
        axis.grid(alpha=0.3)


class Attributed(NamedTuple):
    """A network's attribution map."""

    label: str
    relative: Values  # (h, w), in [0, 1]
    diffusion_index: float
    sr: Image  # what the network makes of the window


_SHARE_OF_IMAGE = 0.5  # below an attribution map


def draw_attribution(
    hr: Image, lr: Image, window: Window, columns: Sequence[Attributed], caption: str
) -> Figure:
    """Draw the image, (H, W, 3), and its window; for each network map, density of the map, and window."""
    figure = _figure(max(2.7 * (1 + len(columns)) + 0.6, 6), 9.4, caption)
    axes = figure.subplots(3, 1 + len(columns), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    size = (hr.shape[1], hr.shape[0])
    enlarged = np.asarray(fromarray(lr).resize(size, Resampling.BICUBIC))
    left, top, side = window
    _show(axes[0, 0], hr, "image, and the window")
    axes[0, 0].add_patch(
        Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor="red", linewidth=1.5)
    )
    _show(axes[1, 0], lr, f"LR, {lr.shape[1]}×{lr.shape[0]}")
    _show(axes[2, 0], hr[top : top + side, left : left + side], "window, image")
    # seismic's upper half, white to red, is where the source draws maps: at 0.5 + v / 2
    colours = ListedColormap(colormaps["seismic"](np.linspace(0.5, 1, 256)))

    def over_image(values: Values, resampling: Resampling) -> Values:
        resized = fromarray(values.astype(np.float32)).resize(size, resampling)
        coloured = colours(np.clip(np.asarray(resized, np.float64), 0, 1))[..., :3]
        return (1 - _SHARE_OF_IMAGE) * coloured + _SHARE_OF_IMAGE * enlarged / 255

    for shown, column in zip(axes[:, 1:].T, columns, strict=True):
        title = f"{textwrap.fill(column.label, 30)}\ndiffusion index {column.diffusion_index:.2f}"
        _show(shown[0], over_image(column.relative, Resampling.NEAREST), title)
        try:
            density = attribution_density(column.relative)
        except ValueError as error:
            shown[1].text(0.5, 0.5, textwrap.fill(f"no density: {error}", 24), ha="center", fontsize=8)
        else:
            _show(shown[1], over_image(density, Resampling.BICUBIC), "density of the attribution")
        _show(shown[2], column.sr, "window, output")
    figure.colorbar(
        ScalarMappable(cmap=colours), ax=axes[:2, -1], shrink=0.6, label="over the maximum", aspect=30
    )
    return figure


def _show(axis: Axes, image: Image | Values, title: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize=9)


class Field(NamedTuple):
    """A network's receptive field."""

    label: str
    values: Values  # (h, w), not negative, not zero everywhere
    centre: tuple[int, int]  # row and column


_OUTLINED = {0.5: "solid", 0.99: "dotted"}


def draw_fields(fields: Sequence[Field], caption: str) -> Figure:
    """Draw each field as RepLKNet and as MambaIR do, with the squares that hold 50 % and 99 %; all shares."""
    figure = _figure(max(2.9 * len(fields) + 4.5, 7.5), 7.4, caption)
    ratios = [1] * len(fields) + [1.3]
    axes = figure.subplots(2, len(fields) + 1, squeeze=False, gridspec_kw={"width_ratios": ratios})
    for field, pair in zip(fields, axes[:, :-1].T, strict=True):
        logarithm = log_scaled(field.values)
        scaled = {
            "log10(S + 1) over its maximum": (logarithm, logarithm / logarithm.max()),
            "fourth root of S over its maximum": (field.values, (field.values / field.values.max()) ** 0.25),
        }
        for axis, (title, (held, shown)) in zip(pair, scaled.items(), strict=True):
            row, column = field.centre
            height, span = shown.shape
            extent = (-column - 0.5, span - column - 0.5, height - row - 0.5, -row - 0.5)
            axis.imshow(shown, cmap="RdYlGn", vmin=0, vmax=1, extent=extent)
            squares = smallest_squares(held, field.centre, list(_OUTLINED))
            for style, (side, _) in zip(_OUTLINED.values(), squares, strict=True):
                axis.add_patch(
                    Rectangle((-side / 2, -side / 2), side, side, fill=False, linestyle=style, linewidth=1)
                )
            axis.set_xlim(extent[0], extent[1])
            axis.set_ylim(extent[2], extent[3])
            axis.set_title(title, fontsize=8)
            axis.tick_params(labelsize=7)
        pair[0].set_title(f"{textwrap.fill(field.label, 32)}\n{pair[0].get_title()}", fontsize=8)
    for axis, kind in zip(axes[:, -1], ("log", "raw"), strict=True):
        for field in fields:
            values = log_scaled(field.values) if kind == "log" else field.values
            shares, squares = square_shares(values, field.centre)
            axis.plot([square.side for square in squares], 100 * shares, label=field.label)
        _label(axis, "side of the centred square (LR pixels)", f"share of the {kind} field (%)")
        axis.set_ylim(0, 102)
        axis.legend(fontsize=7)
    return figure


class View(NamedTuple):
    """A layer's features, as they are drawn."""

    mean: Values  # over channels, (H, W)
    norm: Values  # over channels, (H, W)
    colours: Values | None  # principal components, (H, W, 3) in [0, 1]; None of fewer than three channels
    frequencies: Values  # cycles per pixel
    spectrum: Values  # relative log amplitude at each


class Attention(NamedTuple):
    """The attention of a query."""

    weights: Values  # (w, w), without what is masked: NaN
    left: int  # column where the window begins; negative if part of it lies beyond the image
    top: int  # row where it begins


class Featured(NamedTuple):
    """A network's layers of two kinds, by their names, and the image that it is given."""

    label: str
    lr: Image
    views: Mapping[str, View]
    attention: Mapping[str, Attention]


_PERCENTILES = (1, 99)
_COLOURS = ("RdBu_r", "magma", "inferno")
_LEAST = 1e-3  # of the largest value, where a logarithmic scale begins
_TINY = 1e-12
Scales = tuple[Normalize, Normalize, Normalize]


def draw_features(networks: Sequence[Featured], query: tuple[int, int], caption: str) -> Figure:
    """Draw each network's layers: mean, norm, components, spectra; and what a query, (x, y), attends to."""
    scales = _scales(networks)
    columns = max(max(len(one.views), len(one.attention)) for one in networks)
    rows = [4 if one.attention else 3 for one in networks]
    figure = _figure(max(1.9 * columns + 3.6, 10.0), 2.2 * sum(rows) + 0.4 * len(rows) + 1.2, caption)
    parts = figure.subfigures(len(networks), 1, squeeze=False, height_ratios=rows)[:, 0]
    for part, network, count in zip(parts, networks, rows, strict=True):
        _draw_network(part, network, query, scales, count, columns)
    return figure


def _scales(networks: Sequence[Featured]) -> Scales:
    """Make colour scales of means, norms and attention, each for all networks and layers.

    They are logarithmic: a network's last features may be a hundred times as large as its first.
    """
    views = [view for network in networks for view in network.views.values()]
    means = np.concatenate([abs(view.mean).ravel() for view in views])
    norms = np.concatenate([view.norm.ravel() for view in views])
    largest = max([np.nanmax(a.weights) for one in networks for a in one.attention.values()], default=1.0)
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
    figure: SubFigure, network: Featured, query: tuple[int, int], scales: Scales, rows: int, columns: int
) -> None:
    figure.suptitle(network.label, fontsize=10)
    grid = figure.add_gridspec(rows, columns + 2, width_ratios=[1.3] + [1] * columns + [0.07])
    axes = np.array([[figure.add_subplot(grid[r, c + 1]) for c in range(columns)] for r in range(rows)])
    image = figure.add_subplot(grid[0, 0])
    for axis in (*axes.flat, image):
        axis.axis("off")
    image.imshow(network.lr, interpolation="nearest")
    image.plot(*query, "r+", markersize=9)
    image.set_title(f"LR, {network.lr.shape[1]}×{network.lr.shape[0]}", fontsize=8)
    spectra = figure.add_subplot(grid[1:3, 0])
    for column, (name, view) in enumerate(network.views.items()):
        for row, values in enumerate((view.mean, view.norm)):
            axes[row, column].imshow(values, cmap=_COLOURS[row], norm=scales[row])
        axes[0, column].set_title(_short(name), fontsize=8)
        if view.colours is None:
            axes[2, column].text(0.5, 0.5, "fewer than 3 channels", ha="center", fontsize=7)
        else:
            axes[2, column].imshow(view.colours)
            axes[2, column].set_title("principal components", fontsize=7)
        spectra.plot(view.frequencies, view.spectrum, label=_short(name), linewidth=1)
    spectra.set_title("relative log amplitude", fontsize=8)
    _label(spectra, "cycles per pixel", "")
    spectra.legend(fontsize=6)
    for column, (name, attention) in enumerate(network.attention.items()):
        _draw_attention(axes[3, column], network.lr, attention, query, scales[2])
        axes[3, column].set_title(f"attention of the query (+)\n{_short(name)}", fontsize=7)
    for row, label in ((0, "channel mean"), (1, "L2 norm"), (3, "attention weight")):
        if row < rows:
            norm, colours = scales[min(row, 2)], _COLOURS[min(row, 2)]
            bar = figure.colorbar(ScalarMappable(norm, colours), cax=figure.add_subplot(grid[row, -1]))
            bar.set_label(label, fontsize=7)
            bar.ax.tick_params(labelsize=6)


def _draw_attention(
    axis: Axes, lr: Image, attention: Attention, query: tuple[int, int], scale: Normalize
) -> None:
    side = len(attention.weights)
    left, top = attention.left - 0.5, attention.top - 0.5
    extent = (left, left + side, top + side, top)
    axis.imshow(lr, interpolation="nearest", alpha=0.6)
    axis.imshow(attention.weights, cmap=_COLOURS[2], norm=scale, extent=extent, interpolation="nearest")
    axis.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="cyan", linewidth=1))
    axis.plot(*query, "c+", markersize=7)
    height, width = lr.shape[:2]
    axis.set_xlim(max(left - side, -0.5), min(left + 2 * side, width - 0.5))
    axis.set_ylim(min(top + 2 * side, height - 0.5), max(top - side, -0.5))


def _short(name: str) -> str:
    """Shorten a module's name by what all have: containers of containers."""
    return name.replace(".residual_group.", ".").removeprefix("model.")


class Compared(NamedTuple):
    """The likeness of a network's layers, to be drawn."""

    label: str
    groups: Sequence[str]  # of each layer
    title: str  # of `features`
    features: Values  # CKA, (layers, layers)
    maps: Statistic | None  # cosine of attention maps

    @property
    def boundaries(self) -> list[int]:
        """Layers, counted from 0, that begin a group."""
        return [n for n in range(1, len(self.groups)) if self.groups[n] != self.groups[n - 1]]


def draw_similarity(networks: Sequence[Compared], caption: str) -> Figure:
    """Draw a row for each network: CKA, cosine of maps, and adjacent layers."""
    figure = _figure(13.0, 3.9 * len(networks) + 1.8, caption)
    ratios = {"width_ratios": [1, 1, 1.5]}
    axes = figure.subplots(len(networks), 3, squeeze=False, gridspec_kw=ratios)
    for one, (features, maps, curve) in zip(networks, axes, strict=True):
        image = _heat(features, one, f"{textwrap.fill(one.label, 45)}\n{one.title}", one.features)
        if one.maps is None:
            maps.axis("off")
            maps.text(0.5, 0.5, "no attention maps", ha="center", fontsize=9)
        else:
            _heat(maps, one, "cosine of attention maps, by pixel", one.maps.pairs)
        figure.colorbar(image, ax=maps, shrink=0.8)
        _adjacent(curve, one)
    labelled = max(axes[:, 2], key=lambda axis: len(axis.get_lines()))
    figure.legend(*labelled.get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=8)
    return figure


def _heat(axis: Axes, one: Compared, title: str, matrix: Values) -> AxesImage:
    count = len(matrix)
    image = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis", extent=(0.5, count + 0.5, count + 0.5, 0.5))
    for boundary in one.boundaries:
        axis.axhline(boundary + 0.5, color="white", linewidth=0.6)
        axis.axvline(boundary + 0.5, color="white", linewidth=0.6)
    axis.set_title(title, fontsize=9)
    _label(axis, "layer", "layer", grid=False)
    axis.locator_params(integer=True)
    return image


def _adjacent(axis: Axes, one: Compared) -> None:
    count = len(one.groups)
    first = np.arange(count - 1)
    curves = {one.title: (one.features[first, first + 1], "C0-o")}
    if one.maps is not None:
        pairs, uniform, centred = one.maps
        assert uniform is not None and centred is not None  # as every statistic of maps has them
        curves |= {
            "cosine of maps": (pairs[first, first + 1], "C1-o"),
            "cosine with a uniform map": (
                (uniform[first, first + 1] + uniform[first + 1, first]) / 2,
                "C1--",
            ),
            "centred cosine of maps": (centred[first, first + 1], "C1:"),
        }
    for label, (values, style) in curves.items():
        axis.plot(first + 1.5, values, style, label=label, markersize=3)
    for boundary in one.boundaries:
        axis.axvline(boundary + 0.5, color="gray", linewidth=0.6, label="_between groups")
    axis.locator_params(axis="x", integer=True)
    axis.set_xlim(0.5, count + 0.5)
    lowest = min(float(np.nanmin(values, initial=0)) for values, _ in curves.values())
    axis.set_ylim(lowest - 0.02, 1.02)
    _label(
        axis,
        "layer; a point between two adjacent ones, lines between groups",
        "similarity of adjacent layers",
    )
