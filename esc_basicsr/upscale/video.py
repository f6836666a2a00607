"""Upscaling films: frame by frame, in segments that a killed process leaves for the next to go on from."""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn, cast

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from filelock import FileLock, Timeout
from tqdm import tqdm

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import check_replaceable, make_folder_of, written_whole
from esc_basicsr.common.log import logger
from esc_basicsr.common.version import __version__
from esc_basicsr.upscale.image_file import Pixels
from esc_basicsr.upscale.output_size import OutputSize, upscaled
from esc_basicsr.upscale.upscaler import Upscaler
from esc_basicsr.upscale.video_file import (
    SEGMENT_FORMAT,
    Look,
    Span,
    check_encodes,
    check_holds,
    encode_segment,
    frames_from,
    from_rgb,
    join,
    length_of,
    look_of,
    main_stream,
    opened,
    segment_packets,
    time_of,
    to_rgb,
)
from esc_basicsr.weights.shipped import weights_file

# Takes how many frames are done, and how many there are to be where that is known.
Report = Callable[[float, float | None], None]

_SEGMENT = 48  # frames: so much is lost by a kill, so far apart are key frames at most
_FEW = Fraction(9, 10)  # of the frames or seconds that a file promises; it may estimate them


def upscale_video(
    upscaler: Upscaler,
    source: Path,
    target: Path,
    size: OutputSize,
    crf: int,
    start: Fraction | None = None,
    end: Fraction | None = None,
    report: Report | None = None,
) -> None:
    """Upscale a film, or a part of it; audio, subtitles, chapters and tags go with it (docs/upscale.md).

    Until it is done, the folder ``TARGET.parts`` holds what is; called again, this goes on from there.

    Args:
        upscaler: What upscales a frame.
        source: The film.
        target: The new one, .mkv, .mp4 or .mov.
        size: How large it becomes; its sides are even.
        crf: Constant rate factor of the encoder: 0 best, 51 smallest.
        start: Where the part begins, in seconds; the film's beginning by default.
        end: Where it ends; the film's end by default.
        report: Is called after each frame with the number that are done, and that there are to be where the
            file tells.

    Raises:
        UserError: The film cannot be read, or the new one not be written; or ``TARGET.parts`` is of another
            job.
    """
    check_replaceable(target)
    with _told_of(source):
        check_holds(source, target)
        with _parts(target, _job(upscaler, source, size, crf, start, end)) as parts:
            span = _make_segments(upscaler, source, parts, size, crf, (start, end), report)
            with written_whole(target.absolute()) as file, _told_of(source, file.name):
                join(source, _segments(parts), target, file.name, span)
        shutil.rmtree(parts, ignore_errors=True)


@contextlib.contextmanager
def _told_of(source: Path, written: str = "") -> Iterator[None]:
    """Say of the film what FFmpeg raises, unless it is of the file that is written, such as a full disk."""
    try:
        yield
    except av.FFmpegError as error:
        if error.filename == written and isinstance(error, OSError):
            raise OSError(error.errno, error.strerror) from error
        raise UserError(f"{source} cannot be upscaled: {error.strerror or error}.") from error


def _job(
    upscaler: Upscaler, source: Path, size: OutputSize, crf: int, *span: Fraction | None
) -> dict[str, Any]:
    """Describe all on which the segments depend."""
    status = source.stat()
    return {
        "film": [source.name, status.st_size, status.st_mtime_ns],
        "model": hashlib.sha256(weights_file(upscaler.name).read_bytes()).hexdigest(),
        "precision": upscaler.precision,
        "ensemble": upscaler.ensemble,
        "size": str(size),
        "crf": crf,
        "start and end": [str(time) for time in span],
        "version": __version__,
    }


@contextlib.contextmanager
def _parts(target: Path, job: dict[str, Any]) -> Iterator[Path]:
    """Lend the folder of a film's segments, to one process at a time."""
    folder = target.with_name(f"{target.name}.parts")
    note = folder / "job.json"
    make_folder_of(note)
    try:
        with FileLock(folder / "lock", timeout=0):
            if note.exists() and _segments(folder):
                before = json.loads(note.read_text("utf-8"))
                if differing := [key for key in job if before.get(key) != job[key]]:
                    raise UserError(
                        f"{folder} holds parts of another job ({', '.join(differing)} differ): remove it to "
                        "begin anew, or call as before to go on."
                    )
            else:
                with written_whole(note) as file:
                    file.write(json.dumps(job, indent=2).encode())
            try:
                yield folder
            except BaseException:
                if _segments(folder):
                    logger.warning("%s holds what is done: call again to go on.", folder)
                else:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    except Timeout:
        raise UserError(f"{target} is being made by another process already.") from None


def _segments(parts: Path) -> list[Path]:
    return sorted(parts.glob(f"*.{SEGMENT_FORMAT}"))


