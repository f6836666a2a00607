"""The page on which images are dropped, compared and downloaded; what upscales them is one of two engines."""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

# Nothing from elsewhere, even if the page asked for it.
_POLICY = (
    "default-src 'none'; img-src blob: data:; connect-src 'self'; worker-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)


def page(engine: str, settings: Mapping[str, Any]) -> str:
    """Put the page together, as HTML that needs no other file.

    Args:
        engine: What upscales: ``server``, the program that serves the page; or ``browser``.
        settings: What the engine's script finds in ``settings``.
    """
    parts = {
        "policy": _POLICY,
        "style": resource("page.css"),
        "choices": resource(f"{engine}.html"),
        # no text of theirs can end the element that it is in
        "settings": json.dumps(settings).replace("<", "\\u003c"),
        "engine": resource(f"{engine}.js"),
        "script": resource("page.js"),
    }
    pieces = resource("page.html").split("@@")  # text, name, text, name, ..., text
    pieces[1::2] = [parts[name] for name in pieces[1::2]]
    return "".join(pieces)


def resource(name: str) -> str:
    """Read a text that lies beside this module."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
