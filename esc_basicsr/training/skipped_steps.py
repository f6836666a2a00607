"""Steps that are not taken, as their loss or gradient is not finite."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.training import checkpoints
from esc_basicsr.training.ranks import gather

__all__ = ["SkippedSteps", "suspects"]


class SkippedSteps:
    """Counts and reports skipped steps, and ends training after too many in a row.

    Attributes:
        counts: ``in_all`` and ``in_a_row``, the same on all ranks; part of a training state.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        self._opt = opt
        self.counts = {"in_all": 0, "in_a_row": 0}

    def took_step(self) -> None:
        """Note that a step was taken."""
        self.counts["in_a_row"] = 0

    def skip(self, iteration: int, what: str, samples: list[str]) -> None:
        """Count and report a step whose ``loss`` or ``gradient`` is not finite; called on every rank.

        ``samples`` are those of this rank that may be why.

        Raises:
            UserError: It is one too many.
        """
        for count in self.counts:
            self.counts[count] += 1
        names = ", ".join(itertools.chain(*gather(samples))) or "not known"
        in_a_row, most = self.counts["in_a_row"], self._opt["train"]["max_skipped"]
        logger.warning(
            "Iteration %d: the %s is not finite; the step is skipped (%d in a row, %d in all). Samples: %s",
            *(iteration, what, in_a_row, self.counts["in_all"], names),
        )
        if in_a_row >= most:
            newest = checkpoints.newest_state(self._opt)
            remedy = f"The last good state is {newest}. " if newest else ""
            raise UserError(
                f"Iteration {iteration}: the {what} was not finite for {in_a_row} steps in a row "
                f"(train.max_skipped: {most}). {remedy}Lower the learning rate, set train.clip_grad_norm, or "
                f"look at these samples: {names}"
            )


@torch.no_grad()
def suspects(net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]) -> list[str]:
    """Name the samples of LR and HR batches that are or give something that is not finite; all if none is."""
    found = []
    for lq, gt in batches:
        for images in zip(lq, gt, net(lq), strict=True):
            found.append(not all(bool(image.isfinite().all()) for image in images))
    return [name for name, is_suspect in zip(names, found, strict=False) if is_suspect] or [*names]
