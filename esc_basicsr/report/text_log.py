"""BasicSR's train_*.log: numbers by iteration, and the options that it begins with."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from esc_basicsr.common.errors import UserError
from esc_basicsr.report.curves import Curves, joined, put

__all__ = ["TextLog", "read_logs"]

_MESSAGE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+: (.*)")
_PROGRESS = re.compile(
    r"\[[^]]*\]\[epoch: *\d+, iter: *(\d[\d,]{0,18}), lr:\(([^,)]*).*?\)\] "
    r"(?:\[eta: .*?, time \(data\): (\d+(?:\.\d+)?) \([\d.]+\)\] )?(.*)"
)
_ENTRY = re.compile(r"\b(\w+): (\S+)")
_VALIDATION = re.compile(r"Validation (.+)$")
_METRIC = re.compile(r"\t # (\w+): (\S+)")
_START = re.compile(r"Start training from epoch: \d+, iter: (\d{1,18})")
_SECTION = re.compile(r" +(\w+):\[$")
_OPTION = re.compile(r" +(\w+): (.*)$")
_LONGEST = 10_000  # characters of a line; expressions take time that grows faster than the line


class TextLog(NamedTuple):
    """Curves of a training's logs, and the newest one's options: texts by names such as train.total_iter."""

    curves: Curves
    options: dict[str, str]


def read_logs(files: Sequence[Path]) -> TextLog:
    """Read one training's logs, oldest first.

    ``images_per_second`` is worked out from the time of an iteration and the batch where it is not logged.

    Raises:
        UserError: A file cannot be read.
    """
    logs = []
    for path in files:
        logs.append(_Reader())
        try:
            with path.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    logs[-1].take(line[:_LONGEST].rstrip("\n"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    options = next((log.options for log in reversed(logs) if log.options), {})
    return TextLog(joined(log.curves for log in logs), options)


class _Reader:
    """A reader of one log, line by line."""

    def __init__(self) -> None:
        self.curves: Curves = {}
        self.options: dict[str, str] = {}
        self._sections: list[str] = []
        self._is_new = True  # no training iteration yet: what is indented are options
        self._iteration: int | None = None  # the last one that is known
        self._validated: dict[str, int] = {}
        self._set: str | None = None  # whose metrics follow
        self._before_start: list[tuple[str, float]] = []

    def take(self, line: str) -> None:
        message = _MESSAGE.match(line)
        if message is None:
            self._take_more(line)
            return
        self._set = None
        text = message[1]
        if progress := _PROGRESS.match(text):
            self._take_progress(*progress.groups())
        elif validation := _VALIDATION.match(text):
            self._set = validation[1]
            if self._iteration is not None:
                self._validated[self._set] = self._iteration_of_validation(self._set)
        elif start := _START.match(text):
            self._is_new = False
            self._iteration = int(start[1])
            for name, value in self._before_start:  # what an interrupted run had not validated
                put(self.curves, name, self._iteration, value)
        elif text.startswith("End of training"):
            self._iteration = self._number("train.total_iter") or self._iteration
            self._validated.clear()  # the last iteration is validated again

    def _take_progress(self, iteration: str, rate: str, seconds: str | None, entries: str) -> None:
        self._iteration = int(iteration.replace(",", ""))
        values = {}
        for name, text in [("lr", rate), *_ENTRY.findall(entries)]:
            try:
                values[f"losses/{name}" if name.startswith("l_") else name] = float(text)
            except ValueError:
                continue  # a line that was cut short
        batch = _batch(self.options)
        if seconds is not None and batch and float(seconds) > 0:
            values.setdefault("images_per_second", batch / float(seconds))
        for name, value in values.items():
            put(self.curves, name, self._iteration, value)

    def _take_more(self, line: str) -> None:
        """Take a line that continues a message."""
        if self._set is not None and (metric := _METRIC.match(line)):
            try:
                name, value = f"metrics/{self._set}/{metric[1]}", float(metric[2])
            except ValueError:
                return
            if self._iteration is None:
                self._before_start.append((name, value))
            else:
                put(self.curves, name, self._validated[self._set], value)
        elif self._is_new and (section := _SECTION.match(line)):
            self._sections.append(section[1])
        elif self._is_new and line.strip() == "]" and self._sections:
            self._sections.pop()
        elif self._is_new and (option := _OPTION.match(line)):
            self.options[".".join([*self._sections, option[1]])] = option[2]

    def _iteration_of_validation(self, name: str) -> int:
        """Work out what BasicSR does not log: the next multiple of val_freq after what is known."""
        assert self._iteration is not None
        frequency = self._number("val.val_freq")
        if not frequency:
            return self._iteration
        total = self._number("train.total_iter")
        if self._iteration == total:
            return total
        begin = max(self._iteration, self._validated.get(name, -1) + 1)
        return -(-begin // frequency) * frequency

    def _number(self, option: str) -> int | None:
        return _number(self.options, option)


def _number(options: Mapping[str, str], name: str) -> int | None:
    try:
        return int(float(options[name]))
    except (KeyError, ValueError, OverflowError):
        return None


def _batch(options: Mapping[str, str]) -> int | None:
    """Return the images of an iteration, of all processes."""
    whole = _number(options, "datasets.train.global_batch_size")
    if whole:
        return whole
    of_gpu, ranks = _number(options, "datasets.train.batch_size_per_gpu"), _number(options, "world_size")
    if not of_gpu or not ranks:
        return None
    gpus = _number(options, "num_gpu") or 1
    return of_gpu * (ranks if options.get("dist") == "True" else max(1, gpus))
