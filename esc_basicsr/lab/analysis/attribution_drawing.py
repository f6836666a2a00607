"""Pictures of local attribution maps, several networks side by side."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from esc_basicsr.lab.analysis.images import Pixels
from esc_basicsr.lab.analysis.local_attribution import Map, Window, attribution_density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Column", "draw"]

_SHARE_OF_IMAGE = 0.5


class Column(NamedTuple):
    """What is shown of one network.

    Attributes:
        label: The network's name.
        relative: Its attribution map, (h, w), in [0, 1].
        diffusion_index: The map's.
        sr: What it makes of the window, (size, size, 3).
    """

    label: str
    relative: Map
    diffusion_index: float
    sr: Pixels


def draw(hr: Pixels, lr: Pixels, window: Window, columns: Sequence[Column], caption: str) -> "Figure":
    """The photograph and its window; for each network map, density of the map, and window.

    Args:
        hr: (H, W, 3).
        lr: (h, w, 3), of which ``hr`` is an enlargement.
        window: Outlined on ``hr``.
        columns: Networks.
        caption: What stands below.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    width = max(2.7 * (1 + len(columns)) + 0.6, 6)
    figure = Figure(figsize=(width, 9.4), layout="constrained")
    axes = figure.subplots(3, 1 + len(columns), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    size = (hr.shape[1], hr.shape[0])
    enlarged = np.asarray(Image.fromarray(lr).resize(size, Image.Resampling.BICUBIC))
    left, top, side = window
    _show(axes[0, 0], hr, "photograph, and the window")
    axes[0, 0].add_patch(
        Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor="red", linewidth=1.5)
    )
    _show(axes[1, 0], lr, f"LR, {lr.shape[1]}×{lr.shape[0]}")
    _show(axes[2, 0], hr[top : top + side, left : left + side], "window, photograph")
    # seismic's upper half, white to red, is where the source draws maps: at 0.5 + v / 2
    colours = ListedColormap(colormaps["seismic"](np.linspace(0.5, 1, 256)))
    for shown, column in zip(axes[:, 1:].T, columns, strict=True):
        name = textwrap.fill(column.label, 30)
        shown[0].set_title(f"{name}\ndiffusion index {column.diffusion_index:.2f}", fontsize=9)
        shown[0].imshow(
            _blended(colours(_resized(column.relative, size, Image.Resampling.NEAREST)), enlarged)
        )
        try:
            density = attribution_density(column.relative)
        except ValueError as error:
            shown[1].text(0.5, 0.5, textwrap.fill(f"no density: {error}", 24), ha="center", fontsize=8)
        else:
            smooth = np.clip(_resized(density, size, Image.Resampling.BICUBIC), 0, 1)
            _show(shown[1], _blended(colours(smooth), enlarged), "density of the attribution")
        _show(shown[2], column.sr, "window, output")
    figure.colorbar(
        ScalarMappable(cmap=colours), ax=axes[:2, -1], shrink=0.6, label="over the maximum", aspect=30
    )
    figure.supxlabel(textwrap.fill(caption, int(15.5 * width)), fontsize=8, x=0.02, ha="left")
    return figure


def _show(axis: "Axes", image: Pixels | Map, title: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize=9)


def _resized(values: Map, size: tuple[int, int], resampling: Image.Resampling) -> Map:
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, resampling), np.float64)


def _blended(colours: Map, image: Pixels) -> Map:
    return (1 - _SHARE_OF_IMAGE) * colours[..., :3] + _SHARE_OF_IMAGE * image / 255
