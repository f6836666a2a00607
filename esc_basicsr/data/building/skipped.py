"""Images that are in no set, and the file that lists them."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from esc_basicsr.common.files import written_whole

__all__ = ["Skipped", "report_of", "write_report"]


class Skipped(NamedTuple):
    """An image that is in no set."""

    image: str  # its path, or its key
    reason: str  # what is wrong with it; it follows ``image`` in a message


def report_of(hr_set: Path) -> Path:
    """Return the file that lists what a set and those made with it skipped; it exists if anything was."""
    return hr_set.with_suffix(".skipped.csv")


def write_report(report: Path, skipped: Iterable[Skipped]) -> int:
    """Write the list as CSV and return its length.

    Raises:
        UserError: It cannot be written.
    """
    count = 0
    with written_whole(report) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        rows = csv.writer(text)
        rows.writerow(Skipped._fields)
        for each in skipped:
            rows.writerow(each)
            count += 1
        text.flush()
        text.detach()  # the file is closed by `written_whole`
    return count
