"""A file's own words in messages."""

from collections.abc import Iterable

from esc_basicsr.common.first_few import first_few

__all__ = ["few", "shown"]

# how many keys an error message lists of each kind, and how much of a key it shows
_LISTED = 6
_SHOWN = 200


def few(names: Iterable[object]) -> str:
    """List the first few names, and say how many more there are."""
    listed = [shown(repr(name) if isinstance(name, str) else type(name).__name__) for name in names]
    return first_few(listed, _LISTED)


def shown(value: object) -> str:
    """Make what a file says fit for a message: one line of some length, nothing that steers a terminal."""
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
