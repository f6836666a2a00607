"""Curves: values by iteration, by name."""

import math
from collections.abc import Iterable

__all__ = ["Curves", "joined", "put"]

# Name -> iteration -> value. Names are TensorBoard's: losses/l_pix, metrics/Set5/psnr, lr, ...
Curves = dict[str, dict[int, float]]


def put(curves: Curves, name: str, iteration: int, value: float) -> None:
    """Enter a finite value, replacing an older one; skip what is not finite."""
    if math.isfinite(value):
        curves.setdefault(name, {})[iteration] = value


def joined(runs: Iterable[Curves]) -> Curves:
    """Join the curves of a training's runs, first to last.

    A resumed run replaces what earlier runs have from its first iteration on.
    """
    whole: Curves = {}
    for run in runs:
        begin = min((min(curve) for curve in run.values() if curve), default=math.inf)
        for curve in whole.values():
            for iteration in [known for known in curve if known >= begin]:
                del curve[iteration]
        for name, curve in run.items():
            whole.setdefault(name, {}).update(curve)
    return {name: dict(sorted(curve.items())) for name, curve in whole.items() if curve}
