"""An experiment as its folder has it: logs, TensorBoard's events, tables."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esc_basicsr.common.errors import UserError
from esc_basicsr.options.loader import load_options
from esc_basicsr.report.curves import Curves, joined, put
from esc_basicsr.report.events import Comparison, event_files, read_events
from esc_basicsr.report.text_log import read_logs

__all__ = ["Experiment", "read_experiment"]

# Options that say where and how a run was started, not what is trained.
_INCIDENTAL = {"name", "root_path", "rank", "auto_resume", "dist", "is_train", "seed_is_drawn"}
_PATHS = ("path.experiments_root", "path.models", "path.training_states", "path.log", "path.visualization")


@dataclass(frozen=True)
class Experiment:
    """Curves, images and options of a training."""

    name: str  # its folder's
    curves: Curves
    comparisons: Sequence[Comparison]  # in the order of iterations
    # metrics at each set's last validation: set -> image -> ``iter`` and metrics
    images: Mapping[str, Mapping[str, Mapping[str, float]]]
    options: Mapping[str, str]  # by names such as train.total_iter, without those of its folders


def read_experiment(folder: Path) -> Experiment:
    """Read an experiment.

    Curves come from the logs, TensorBoard's events and metrics/history.csv; of what several of them have, the
    last one counts, which has most digits.

    Args:
        folder: experiments/NAME, beside whose parent tb_logger/NAME may lie; or a folder with events files.

    Raises:
        UserError: The folder is no experiment's, nothing was logged yet, or a file cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected an experiment's, such as experiments/NAME.")
    folder = folder.resolve()
    logs = sorted(path for path in folder.glob("train_*.log") if path.is_file())
    events = event_files(folder) or event_files(folder.parent.parent / "tb_logger" / folder.name)
    history = folder / "metrics" / "history.csv"
    if not (logs or events or history.is_file()):
        raise UserError(
            f"{folder} is no experiment's folder: it has neither train_*.log nor metrics/history.csv, and "
            f"there are no TensorBoard events in it or in tb_logger/{folder.name} beside "
            f"{folder.parent.name}/."
        )
    text_log, from_events = read_logs(logs), read_events(events)
    curves = {**text_log.curves}
    for more in (from_events.curves, _read_history(history)):
        for name, curve in more.items():
            curves[name] = {**curves.get(name, {}), **curve}
    curves = joined([curves])
    if not curves and not from_events.comparisons:
        raise UserError(f"{folder}: nothing was logged there yet; try again after the first iterations.")
    options = text_log.options or _read_options(folder)
    return Experiment(
        folder.name,
        curves,
        from_events.comparisons,
        _read_images(folder / "metrics"),
        {key: text for key, text in options.items() if key not in _INCIDENTAL and key not in _PATHS},
    )


def _rows(path: Path) -> list[dict[str, str]]:
    """Read a table's rows; none if there is no such file."""
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table: {error}") from error


def _numbers(row: Mapping[str, Any], other: Sequence[str]) -> dict[str, float]:
    numbers = {}
    for key, text in row.items():
        if key in other or not isinstance(text, str):
            continue
        try:
            value = float(text)
        except ValueError:
            continue  # a metric that was not measured there
        if math.isfinite(value):
            numbers[key] = value
    return numbers


def _read_history(path: Path) -> Curves:
    curves: Curves = {}
    for row in _rows(path):
        numbers = _numbers(row, ("set", "images"))
        iteration = numbers.pop("iter", None)
        if iteration is None or not row.get("set"):
            raise UserError(f"{path} is no history of validations: it lacks iter or set. Remove it.")
        for metric, value in numbers.items():
            put(curves, f"metrics/{row['set']}/{metric}", int(iteration), value)
    return curves


def _read_images(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    return {
        path.stem: {
            row["image"]: _numbers(row, ("image", "width", "height")) for row in _rows(path) if "image" in row
        }
        for path in sorted(folder.glob("*.csv"))
        if path.name != "history.csv"
    }


def _read_options(folder: Path) -> dict[str, str]:
    """Read the experiment's copy of its option file; nothing if there is not exactly one."""
    files = sorted(path for path in folder.glob("*.yml") if path.is_file())
    if len(files) != 1:
        return {}
    return _flat(load_options(files[0]))


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
