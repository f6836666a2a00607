"""Pictures of effective receptive fields, several networks side by side."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from esc_basicsr.lab.analysis.receptive_field import Map, log_scaled, smallest_squares, square_shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Field", "draw"]

_OUTLINED = {0.5: "solid", 0.99: "dotted"}


class Field(NamedTuple):
    """What is shown of one network.

    Attributes:
        label: The network's name.
        values: Its receptive field, (h, w), not negative, not zero everywhere.
        centre: Row and column of its centre.
    """

    label: str
    values: Map
    centre: tuple[int, int]


def draw(fields: Sequence[Field], caption: str) -> "Figure":
    """Each field as RepLKNet and as MambaIR draw it, with the squares that hold 50 % and 99 %; all shares.

    Args:
        fields: Networks.
        caption: What stands below.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    width = max(2.9 * len(fields) + 4.5, 7.5)
    figure = Figure(figsize=(width, 7.4), layout="constrained")
    axes = figure.subplots(
        2, len(fields) + 1, squeeze=False, gridspec_kw={"width_ratios": [1] * len(fields) + [1.3]}
    )
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
            for style, square in zip(_OUTLINED.values(), squares, strict=True):
                corner = (-square.side / 2, -square.side / 2)
                axis.add_patch(
                    Rectangle(corner, square.side, square.side, fill=False, linestyle=style, linewidth=1)
                )
            axis.set_xlim(extent[0], extent[1])
            axis.set_ylim(extent[2], extent[3])
            axis.set_title(title, fontsize=8)
            axis.tick_params(labelsize=7)
        pair[0].set_title(f"{textwrap.fill(field.label, 32)}\n{pair[0].get_title()}", fontsize=8)
    for axis, kind in zip(axes[:, -1], ("log", "raw"), strict=True):
        for field in fields:
            values = log_scaled(field.values) if kind == "log" else field.values
            held, squares = square_shares(values, field.centre)
            axis.plot([square.side for square in squares], 100 * held, label=field.label)
        axis.set_xlabel("side of the centred square (LR pixels)", fontsize=8)
        axis.set_ylabel(f"share of the {kind} field (%)", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.set_ylim(0, 102)
        axis.legend(fontsize=7)
    figure.supxlabel(textwrap.fill(caption, int(15.5 * width)), fontsize=8, x=0.02, ha="left")
    return figure
