"""Keys of images in an LMDB, and the files they stand for."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building.skipped import LeftOut
from esc_basicsr.data.image_folder import find_images

__all__ = ["ImageFiles", "collect_images", "find_keyed_images", "is_key"]

_LONGEST_KEY = 500  # LMDB's limit is 511 bytes; a sub-image adds its number


class ImageFiles(Mapping[str, Path]):
    """Keys and the paths of their files, in the order of the keys.

    A million of them take 0.2 GB with paths of 60 letters, half of what a dict of ``Path`` takes.
    """

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = {key: paths[key] for key in sorted(paths)}

    def __getitem__(self, key: str) -> Path:
        """The file of ``key``."""
        return Path(self._paths[key])

    def __iter__(self) -> Iterator[str]:
        """The keys, sorted."""
        return iter(self._paths)

    def __len__(self) -> int:
        """Number of files."""
        return len(self._paths)


def is_key(text: str) -> bool:
    """Whether BasicSR can read an image of this key: ASCII letters, digits, ``_`` and ``-``."""
    return bool(text) and _ascii_key(text) == text


def find_keyed_images(folders: Sequence[Path]) -> tuple[ImageFiles, list[LeftOut]]:
    """Give every image under ``folders`` a key: its path within its folder, without suffix, joined by ``_``.

    The keys are ASCII and without dots, as BasicSR needs: a letter beyond ASCII is written as its code point,
    any other sign as ``_``.

    Returns:
        The images, and those that have no key of their own: of two with one key the first has it, by the
        order of ``folders`` and then of the names.

    Raises:
        UserError: A folder is missing or holds no images.
    """
    paths: dict[str, str] = {}
    left_out: list[LeftOut] = []
    for folder in folders:
        for relative in find_images(folder, recursive=True):
            key = _ascii_key("_".join(relative.with_suffix("").parts))
            path = str(folder / relative)
            if key in paths:
                reason = f"would be stored as {key!r}, as {paths[key]} is: rename one of them"
                left_out.append(LeftOut(path, reason))
            elif len(key) > _LONGEST_KEY:
                reason = f"would have a key of {len(key)} letters, at most {_LONGEST_KEY} are possible"
                left_out.append(LeftOut(path, reason))
            else:
                paths[key] = path
    return ImageFiles(paths), left_out


def collect_images(folders: Sequence[Path]) -> ImageFiles:
    """Give every image under ``folders`` a key, as `find_keyed_images` does.

    Raises:
        UserError: As there; and an image has no key of its own.
    """
    images, left_out = find_keyed_images(folders)
    if left_out:
        raise UserError(f"{left_out[0].image} {left_out[0].reason}")
    return images


def _ascii_key(name: str) -> str:
    ascii_name = "".join(letter if letter.isascii() else f"u{ord(letter):x}" for letter in name)
    return re.sub(r"[^A-Za-z0-9_-]", "_", ascii_name)
