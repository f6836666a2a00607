"""Kinds of values that options take: in words, as a test, and in JSON Schema."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

import yaml


class Kind(NamedTuple):
    """A kind of value."""

    expected: str  # in words, to follow "expected"
    accepts: Callable[[Any], bool]
    json: Mapping[str, Any] = {}  # JSON Schema of it


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether ``value`` is a finite number; true and false are not."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_whole(value: Any) -> TypeGuard[int]:
    """Return whether ``value`` is an int; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_iteration(value: Any) -> bool:
    """Return whether ``value`` counts iterations; BasicSR's own files write some as ``!!float 5e3``."""
    return is_number(value) and 0 <= value <= 10**12 and value == int(value)


def _is_folder_name(value: Any) -> bool:
    # with what is put before and behind it, a name has 255 bytes at most
    is_name = isinstance(value, str) and value.isprintable() and len(value.encode()) <= 200
    return is_name and value not in ("", ".", "..") and not set(value) & set("/\\")


def _number(expected: str, is_one: Callable[[Any], bool] = is_number, **bounds: float) -> Kind:
    """Make a kind of number, within bounds by their names in JSON Schema."""
    least, most = bounds.get("minimum", -math.inf), bounds.get("maximum", math.inf)
    above, below = bounds.get("exclusiveMinimum", -math.inf), bounds.get("exclusiveMaximum", math.inf)
    return Kind(
        expected,
        lambda value: is_one(value) and least <= value <= most and above < value < below,
        {"type": "number" if is_one is is_number else "integer", **bounds},
    )


def or_none(kind: Kind) -> Kind:
    """Accept ``kind``, or nothing."""
    return Kind(
        f"{kind.expected} or ~",
        lambda value: value is None or kind.accepts(value),
        {"anyOf": [kind.json, {"type": "null"}]},
    )


def one_of(*values: str | None) -> Kind:
    """Accept one of ``values``."""
    names = ["~" if value is None else value for value in values]
    return Kind(f"one of {', '.join(names)}", lambda value: value in values, {"enum": [*values]})


def at_most(kind: Kind, limit: int) -> Kind:
    """Accept ``kind``, up to a limit beyond which a number is a mistake that would fill memory or time."""
    expected = f"{kind.expected}, and at most {limit:,}"
    return Kind(
        expected, lambda value: kind.accepts(value) and value <= limit, {**kind.json, "maximum": limit}
    )


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """Accept a list whose items are all of ``kind``."""
    count = "" if length is None else f"{length} items, "
    sizes = {} if length is None else {"minItems": length, "maxItems": length}
    return Kind(
        f"a list, {count}each {kind.expected}",
        lambda value: (
            isinstance(value, list) and length in (None, len(value)) and all(map(kind.accepts, value))
        ),
        {"type": "array", "items": kind.json, **sizes},
    )


ANYTHING = Kind("anything", lambda value: True)
TEXT = Kind("text", lambda value: isinstance(value, str) and value != "", {"type": "string", "minLength": 1})
LABEL = Kind(
    "text of at most 200 bytes",
    lambda value: TEXT.accepts(value) and len(value.encode(errors="replace")) <= 200,
    {"type": "string", "minLength": 1, "maxLength": 200},
)
_TEMPLATE = r"^[^{}]*\{0?(:s)?\}[^{}]*$"
TEMPLATE = Kind(
    "text with one {} for the HR name",
    lambda value: isinstance(value, str) and re.search(_TEMPLATE, value) is not None,
    {"type": "string", "pattern": _TEMPLATE},
)
FOLDER_NAME = Kind(
    "a name fit for a folder, without slashes",
    _is_folder_name,
    {"type": "string", "pattern": r"^(?!\.{1,2}$)[^/\\\x00-\x1f]{1,200}$"},
)
BOOL = Kind("true or false", lambda value: isinstance(value, bool), {"type": "boolean"})
INTEGER = _number("a whole number", is_whole)
COUNT = _number("a whole number of at least 1", is_whole, minimum=1)
WHOLE = _number("a whole number of at least 0", is_whole, minimum=0)
ITERATIONS = _number("a whole number of at least 1", _is_iteration, minimum=1)
RESTARTS = _number("a whole number of at least 0", _is_iteration, minimum=0)
WARMUP = Kind(
    "a whole number, -1 for no warm-up",
    lambda value: value == -1 or _is_iteration(value),
    {"type": "integer", "minimum": -1},
)
NUMBER = _number("a number")
NOT_NEGATIVE = _number("a number of at least 0", minimum=0)
POSITIVE = _number("a number above 0", exclusiveMinimum=0)
SECONDS = _number("a number of seconds of at least 1", minimum=1)
PROBABILITY = _number("a number from 0 to 1", minimum=0, maximum=1)
FRACTION = _number("a number from 0 to below 1", minimum=0, exclusiveMaximum=1)
AMP = Kind(
    "bf16 or fp16, or false",
    lambda value: value in ("bf16", "fp16") or value is None or value is False,
    {"enum": ["bf16", "fp16", False, None]},
)
NAMES = Kind(
    "a name, a list of names, or ~",
    lambda value: value is None or TEXT.accepts(value) or list_of(TEXT).accepts(value),
    {"anyOf": [TEXT.json, list_of(TEXT).json, {"type": "null"}]},
)
GPUS = Kind(
    "auto, or a whole number of at least 0",
    lambda value: value == "auto" or WHOLE.accepts(value),
    {"anyOf": [{"const": "auto"}, WHOLE.json]},
)
SOURCES = Kind(
    "a list of sections",
    lambda value: isinstance(value, list) and len(value) > 0,
    {"type": "array", "minItems": 1},
)
QUALITY = Kind(
    "a whole number from 1 to 100, or a list of the least and the largest",
    lambda value: all(
        is_whole(one) and 1 <= one <= 100
        for one in (value if isinstance(value, list) and len(value) == 2 else [value])
    ),
    {
        "anyOf": [
            _QUALITY := {"type": "integer", "minimum": 1, "maximum": 100},
            {"type": "array", "items": _QUALITY, "minItems": 2, "maxItems": 2},
        ]
    },
)
SECTION = Kind("a section of 'key: value' lines", lambda value: isinstance(value, dict), {"type": "object"})


def misfit(value: Any, kind: Kind) -> str:
    """Say what was given, what is expected, and how to write a number that YAML took for text."""
    number = _number_for(value, kind)
    why = "YAML 1.1 reads that as text" if "e" in str(value).lower() else "In quotes it is text"
    remedy = "" if number is None else f" {why}: write {number}."
    return f"got {as_written(value)}, expected {kind.expected}.{remedy}"


def _number_for(value: Any, kind: Kind) -> str | None:
    """Write the number that the text ``value`` shows, if ``kind`` accepts it; else None."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return None
    if math.isfinite(number) and number == int(number) and kind.accepts(int(number)):
        return str(int(number))
    return yaml.safe_dump(number).split()[0] if kind.accepts(number) else None


def as_written(value: Any) -> str:
    """Write ``value`` as an option file would hold it, and what it is where that could be overlooked."""
    if isinstance(value, Mapping):
        return "a section"
    if value is None:
        return "nothing (~)"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value) if str(value).isprintable() else repr(value)[1:-1]
    text = text if len(text) <= 200 else f"{text[:200]}..."
    if isinstance(value, str):
        looks_otherwise = _number_for(value, NUMBER) is not None or value.lower() in ("true", "false")
        return f"the text '{text}'" if looks_otherwise else f"'{text}'"
    return text
