"""The records of a training's validations."""

import copy
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["MetricRecords"]


class MetricRecords:
    """History and best figures of all validations, the same on all ranks; part of a training state.

    Attributes:
        history: One plain dict for each validation, in order: ``iter``, ``set``, ``images`` (how many), and
            the mean of each metric under its name in the options.
        best: set -> metric -> ``better`` (``higher`` or ``lower``), ``val``, ``iter``.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, dict[str, dict[str, Any]]] = {}

    def state(self) -> dict[str, Any]:
        """Give the history and the best figures, in plain values."""
        return copy.deepcopy({"history": self.history, "best": self.best})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        state = copy.deepcopy(dict(state))
        self.history, self.best = state["history"], state["best"]

    def measured(self, iteration: int) -> set[str]:
        """Name the sets that were measured at an iteration."""
        return {entry["set"] for entry in self.history if entry["iter"] == iteration}

    def add(
        self,
        iteration: int,
        name: str,
        images: int,
        means: Mapping[str, float],
        metrics: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Record a set's validation, in the position of the one that it repeats or else at the end.

        ``means`` lacks what could not be measured of ``metrics``, those of the options.
        """
        entry = {"iter": iteration, "set": name, "images": images, **means}
        repeated = [(known["iter"], known["set"]) == (iteration, name) for known in self.history]
        if True in repeated:
            self.history[repeated.index(True)] = entry
        else:
            self.history.append(entry)
        # each metric of the options has a record, also where a resumed training had others
        records = self.best.setdefault(name, {})
        for metric, options in metrics.items():
            better = options.get("better", "higher")
            worst = -math.inf if better == "higher" else math.inf
            record = records.setdefault(metric, {"better": better, "val": worst, "iter": -1})
            sign = 1 if record["better"] == "higher" else -1
            if metric in means and sign * means[metric] >= sign * record["val"]:
                record |= {"val": means[metric], "iter": iteration}
