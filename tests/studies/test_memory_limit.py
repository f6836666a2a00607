"""The limit of memory is what was given, or most of what is free."""

import argparse

import pytest
import torch
from memory_limit import memory_limit

from esc_basicsr.common.errors import UserError

CPU = torch.device("cpu")


def test_memory_limit_is_what_was_given_or_most_of_what_is_free():
    assert memory_limit(argparse.Namespace(memory_limit=0.5), CPU) == 2**29
    assert memory_limit(argparse.Namespace(memory_limit=None), CPU) > 2**20
    with pytest.raises(UserError, match="--memory-limit must be above 0"):
        memory_limit(argparse.Namespace(memory_limit=0.0), CPU)
