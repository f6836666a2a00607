import pytest
import torch

from esc_basicsr.common.errors import UserError
from esc_basicsr.export.verification import verify


def test_sizes_below_at_and_above_a_window_are_compared(lively_network):
    net = lively_network()
    comparisons = verify(net, net, "fp32", 4)
    assert [shape for shape, _, _ in comparisons] == ["1×3×4×4", "1×3×7×5", "2×3×5×5", "3×3×1×10"]
    assert all(difference == 0 for _, difference, _ in comparisons)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda sr: sr + 0.01, "differs from the network by 1.0e-02"),
        (lambda sr: sr * torch.nan, "differs from the network by nan"),
        (lambda sr: sr[..., :-1], r"returns \(1, 3, 8, 7\), not \(1, 3, 8, 8\)"),
        (lambda sr: sr.no_such_thing, "fails .AttributeError"),
    ],
)
def test_what_is_wrong_is_told(lively_network, wrong, message):
    net = lively_network()
    with pytest.raises(UserError, match=message):
        verify(net, lambda lr: wrong(net(lr)), "fp32", 4)
