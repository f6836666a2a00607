"""Networks are timed, memory is what a pass touches,."""

import os

import pytest
import torch

from esc_basicsr.common.errors import UserError
from esc_basicsr.lab.measure.measure import (
    NotEnoughMemoryError,
    largest_difference,
    peak_memory_growth,
    time_networks,
)

CPU = torch.device("cpu")


def test_networks_are_timed_with_their_outputs():
    x = torch.rand(1, 3, 4, 4)
    times, outputs = time_networks({"same": torch.nn.Identity()}, x, repeats=2, warmup=0)
    assert len(times["same"]) == 2 and torch.equal(outputs["same"], x)


def test_difference_is_the_largest_and_none_with_itself():
    first, second = torch.zeros(3), torch.tensor([0.0, -0.5, 0.25])
    assert largest_difference(second, first) == 0.5
    assert largest_difference(first, first) is None


class Hungry(torch.nn.Module):
    """Touches 200 MB for a large image, 40 MB for others."""

    def forward(self, x):
        torch.ones(50_000_000 if x.shape[-1] > 64 else 10_000_000).sum()
        return x


class Doomed(torch.nn.Module):
    """Ends its process, as the system does to one that takes too much memory."""

    def forward(self, x):
        os._exit(9)


@pytest.mark.parametrize("width, expected", [(100, 200e6), (60, 40e6)])
def test_memory_growth_is_what_a_pass_touches(width, expected):
    growth = peak_memory_growth(Hungry, torch.rand(1, 3, 8, width))
    assert growth == pytest.approx(expected, rel=0.1)


def test_a_killed_process_is_told():
    with pytest.raises(UserError, match=r"input of \(1, 3, 8, 8\) was killed"):
        peak_memory_growth(Doomed, torch.rand(1, 3, 8, 8))


def test_network_that_lacks_memory_is_named():
    class Vast(torch.nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    nets = {"same": torch.nn.Identity(), "vast": Vast()}
    with pytest.raises(NotEnoughMemoryError, match=r"vast: the memory is not enough for .* 4×6") as raised:
        time_networks(nets, torch.rand(1, 3, 4, 6), repeats=1, warmup=0)
    assert raised.value.network == "vast"
