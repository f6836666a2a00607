"""HR and LR images of two folders, paired by name."""

from pathlib import Path

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.first_few import first_few

__all__ = ["image_names", "pair_folders", "stray_names"]

# Of what OpenCV and Pillow read. A name tells alone: a set has many files.
_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jp2", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".pbm", ".pnm", ".avif", ".gif"),
}


def image_names(folder: Path) -> list[str]:
    """List a folder's image files, sorted; hidden ones are ignored.

    Raises:
        UserError: The folder cannot be read.
    """
    return [name for name in _names(folder) if _is_image(name)]


def stray_names(folder: Path) -> list[str]:
    """List a folder's files that are no images, such as Thumbs.db, sorted."""
    return [name for name in _names(folder) if not _is_image(name)]


def pair_folders(gt: Path, lq: Path, template: str = "{}") -> dict[str, str]:
    """Find the LR image of each HR image: names are told by HR's without suffix; suffixes may differ.

    ``template``: an LR image's name without suffix, ``{}`` being HR's.

    Returns:
        LR name by HR name, sorted.

    Raises:
        UserError: An image of one folder has none in the other, or several.
    """
    found: dict[str, list[str]] = {}
    lq_names = image_names(lq)
    for name in lq_names:
        found.setdefault(Path(name).stem, []).append(name)
    pairs, alone = {}, []
    for name in image_names(gt):
        wanted = template.format(Path(name).stem)
        same = [other for other in found.get(wanted, []) if Path(other).suffix == Path(name).suffix]
        matches = same or found.get(wanted, [])
        if len(matches) > 1:
            raise UserError(
                f"'{name}' of '{gt}' has several LR images in '{lq}': {', '.join(matches)}. Keep one."
            )
        if matches:
            pairs[name] = matches[0]
        else:
            alone.append(f"{name} (LR: {wanted}.*)")
    without_hr = sorted({*lq_names} - {*pairs.values()})
    if alone or without_hr:
        parts = [
            f"{len(names)} of {total} images of '{folder}' have no {other}: {first_few(names)}"
            for names, total, folder, other in (
                (alone, len(pairs) + len(alone), gt, "LR image"),
                (without_hr, len(lq_names), lq, "HR image"),
            )
            if names
        ]
        raise UserError(
            f"{'; '.join(parts)}. LR names are by filename_tmpl '{template}': '{{}}x4', for one, where they "
            "are HR names with x4 behind."
        )
    return pairs


def _names(folder: Path) -> list[str]:
    try:
        return sorted(
            path.name for path in folder.iterdir() if not path.name.startswith(".") and path.is_file()
        )
    except OSError as error:
        raise UserError(f"'{folder}' cannot be read: {error.strerror}.") from error


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in _SUFFIXES
