"""The name that a mistyped one was probably meant to be."""

import difflib
from collections.abc import Iterable

MOST_LISTED = 12  # more names than these are not read by anyone


def nearest(word: object, known: Iterable[str]) -> str | None:
    """Find the known name most like ``word``, letter case aside; None if none is alike."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def hint(word: object, known: Iterable[str]) -> str:
    """Name the nearest known name in a sentence, or the known ones if none is near and they are few."""
    names = sorted(known)
    near = nearest(word, names)
    if near is not None:
        return f"Did you mean '{near}'?"
    if 0 < len(names) <= MOST_LISTED:
        return f"Known here: {', '.join(names)}."
    return ""
