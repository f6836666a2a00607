"""Keys of images in an LMDB, and their files."""

import re
from collections.abc import Sequence
from pathlib import Path

from esc_basicsr.data.building.skipped import Skipped
from esc_basicsr.data.image_folder import find_images

__all__ = ["find_keyed_images", "is_key"]

_LONGEST_KEY = 500  # LMDB's limit is 511 bytes; a sub-image adds its number


def is_key(text: str) -> bool:
    """Return whether BasicSR can read this key: ASCII letters, digits, ``_``, ``-``."""
    return bool(text) and _ascii_key(text) == text


def find_keyed_images(folders: Sequence[Path]) -> tuple[dict[str, str], list[Skipped]]:
    """Give every image under ``folders`` a key: its path within its folder, without suffix, joined by ``_``.

    The keys are ASCII and without dots, as BasicSR needs: a letter beyond ASCII is written as its code point,
    any other sign as ``_``.

    Returns:
        Key to path, sorted by key; and the images that have no key of their own: of two with one key the
        first has it, by the order of ``folders`` and then of the names.

    Raises:
        UserError: A folder is missing or holds no images.
    """
    paths: dict[str, str] = {}
    skipped: list[Skipped] = []
    for folder in folders:
        for relative in find_images(folder, recursive=True):
            key = _ascii_key("_".join(relative.with_suffix("").parts))
            path = str(folder / relative)
            if key in paths:
                reason = f"would be stored as {key!r}, as {paths[key]} is: rename one of them"
                skipped.append(Skipped(path, reason))
            elif len(key) > _LONGEST_KEY:
                reason = f"would have a key of {len(key)} letters, at most {_LONGEST_KEY} are possible"
                skipped.append(Skipped(path, reason))
            else:
                paths[key] = path
    return {key: paths[key] for key in sorted(paths)}, skipped


def _ascii_key(name: str) -> str:
    ascii_name = "".join(letter if letter.isascii() else f"u{ord(letter):x}" for letter in name)
    return re.sub(r"[^A-Za-z0-9_-]", "_", ascii_name)
