"""What tests of exported networks share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

# (batch, height, width): a pixel, below a window, windows, odd, one side below and one above
SIZES = [(1, 1, 1), (1, 3, 2), (1, 4, 8), (2, 13, 11), (3, 1, 9), (2, 30, 2)]


@pytest.fixture(scope="session")
def differences() -> Callable[[nn.Module, Callable[[Tensor], Tensor]], Iterator[float]]:
    """Compare a network with what is to give the same, at several sizes, in proportion to outputs above 1."""

    def compare(net: nn.Module, run: Callable[[Tensor], Tensor]) -> Iterator[float]:
        for batch, height, width in SIZES:
            lr = torch.rand(batch, 3, height, width)
            expected = net(lr)
            sr = run(lr)
            assert sr.shape == expected.shape and sr.dtype == torch.float32
            yield float((sr - expected).abs().max() / expected.abs().max().clamp(min=1))

    return compare
