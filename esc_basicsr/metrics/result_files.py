"""Files of results: their names, which may come from users' text, and tables of comma-separated values."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from esc_basicsr.common.files import make_folder_of, written_whole


def file_name(text: str) -> str:
    """Turn ``text`` into the name of one file: itself, but for what would lead elsewhere or hide the file.

    Slashes, control characters, a leading dot, and ``%``, are written as ``%2F``.
    """
    return re.sub(r"[\x00-\x1f\x7f/\\%]|^\.", lambda match: f"%{ord(match[0]):02X}", text)


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table, whole or not at all; floats in full, None as nothing. Its folder is made.

    Raises:
        UserError: It cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write text, whole or not at all. Its folder is made.

    Raises:
        UserError: It cannot be written.
    """
    make_folder_of(path)
    with written_whole(path) as file:
        # Names of files may hold bytes that are no text.
        file.write(text.encode("utf-8", "backslashreplace"))
