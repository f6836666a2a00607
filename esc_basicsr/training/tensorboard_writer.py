"""The writer that BasicSR's logger gives its numbers to."""

import math
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardWriter"]


class TensorBoardWriter(SummaryWriter):
    """PyTorch's writer for a training that may have been interrupted.

    Where the folder has events already, TensorBoard forgets of them what lies beyond the iteration that this
    writer begins with. Numbers that are not finite are skipped: the log has them. A killed process loses
    what it logged in its last seconds.
    """

    def __init__(self, log_dir: str) -> None:
        self._goes_on = any(Path(log_dir).glob("*tfevents*"))
        super().__init__(log_dir, flush_secs=10)

    def add_scalar(
        self, tag: str, scalar_value: Any, global_step: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Write a number, if it is finite."""
        if self._goes_on:
            self._goes_on = False
            begun = Event(step=global_step, session_log=SessionLog(status=SessionLog.START))
            self._get_file_writer().add_event(begun, global_step)
        if math.isfinite(scalar_value):
            super().add_scalar(tag, scalar_value, global_step, *args, **kwargs)
