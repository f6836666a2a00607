"""Ranks that agree to stop training, and do so together."""

from typing import NoReturn

from esc_basicsr.common import signals
from esc_basicsr.common.log import logger
from esc_basicsr.training import heartbeat

__all__ = ["Stopping"]


class Stopping:
    """Agreement of all ranks to stop, because one or more were asked to by SIGTERM or Ctrl-C.

    Attributes:
        is_agreed: The same on all ranks: they are to save their state and `exit`.
    """

    def __init__(self) -> None:
        self.is_agreed = False
        self._is_new = False  # agreed on since the last `take_agreement`
        signals.heed()

    def wish(self) -> float:
        """Give this rank's part of the sum that `agree` takes: 1 if it was asked to stop, else 0."""
        return float(signals.requested() is not None)

    def agree(self, wishes: float) -> None:
        """Take note of the sum of all ranks' wishes."""
        self.is_agreed = wishes > 0
        self._is_new = True

    def take_agreement(self) -> bool:
        """Tell whether ranks have agreed since the last call, the same on all ranks."""
        is_new, self._is_new = self._is_new, False
        return is_new

    def exit(self, iteration: int) -> NoReturn:
        """End this process, whose state of ``iteration`` is saved, as all others end theirs."""
        signal = signals.requested()
        logger.info(
            "Stopped at iteration %d%s. Its state is saved: go on with --auto_resume.",
            *(iteration, f" by {signal.name}" if signal else ""),
        )
        heartbeat.agree_to_end()
        raise SystemExit(signals.exit_code())
