"""The results of a measurement: a Markdown table, JSON with every number, a figure."""

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from esc_basicsr.common.files import check_writable, written_whole
from esc_basicsr.common.version import __version__
from esc_basicsr.metrics.result_files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_folder(folder: Path | None) -> None:
    """Make the folder for results and a figure, if one was asked for, before hours go into them.

    Raises:
        UserError: It cannot be made, or written into.
    """
    if folder is not None:
        import matplotlib.figure  # noqa: F401 - its lack is told now, too

        check_writable(folder)


def publish(folder: Path | None, stem: str, text: str, *results: Any, **more: Any) -> None:
    """Print ``text``, and `write_results` where a folder is given."""
    print(text)
    if folder is not None:
        write_results(folder, stem, text, *results, **more)


def write_results(
    folder: Path,
    stem: str,
    text: str,
    settings: Mapping[str, Any],
    rows: Sequence[Any],
    device: torch.device,
    draw: "Callable[[], Figure]",
    **more: Any,
) -> None:
    """Write ``stem``.json, .md and .png, each whole or not at all.

    Args:
        folder: Exists already.
        stem: Name of the files.
        text: The table and its notes.
        settings: How the figures came about; the machine is added.
        rows: The figures: mappings, or named tuples.
        device: What was measured on.
        draw: Makes the figure.
        more: What else the JSON file has.

    Raises:
        UserError: A file cannot be written.
    """
    import mmengine  # here, so that describing a machine does not need it

    listed = [row if isinstance(row, Mapping) else row._asdict() for row in rows]
    results = {"settings": {**settings, "machine": describe_machine(device)}, "rows": listed, **more}
    write_text(folder / f"{stem}.json", mmengine.dump(results, file_format="json", indent=1))
    write_text(folder / f"{stem}.md", text + "\n")
    with written_whole(folder / f"{stem}.png") as file:
        draw().savefig(file, format="png", dpi=110)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """List what a figure depends on besides the code."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "esc_basicsr": __version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else None
    return model[1] if model else platform.processor() or platform.machine()
