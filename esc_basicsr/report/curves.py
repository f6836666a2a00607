"""Curves: values by iteration, by name."""

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = ["Curves", "first_begun_first", "first_iteration", "joined", "put"]

T = TypeVar("T")

# Name -> iteration -> value. Names are TensorBoard's: losses/l_pix, metrics/Set5/psnr, lr, ...
Curves = dict[str, dict[int, float]]
_MOST_ITERATIONS = 2**53  # what a page counts exactly


def put(curves: Curves, name: str, iteration: int, value: float) -> None:
    """Enter a finite value, replacing an older one; skip what is not finite, or of no iteration."""
    if math.isfinite(value) and 0 <= iteration < _MOST_ITERATIONS:
        curves.setdefault(name, {})[iteration] = value


def first_iteration(run: Curves) -> float:
    """Find the first iteration of a run's curves; infinity if there are none.

    A validation that a resumed run makes up for is of the iteration before its first.
    """
    return min(
        (min(curve) + name.startswith("metrics/") for name, curve in run.items() if curve), default=math.inf
    )


def first_begun_first(runs: Sequence[T], begins: Sequence[float]) -> list[T]:
    """Put the first run with the lowest first iteration before the others, whose order stays."""
    order = sorted(range(len(runs)), key=lambda run: begins[run] > min(begins))
    return [runs[run] for run in order]


def joined(runs: Iterable[Curves]) -> Curves:
    """Join the curves of a training's runs, first to last.

    A resumed run replaces what earlier runs have from its first iteration on. Files' names tell which was
    earlier, unless a clock was set back: what begins with the lowest iteration was not resumed.
    """
    whole: Curves = {}
    runs = list(runs)
    for run in first_begun_first(runs, [first_iteration(run) for run in runs]):
        begin = first_iteration(run)
        for curve in whole.values():
            for iteration in [known for known in curve if known >= begin]:
                del curve[iteration]
        for name, curve in run.items():
            whole.setdefault(name, {}).update(curve)
    return {name: dict(sorted(curve.items())) for name, curve in whole.items() if curve}
