"""Whether the networks are being recorded for other programs, at sizes that are not known yet."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["exporting", "is_exporting"]

_exporting: ContextVar[bool] = ContextVar("exporting", default=False)


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Within it the networks do the same for every batch, height and width: a recording serves all."""
    token = _exporting.set(True)
    try:
        yield
    finally:
        _exporting.reset(token)


def is_exporting() -> bool:
    """Whether `exporting` is in force."""
    return _exporting.get()
