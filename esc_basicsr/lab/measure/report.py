"""What a measurement leaves behind: a Markdown table, JSON with every figure, a picture."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmengine

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import written_whole
from esc_basicsr.metrics.result_files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["make_folder", "markdown_table", "mebibytes", "milliseconds", "write_report"]


def make_folder(folder: Path | None) -> None:
    """Make the folder for the results, if one was asked for, before hours go into them.

    Raises:
        UserError: It cannot be made, or written into.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output {folder}: cannot write into this folder ({error.strerror}).") from error


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def milliseconds(seconds: float) -> str:
    """Seconds as a table has them."""
    return f"{seconds * 1e3:,.1f} ms"


def mebibytes(size: float) -> str:
    """Bytes as a table has them."""
    return f"{size / 2**20:,.0f} MiB"


def write_report(folder: Path, stem: str, results: Mapping[str, Any], text: str, figure: "Figure") -> None:
    """Write ``stem``.json, ``stem``.md and ``stem``.png into a folder that exists, each whole or not at all.

    Raises:
        UserError: One cannot be written.
    """
    write_text(folder / f"{stem}.json", mmengine.dump(dict(results), file_format="json", indent=1))
    write_text(folder / f"{stem}.md", text + "\n")
    with written_whole(folder / f"{stem}.png") as file:
        figure.savefig(file, format="png", dpi=110)
