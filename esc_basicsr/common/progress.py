"""The bar of a long command."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.utils import ProgressBar

__all__ = ["progress"]


@contextmanager
def progress(label: str, count: int) -> Iterator[ProgressBar]:
    """Lend a bar with ETA on stderr, below a line that labels it; its own line ends however the work ends.

    Args:
        label: What is being done.
        count: Steps; call the bar's ``update()`` after each.
    """
    print(label, file=sys.stderr)
    bar = ProgressBar(count, file=sys.stderr)
    try:
        yield bar
    finally:
        print(file=sys.stderr)
