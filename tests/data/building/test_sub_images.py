import pytest

from esc_basicsr.data.building.sub_images import Cutting


@pytest.mark.parametrize(
    ("length", "starts"),
    [(480, [0]), (300, [0]), (720, [0, 240]), (721, [0, 240, 241]), (1200, [0, 240, 480, 720])],
)
def test_windows_reach_the_edge_and_no_further(length, starts):
    assert Cutting((), 480, 240, 0).starts(length) == starts
