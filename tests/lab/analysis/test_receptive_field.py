"""Receptive fields are averaged and measured as defined."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from esc_basicsr.lab.analysis.receptive_field import (
    Square,
    aligned_field,
    log_scaled,
    luo_side,
    positions_in_window,
    positive_gradient,
    smallest_squares,
    square_shares,
)

SHARES = (0.2, 0.3, 0.5, 0.99)


@pytest.fixture
def two_convolutions():
    """S of two 3×3 convolutions of ones on 9×9, at the centre."""
    image = torch.zeros(1, 1, 9, 9, requires_grad=True)
    ones = torch.ones(1, 1, 3, 3)
    out = F.conv2d(F.conv2d(image, ones, padding=1), ones, padding=1)
    return positive_gradient(torch.autograd.grad(out[0, 0, 4, 4], image)[0])


def test_two_convolutions_give_the_known_field_and_shares(two_convolutions):
    line = np.array([0, 0, 1, 2, 3, 2, 1, 0, 0])
    np.testing.assert_array_equal(two_convolutions, np.outer(line, line))
    for field, expected in (
        (two_convolutions, [0.1111, 0.6049, 1]),
        (log_scaled(two_convolutions), [0.0685, 0.4913, 1]),
    ):
        held, squares = square_shares(field, (4, 4))
        np.testing.assert_allclose(held[:3], expected, atol=5e-5)
        assert squares[:2] == [Square(1, 1 / 81), Square(3, 9 / 81)]
    sides = [
        [square.side for square in smallest_squares(field, (4, 4), SHARES)]
        for field in (two_convolutions, log_scaled(two_convolutions))
    ]
    assert sides == [[3, 3, 3, 5], [3, 3, 5, 5]]


def test_luo_counts_what_is_above_his_share_of_the_centre(two_convolutions):
    # 9 × 4.55 % = 0.41: all 25 that are not zero
    assert luo_side(two_convolutions, (4, 4)) == 5
    two_convolutions[4, 4] = 50  # those of 2 and less are now below
    assert luo_side(two_convolutions, (4, 4)) == np.sqrt(13)


def test_squares_are_clipped_at_the_border():
    held, squares = square_shares(np.ones((4, 6)), (1, 2))
    assert squares[-1] == Square(7, 1) and held[-1] == 1
    np.testing.assert_allclose(held, [square.area for square in squares])
    assert [square.side for square in squares] == [1, 3, 5, 7]


def test_a_field_of_zeros_has_no_squares():
    with pytest.raises(ValueError, match="zero everywhere"):
        smallest_squares(np.zeros((5, 5)), (2, 2), SHARES)


def test_only_what_raises_the_output_counts():
    gradient = torch.tensor([1.0, -5, 2]).view(1, 3, 1, 1)
    assert positive_gradient(gradient) == [[3]]


@pytest.mark.parametrize("size, window, count", [(120, 32, 4), (120, 32, 32), (64, 8, 3), (33, 32, 2)])
def test_positions_spread_evenly_over_a_window_near_the_centre(size, window, count):
    positions = positions_in_window(size, window, count)
    assert positions == sorted(set(positions)) and len(positions) == count
    assert all(abs(position - size // 2) <= window // 2 and 0 <= position < size for position in positions)
    within = sorted(position % window for position in positions)
    gaps = np.diff([*within, within[0] + window])
    assert set(gaps) <= {window // count, -(-window // count)}


def test_one_position_is_the_centre():
    assert positions_in_window(120, 32, 1) == [60]


def test_fields_are_laid_over_each_other_by_their_centres():
    whole = np.arange(60.0).reshape(6, 10)

    def field_at(row: int, column: int) -> np.ndarray:
        """A pattern that moves with the centre."""
        rows, columns = np.indices(whole.shape)
        return (rows - row) * 100.0 + (columns - column)

    field, centre = aligned_field(field_at, [2, 3], [4, 6, 7])
    assert centre == (2, 4) and field[centre] == 0
    assert field.shape == (5, 7)
    np.testing.assert_array_equal(field, field_at(2, 4)[:5, :7])


def test_a_single_centre_keeps_the_whole_field():
    field, centre = aligned_field(lambda row, column: np.eye(5), [2], [3])
    np.testing.assert_array_equal(field, np.eye(5))
    assert centre == (2, 3)
