"""The table that a test run ends with: this network by test sets, beside what is published."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from esc_basicsr.common.tables import markdown_table
from esc_basicsr.metrics.published import (
    PUBLICATION,
    RESTORATION,
    RESTORATION_SETS,
    TRAINING_SETS,
    published_figures,
    published_restoration,
)
from esc_basicsr.metrics.result_files import write_csv, write_text

_NOTHING = "—"
_OTHER_NAMES = {"bsd100": "b100", "bsds100": "b100"}


class SetResult(NamedTuple):
    """The mean of each metric over the ``images`` images of a test set."""

    images: int
    metrics: Mapping[str, float]


class _Row(NamedTuple):
    method: str
    trained_on: str
    figures_from: str
    is_this_network: bool
    values: Mapping[str, Mapping[str, float]]  # test set -> metric -> value


@dataclass(frozen=True)
class ResultsTable:
    """Methods by test sets."""

    name: str  # of this run's network
    scale: int | None  # None if unknown
    checkpoint: str | None  # the file its weights are from, if any
    variant: str | None  # the published one that the network is, if any
    metrics: Mapping[str, Mapping[str, Any]]  # the options' ``val.metrics``
    results: Mapping[str, SetResult]  # by test set
    is_padded: bool = False  # LR was mirrored to multiples of the network's window (``val.pad_to_window``)

    def write(self, folder: Path) -> None:
        """Write results.md and results.csv into ``folder``, each whole or not at all.

        Raises:
            UserError: One cannot be written.
        """
        write_text(folder / "results.md", f"# {_one_line(self.name)}\n\n{self.markdown()}\n")
        columns = [(name, metric) for name in self.results for metric in self._measured()]
        write_csv(
            folder / "results.csv",
            ["method", "trained_on", "figures_from", "same_network"]
            + [f"{name} {metric}" for name, metric in columns],
            [
                [row.method, row.trained_on, row.figures_from, "yes" if row.is_this_network else "no"]
                + [row.values.get(name, {}).get(metric) for name, metric in columns]
                for row in self._rows()
            ],
        )

    def markdown(self) -> str:
        """Return the table in Markdown, and where its figures come from."""
        rows = self._rows()
        head = ["method", "trained on", *self.results]
        lines = [
            [self._label(row), row.trained_on or _NOTHING]
            + [self._cell(row.values.get(name, {})) for name in self.results]
            for row in rows
        ]
        table = markdown_table(_escaped(head), map(_escaped, lines))
        return "\n\n".join([table, *self._notes(rows)])

    def _measured(self) -> list[str]:
        """List metrics that were measured on any of the sets, in the options' order."""
        return [
            metric
            for metric in self.metrics
            if any(metric in result.metrics for result in self.results.values())
        ]

    def _rows(self) -> list[_Row]:
        trained_on = self._training_sets()
        own = {name: result.metrics for name, result in self.results.items()}
        rows = [_Row(self.name, trained_on[0] if len(trained_on) == 1 else "", "measured", True, own)]
        comparable = {metric: kind for metric in self._measured() if (kind := self._published_kind(metric))}
        if self.scale is None or not comparable:
            return rows
        published = [
            (method, training_set, PUBLICATION, figures)
            for training_set in trained_on
            for method, figures in published_figures(training_set, self.scale).items()
        ]
        if self.scale == 1:
            published = [
                (method, RESTORATION_SETS, RESTORATION, figures)
                for method, figures in published_restoration().items()
            ]
        for method, training_set, source, figures in published:
            by_set = {name.casefold(): values for name, values in figures.items()}
            values = {}
            for name in self.results:
                known = by_set.get(_OTHER_NAMES.get(name.casefold(), name.casefold()), {})
                values[name] = {m: known[kind] for m, kind in comparable.items() if kind in known}
            if any(values.values()):
                rows.append(_Row(method, training_set, source, method == self.variant, values))
        return rows

    def _training_sets(self) -> Sequence[str]:
        """Return the training set that the network's name, or else its checkpoint's path, names; else all."""
        for text in (self.name, self.checkpoint or ""):
            named = [training_set for training_set in TRAINING_SETS if training_set in text]
            if len(named) == 1:
                return named
        return TRAINING_SETS

    def _published_kind(self, metric: str) -> str | None:
        """Return which published metric a metric is, if it is measured the same way; else None."""
        options = self.metrics[metric]
        is_restored = self.scale == 1  # then all of RGB is compared, or gray images are
        if (options.get("test_y_channel") is True) is is_restored:
            return None
        if options.get("crop_border") != (0 if is_restored else self.scale):
            return None
        return {"calculate_psnr": "psnr", "calculate_ssim": "ssim"}.get(str(options.get("type")))

    def _label(self, row: _Row) -> str:
        if row.figures_from == "measured":
            return f"**{row.method}, measured**"
        return f"**{row.method}, published**" if row.is_this_network else row.method

    def _cell(self, values: Mapping[str, float]) -> str:
        if not values:
            return _NOTHING
        return " / ".join(
            f"{values[metric]:.{self._digits(metric)}f}" if metric in values else _NOTHING
            for metric in self._measured()
        )

    def _digits(self, metric: str) -> int:
        return 2 if self.metrics[metric].get("type") == "calculate_psnr" else 4

    def _notes(self, rows: Sequence[_Row]) -> list[str]:
        counts = ", ".join(f"{_one_line(name)} {result.images}" for name, result in self.results.items())
        measured = " / ".join(map(_one_line, self._measured())) or "nothing measured"
        notes = [f"Each cell: {measured}, means over all images of a set ({counts})."]
        if self.is_padded:
            notes.append(
                "LR images are mirrored at bottom and right to multiples of the window, and results "
                "cropped, as the release evaluates (val.pad_to_window: true)."
            )
        else:
            notes.append("LR images go through the network as they are (val.pad_to_window: false).")
        published = {row.trained_on: None for row in rows if row.figures_from != "measured"}
        if published and self.scale == 1:
            notes.append(
                f"Published figures: {RESTORATION}, networks trained on {RESTORATION_SETS}; PSNR in dB and "
                "SSIM on RGB or of gray images, no border cropped."
            )
        elif published:
            notes.append(
                f"Published figures: {PUBLICATION}, networks trained on {' or '.join(published)}; PSNR in "
                f"dB and SSIM on Y, a border of {self.scale} pixels cropped."
            )
        elif self.scale != 1 and self._measured() and not any(map(self._published_kind, self._measured())):
            notes.append(
                "Published figures are skipped, as they are measured otherwise: calculate_psnr and "
                f"calculate_ssim with test_y_channel: true and crop_border: {self.scale}."
            )
        return notes


def _escaped(cells: Sequence[str]) -> list[str]:
    return [_one_line(cell).replace("|", "\\|") for cell in cells]


def _one_line(text: str | os.PathLike[str]) -> str:
    return " ".join(str(text).split())
