"""Long lists in messages."""

from collections.abc import Sequence


def first_few(texts: Sequence[str], most: int = 5) -> str:
    """List the first texts, and say how many more there are."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
