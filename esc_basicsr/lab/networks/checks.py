"""Checks of constructor options that the baselines of this package share."""

from collections.abc import Sequence
from typing import Any

from esc_basicsr.archs.validation import require


def check_sizes(**sizes: Any) -> None:
    """Check that options are integers of at least 1."""
    for name, value in sizes.items():
        is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(is_size, f"{name} must be an integer of at least 1", value)


def check_numbers(**numbers: Any) -> None:
    """Check that options are numbers above 0."""
    for name, value in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(is_number and value > 0, f"{name} must be a number above 0", value)


def check_stages(depths: Any, num_heads: Any) -> None:
    """Check that both options list a size for each stage."""
    for name, values in (("depths", depths), ("num_heads", num_heads)):
        is_list = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
        require(is_list, f"{name} must list a number for each stage", values)
        check_sizes(**{f"{name}[{stage}]": value for stage, value in enumerate(values)})
    require(len(depths) == len(num_heads), f"num_heads must be as many as depths ({len(depths)})", num_heads)


def check_published(given: dict[str, Any], published: dict[str, Any]) -> None:
    """Check that those of a constructor's options which are ``published`` have the one value implemented."""
    for name, value in published.items():
        require(given[name] == value, f"{name} must be {value}, the published one", given[name])
