"""Checks of constructor options that both networks share."""

import math
from typing import Any

__all__ = ["check_flags", "check_network_options", "require"]


def require(condition: bool, expectation: str, got: Any) -> None:
    """Raise a ValueError that says what was expected and what was got, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{expectation}, got {got!r}.")


def check_flags(**flags: bool) -> None:
    """Check that options which are on or off are exactly that: text such as "no" would count as on."""
    for name, value in flags.items():
        require(isinstance(value, bool), f"{name} must be true or false", value)


def check_network_options(*, exp_ratio: float, **sizes: int) -> None:
    """Check the options that ESC and ESCFP have in common.

    Raises:
        ValueError: A size that is not an integer >= 1, an even or too small kernel, ``pdim`` above ``dim``,
            an expansion that leaves no channel.
    """
    for name, value in sizes.items():
        is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(is_size, f"{name} must be an integer of at least 1", value)
    dim, pdim, kernel_size = sizes["dim"], sizes["pdim"], sizes["kernel_size"]
    # The 3×3 kernel made from the image lies within the large one.
    require(kernel_size % 2 == 1 and kernel_size >= 3, "kernel_size must be odd and at least 3", kernel_size)
    require(pdim <= dim, f"pdim must be at most dim ({dim})", pdim)
    is_ratio = isinstance(exp_ratio, (int, float)) and not isinstance(exp_ratio, bool)
    leaves_some = is_ratio and math.isfinite(exp_ratio) and int(dim * exp_ratio) >= 1
    require(leaves_some, "exp_ratio must leave at least one channel", exp_ratio)
