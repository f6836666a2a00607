"""Images a second in training."""

import time

__all__ = ["Throughput"]


class Throughput:
    """Counts images and the seconds that their steps take, waiting for data included.

    Whatever interrupts training ends with `go_on`, and its time is not counted.
    """

    def __init__(self) -> None:
        self._since: float | None = None  # the first step, which compiles and warms up, is not counted
        self._images = 0
        self._seconds = 0.0

    def go_on(self) -> None:
        """Count time from now on."""
        self._since = time.perf_counter()

    def count(self, images: int) -> None:
        """Note that a step on so many images has ended."""
        now = time.perf_counter()
        if self._since is not None:
            self._images += images
            self._seconds += now - self._since
        self._since = now

    def take(self) -> float | None:
        """Give images a second since the last call; None if no step was counted."""
        rate = self._images / self._seconds if self._seconds else None
        self._images, self._seconds = 0, 0.0
        return rate
