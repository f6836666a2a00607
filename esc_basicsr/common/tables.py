"""Tables in Markdown, and figures as they stand in them."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table as Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def milliseconds(seconds: float) -> str:
    """Write seconds as a table has them."""
    return f"{seconds * 1e3:,.1f} ms"


def mebibytes(size: float) -> str:
    """Write bytes as a table has them."""
    return f"{size / 2**20:,.0f} MiB"


def scientific(value: float | None) -> str:
    """Write a small number, or nothing for None."""
    return "" if value is None else f"{value:.1e}"
