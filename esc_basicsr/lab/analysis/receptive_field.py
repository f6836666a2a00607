"""Effective receptive fields: how much each LR pixel moves the centre of the output.

Source: Luo et al., arXiv:1701.04128, as Ding et al. (RepLKNet, arXiv:2203.06717) and Guo et al. (MambaIR,
arXiv:2402.15648) draw them, the latter for super-resolution. Ours: the centre is a whole LR pixel, so its s×s
outputs, and it is put at several positions in a network's windows, over which the field is averaged.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from esc_basicsr.lab.analysis.features import Values

# of the centre's value: two standard deviations of a Gaussian, less what is beyond them
LUO_SHARE = 1 - 0.9545


class Square(NamedTuple):
    """A centred square of a field."""

    side: int  # in LR pixels
    area: float  # its share of the field's area, without what lies outside


def positions_in_window(size: int, window: int, count: int) -> list[int]:
    """Choose rows (or columns) near the centre of an image, evenly spread over the positions in a window.

    Args:
        size: Side of the image.
        window: Side of the windows, which begin at the image's edge.
        count: Number of positions; for one, the centre itself whatever the window.

    Returns:
        ``count`` indices, ascending, within half a window of ``size // 2``.
    """
    if count == 1:
        return [size // 2]
    first = size // 2 - window // 2
    wanted = [(2 * number + 1) * window // (2 * count) for number in range(count)]
    return sorted(first + (position - first) % window for position in wanted)


def positive_gradient(gradient: Tensor) -> Values:
    """Sum the positive part of a gradient, (1, 3, H, W), which raises the output, over colours: (H, W)."""
    return gradient[0].double().clamp(min=0).sum(0).cpu().numpy()


def aligned_field(
    field_at: Callable[[int, int], Values], rows: Sequence[int], columns: Sequence[int]
) -> tuple[Values, tuple[int, int]]:
    """Average fields, (H, W), of the centres at all rows and columns, laid over one another by the centres.

    Returns:
        The part that all fields have, and its centre's row and column.
    """
    total: Values | float = 0.0
    for row in rows:
        for column in columns:
            field = field_at(row, column)
            height, width = field.shape
            top, left = row - min(rows), column - min(columns)
            bottom, right = height - max(rows) + row, width - max(columns) + column
            total = total + field[top:bottom, left:right]
    assert not isinstance(total, float)
    return total / (len(rows) * len(columns)), (min(rows), min(columns))


def log_scaled(field: Values) -> Values:
    """Scale to log10(S + 1), as RepLKNet draws a field and takes shares of it."""
    return np.log10(field + 1)


def square_shares(field: Values, centre: tuple[int, int]) -> tuple[Values, list[Square]]:
    """Give the share of a field's sum in each centred square, sides 1, 3, 5 ... until it holds all.

    Squares are clipped at the borders.

    Raises:
        ValueError: The field is zero everywhere.
    """
    rows, columns = np.indices(field.shape)
    distance = np.maximum(abs(rows - centre[0]), abs(columns - centre[1])).ravel()
    sums = np.bincount(distance, field.ravel()).cumsum()
    if not sums[-1] > 0:
        raise ValueError("the receptive field is zero everywhere")
    areas = np.bincount(distance).cumsum() / field.size
    squares = [Square(2 * reach + 1, float(area)) for reach, area in enumerate(areas)]
    return sums / sums[-1], squares


def smallest_squares(field: Values, centre: tuple[int, int], shares: Sequence[float]) -> list[Square]:
    """Find for each share, from 0 to below 1, the smallest centred square that holds more of a field's sum.

    Raises:
        ValueError: The field is zero everywhere.
    """
    held, squares = square_shares(field, centre)
    return [squares[int(np.argmax(held > share))] for share in shares]


def luo_side(field: Values, centre: tuple[int, int]) -> float:
    """Return Luo et al.'s size: the root of the number of pixels above 4.55 % of the centre's value."""
    return float(np.sqrt((field > LUO_SHARE * field[centre]).sum()))
