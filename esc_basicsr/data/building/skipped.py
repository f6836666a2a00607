"""Images that are in no set, and the file that lists them."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from esc_basicsr.common.files import written_whole

__all__ = ["LeftOut", "report_of", "write_report"]


class LeftOut(NamedTuple):
    """An image that was left out.

    Attributes:
        image: Its path, or its key.
        reason: What is wrong with it, to be said after ``image``.
    """

    image: str
    reason: str


def report_of(hr_set: Path) -> Path:
    """The file that lists what was left out of a set and of those made with it; there if anything was."""
    return hr_set.with_suffix(".left_out.csv")


def write_report(report: Path, left_out: Iterable[LeftOut]) -> int:
    """Write the list as CSV, and give its length.

    Raises:
        UserError: It cannot be written.
    """
    count = 0
    with written_whole(report) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        rows = csv.writer(text)
        rows.writerow(LeftOut._fields)
        for each in left_out:
            rows.writerow(each)
            count += 1
        text.flush()
        text.detach()  # the file is closed by whom it was lent from
    return count
