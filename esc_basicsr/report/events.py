"""TensorBoard's events files: numbers, and comparison images."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import warn_once
from esc_basicsr.report.curves import Curves, first_begun_first, first_iteration, joined, put

__all__ = ["Comparison", "Events", "event_files", "read_events"]

# A record is its length, a checksum, the event, another checksum.
_HEAD = struct.Struct("<QI")
_LENGTH, _CHECKSUM = 8, 4


class Comparison(NamedTuple):
    """The position of a comparison image in an events file; its PNG is read when it is needed."""

    iteration: int
    file: Path
    offset: int
    tag: str

    def png(self) -> bytes:
        """Read the image.

        Raises:
            UserError: The file has changed.
        """
        _, event = next(_events(self.file, self.offset), (0, None))
        for value in event.summary.value if event else ():
            if value.tag == self.tag and value.HasField("image"):
                return bytes(value.image.encoded_image_string)
        raise UserError(f"{self.file} changed while it was read: try again.")


class Events(NamedTuple):
    """Curves and comparison images of a training, in the order of iterations."""

    curves: Curves
    comparisons: list[Comparison]


def event_files(folder: Path) -> list[Path]:
    """List the events files of a folder, oldest first."""
    return sorted(path for path in folder.glob("*tfevents*") if path.is_file())


def read_events(files: Sequence[Path]) -> Events:
    """Read one training's events files, oldest first.

    A record that a killed process or a running one has half written ends its file.

    Raises:
        UserError: A file cannot be read.
    """
    runs: list[tuple[Curves, dict[tuple[str, int], Comparison]]] = []
    for path in files:
        curves: Curves = {}
        own: dict[tuple[str, int], Comparison] = {}
        try:
            for offset, event in _events(path):
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        put(curves, value.tag, event.step, value.simple_value)
                    elif value.HasField("image"):
                        own[value.tag, event.step] = Comparison(event.step, path, offset, value.tag)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
        runs.append((curves, own))
    begins = [min([first_iteration(curves), *(step for _, step in own)]) for curves, own in runs]
    comparisons: dict[tuple[str, int], Comparison] = {}
    for (_, own), begin in first_begun_first([*zip(runs, begins, strict=True)], begins):
        comparisons = {key: known for key, known in comparisons.items() if key[1] < begin} | own
    return Events(joined(curves for curves, _ in runs), sorted(comparisons.values()))


def _events(path: Path, offset: int = 0) -> Iterator[tuple[int, Any]]:
    """Yield a file's events from an offset on, each with its own offset."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    size = path.stat().st_size  # what a running training adds meanwhile is not read

    from google.protobuf.message import DecodeError  # after tensorboard, which brings it

    with path.open("rb") as file:
        file.seek(offset)
        while offset + _HEAD.size <= size:
            head = file.read(_HEAD.size)
            length, checksum = _HEAD.unpack(head)
            if checksum != masked_crc32c(head[:_LENGTH]):
                _warn_of_damage(path, offset)
                return
            end = offset + _HEAD.size + length + _CHECKSUM
            if end > size:
                return
            try:
                event = Event.FromString(file.read(length))
            except DecodeError:
                _warn_of_damage(path, offset)
                return
            yield offset, event
            offset = end
            file.seek(offset)


def _warn_of_damage(path: Path, offset: int) -> None:
    warn_once(f"{path} is damaged {offset:,} bytes in: what follows is skipped.")