def _make_segments(
    upscaler: Upscaler,
    source: Path,
    parts: Path,
    size: OutputSize,
    crf: int,
    times: tuple[Fraction | None, Fraction | None],
    report: Report | None,
) -> Span:
    """Upscale what is not yet upscaled."""
    with opened(source) as container:
        stream = main_stream(container, source)
        span = Span(_beginning(container, stream), *times)
        length = length_of(container)
        is_beyond = span.start is not None and 0 < length <= span.start
        head = None if is_beyond else next(_frames(source, span), None)  # which would decode all to see
        if head is None:
            which = "within this time" if times != (None, None) else "that can be decoded"
            raise UserError(f"{source} has no frames {which}.")
        look = look_of(head, stream, source)
        total, promised = _count(length, stream, span), stream.frames
    shape = size.of(to_rgb(head).shape, upscaler.scale, str(source), multiple=2)
    check_encodes(shape, look, source)
    done, last = _done(_segments(parts))
    upscale = _RepeatingUpscaler(upscaler, shape)
    with tqdm(total=total, initial=done, desc=source.name, unit="frame", leave=False) as bar:
        results = _results(_frames(source, span, last), upscale, look, source, bar, report)
        for first in results:
            segment = parts / f"{len(_segments(parts)):06}.{SEGMENT_FORMAT}"
            with written_whole(segment.absolute()) as file, _told_of(source, file.name):
                some = itertools.chain([first], itertools.islice(results, _SEGMENT - 1))
                encode_segment(file.name, some, shape, look, crf)
    came, last = _done(_segments(parts))
    if times == (None, None) and last is not None:
        seconds = max(length - 1, Fraction(0))  # the last frame may be shown for one
        is_short = came < promised * _FEW if promised else last - span.beginning < seconds * _FEW
        if is_short:
            words = f"some {promised}" if promised else f"{float(length):.1f} s of them"
            logger.warning("%s: %d frames came, and it promises %s: it may be cut off.", source, came, words)
    if upscale.repeats:
        logger.info("%s: %d frames repeat the one before.", source, upscale.repeats)
    return span


def _beginning(container: InputContainer, stream: VideoStream) -> Fraction:
    """Return the timestamp at which a film begins: not zero in what was broadcast."""
    first = Fraction(container.start_time or 0, av.time_base)  # rounded
    if stream.start_time is not None:
        first = min(first, stream.start_time * cast(Fraction, stream.time_base))
    return max(first, Fraction(0))


def _results(
    frames: Iterator[VideoFrame],
    upscale: "_RepeatingUpscaler",
    look: Look,
    source: Path,
    bar: "tqdm[NoReturn]",
    report: Report | None,
) -> Iterator[VideoFrame]:
    """Upscale frames, one at a time, as they are asked for."""
    before = None
    for frame in frames:
        pixels = to_rgb(frame)
        if before not in (None, pixels.shape):
            raise UserError(f"{source} changes its size at {float(time_of(frame)):.2f} s: cut it there.")
        before = pixels.shape
        assert frame.pts is not None
        yield from_rgb(upscale(pixels), look, frame.pts)
        bar.update()
        if report is not None:
            report(bar.n, bar.total)


def _done(segments: list[Path]) -> tuple[int, Fraction | None]:
    """Return how many frames segments hold, and the timestamp of the last."""
    times = [time_of(packet) for packet in segment_packets(segments[-1:])]
    return max(len(segments) - 1, 0) * _SEGMENT + len(times), times[-1] if times else None


def _frames(source: Path, span: Span, after: Fraction | None = None) -> Iterator[VideoFrame]:
    """Decode the frames of a part that come after a timestamp."""
    first = after if after is not None else None if span.start is None else span.offset
    for frame in frames_from(source, first):
        time = time_of(frame)
        if span.end is not None and time >= span.beginning + span.end:
            return
        if span.holds(time) and (after is None or time > after):
            yield frame


def _count(length: Fraction, stream: VideoStream, span: Span) -> int | None:
    """Estimate a part's frames; None where the file does not tell."""
    if span.start is None and span.end is None and stream.frames:
        return stream.frames
    if not length or not stream.average_rate:
        return None
    seconds = (length if span.end is None else min(length, span.end)) - (span.start or 0)
    return max(round(seconds * stream.average_rate), 0)


class _RepeatingUpscaler:
    """Upscales frames, but none that equals the one before: cartoons and slides show many twice."""

    def __init__(self, upscaler: Upscaler, size: tuple[int, int]) -> None:
        self.repeats = 0
        self._upscaler, self._size = upscaler, size
        self._last: tuple[Pixels, Pixels] | None = None

    def __call__(self, pixels: Pixels) -> Pixels:
        if self._last is not None and np.array_equal(self._last[0], pixels):
            self.repeats += 1
        else:
            self._last = pixels, upscaled(self._upscaler, pixels, self._size)
        return self._last[1]
