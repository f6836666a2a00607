"""Video files by PyAV: frames out of one, upscaled frames into segments, those and all else into one again.

Every segment begins with a key frame and has no B-frames, so that times of decoding are times of display and
segments follow one another in a file as they are.
"""

import contextlib
import heapq
import io
import itertools
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition, Stream
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation
from av.video.stream import VideoStream

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.first_few import first_few
from esc_basicsr.common.log import logger, warn_once
from esc_basicsr.upscale.image_file import VIDEO_FORMATS, Pixels

AnyPacket: TypeAlias = "Packet[Any]"

SEGMENT_FORMAT = "nut"  # whose timestamps are as fine as those of any other

# libswscale's flags, of which PyAV before 18 names but the first: bicubic, chroma of every pixel in and out,
# accurate rounding
_EXACTLY = Interpolation.BICUBIC.value | 0x4000 | 0x2000 | 0x40000
_BT709, _UNSPECIFIED, _BT601 = 1, 2, 6  # matrices from RGB
_CHROMA = {(8, 8): "420", (8, 16): "422"}  # width and height of what is 16 × 16 in luma
# Tags that are true of the old file or stream alone.
_FALSE_TAGS = re.compile(
    r"major_brand|minor_version|compatible_brands|encoder|handler_name|vendor_id|rotate|"
    r"BPS|DURATION|NUMBER_OF_|_STATISTICS_",
    re.IGNORECASE,
)
_LOST = {
    SideData.DOVI_METADATA: "Dolby Vision",
    SideData.DYNAMIC_HDR_PLUS: "HDR10+",
    SideData.A53_CC: "closed captions within the video",
    SideData.SPHERICAL: "the projection of 360 degrees",
    SideData.STEREO3D: "that it is stereoscopic",
}
_COVERS = {"mjpeg": ("cover.jpg", "image/jpeg"), "png": ("cover.png", "image/png")}
_MOST_BACKWARD = 1  # second: timestamps that step back further are of another recording
_MOST_CALLS_IN_VAIN = 1000
_LEAST_STEP = Fraction(1, 1000)  # second, which every format tells from none
_PRIMARIES, _LUMINANCE = 50_000, 10_000  # units in which x265 is told of the mastering display


@dataclass(frozen=True)
class Look:
    """Properties that a video's frames have in common, apart from their size.

    Args:
        pixel_format: As FFmpeg names it, in which upscaled frames are encoded.
        colours: Range, primaries, transfer and matrix, by the names of PyAV's attributes.
        hdr: Parameters of x265 that tell of the mastering display and of light levels.
        time_base: Seconds of one tick of timestamps.
        rate: Frames in a second, on average.
        aspect: Width of a pixel by its height, upright; None where unknown.
    """

    pixel_format: str
    colours: Mapping[str, int]
    hdr: Sequence[str]
    time_base: Fraction
    rate: Fraction
    aspect: Fraction | None


@dataclass(frozen=True)
class Span:
    """The part of a film that is upscaled; times are in seconds.

    Args:
        beginning: Timestamp at which the film begins; those of broadcasts begin at any.
        start: Where the part begins, from the film's beginning; None for the whole.
        end: Where it ends, likewise.
    """

    beginning: Fraction
    start: Fraction | None = None
    end: Fraction | None = None

    @property
    def offset(self) -> Fraction:
        """The timestamp that becomes zero."""
        return self.beginning + (self.start or 0)

    def holds(self, time: Fraction) -> bool:
        """Return whether what has this timestamp belongs to the part."""
        is_begun = self.start is None or time >= self.offset
        return is_begun and (self.end is None or time < self.beginning + self.end)


def opened(path: Path) -> InputContainer:
    """Open a film for reading."""
    # FFmpeg takes a name such as 12:30.mp4 for an address; tags of old files have encodings of their own.
    return av.open(path.absolute(), metadata_errors="replace")


def main_stream(container: InputContainer, name: object) -> VideoStream:
    """Return the stream that is upscaled: the first that is no cover picture.

    Raises:
        UserError: There is none.
    """
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if _codec_name(stream) is None:
                raise UserError(f"{name}: FFmpeg has no decoder for its video.")
            stream.thread_type = "AUTO"
            return stream
    raise UserError(f"{name} has no video.")


def _codec_name(stream: Stream) -> str | None:
    """Name a stream's codec; None if FFmpeg knows none for it, such as that of an iPhone's spatial sound."""
    name: str | None = getattr(stream, "name", None)
    return name


def _is_timed(container: InputContainer) -> bool:
    """Tell whether all of a film bears timestamps; in program streams (.mpg, .vob) FFmpeg guesses some."""
    return container.format.name != "mpeg"


def length_of(container: InputContainer) -> Fraction:
    """Return a film's length in seconds; 0 where it is not known but by its bit rate."""
    return Fraction((_is_timed(container) and container.duration) or 0, av.time_base)


def frames_from(path: Path, first: Fraction | None = None) -> Iterator[VideoFrame]:
    """Decode a film's frames in the order in which they are shown.

    Args:
        path: The film.
        first: Timestamp in seconds; frames before it are left out.

    Raises:
        UserError: A frame has no timestamp; or timestamps begin again, as where recordings were put together.
    """
    for is_sought in (first is not None, False):
        with opened(path) as container:
            stream = main_stream(container, path)
            if is_sought and not _is_timed(container):
                continue
            if first is not None and is_sought:
                container.seek(int(first / cast(Fraction, stream.time_base)), stream=stream)
            frames = _decoded(container, stream, path)
            head = next(frames, None)
            if is_sought and (head is None or time_of(head) > cast(Fraction, first)):
                continue  # the film begins later, or its index is wrong: decode it from its beginning
            for frame in itertools.chain([] if head is None else [head], frames):
                if first is None or time_of(frame) >= first:
                    yield frame
            return


def _decoded(container: InputContainer, stream: VideoStream, path: Path) -> Iterator[VideoFrame]:
    """Decode frames, each later than the one before."""
    latest: Fraction | None = None
    for packet in _demuxed(container, [stream]):
        try:
            frames = packet.decode()
        except av.error.MemoryError:
            raise
        except av.FFmpegError:
            warn_once(f"{path} is damaged: frames that cannot be decoded are left out.")
            continue
        for frame in frames:
            if frame.pts is None:
                frame.pts = frame.dts  # which is the same without B-frames, as in old AVI files
            if frame.pts is None:
                raise UserError(
                    f"{path}: its frames have no timestamps: put it into another container first."
                )
            if frame.colorspace == _UNSPECIFIED and not frame.format.is_rgb:
                # which players tell by the size: the larger film has another
                is_small = frame.width < 1280 and frame.height <= 576
                frame.colorspace = _BT601 if is_small else _BT709
            time = time_of(frame)
            if latest is None or time > latest:
                latest = time
                yield frame
            elif time < latest - _MOST_BACKWARD:
                raise UserError(f"{path}: timestamps begin again at {float(latest):.2f} s: remux it first.")
            else:
                warn_once(f"{path}: frames whose timestamps are not later than those before are left out.")


def _demuxed(container: InputContainer, streams: Sequence[Stream]) -> Iterator[AnyPacket]:
    """Read packets; where a film is damaged, FFmpeg may ask to be called again."""
    calls_in_vain = 0
    while calls_in_vain < _MOST_CALLS_IN_VAIN:
        calls_in_vain += 1
        with contextlib.suppress(av.error.BlockingIOError):
            for packet in container.demux(*streams):
                calls_in_vain = 0
                yield packet
            return
    raise UserError(f"{container.name} cannot be read on: it is damaged. Remux it first.")


def time_of(timed: "VideoFrame | Packet[Any]") -> Fraction:
    """Return the timestamp of a frame or packet in seconds."""
    ticks = timed.pts if timed.pts is not None else timed.dts
    return Fraction(ticks or 0) * cast(Fraction, timed.time_base)


def look_of(frame: VideoFrame, stream: VideoStream, name: object) -> Look:
    """Tell how upscaled frames are to be encoded by one of those that are read; the log says what is lost."""
    components = frame.format.components
    depth = max(component.bits for component in components)
    suffix = "" if depth <= 8 else "10le" if depth <= 10 else "12le"
    is_rgb = frame.format.is_rgb or frame.format.has_palette
    chroma = "420" if len(components) == 1 else _CHROMA.get(_chroma_size(frame.format), "444")
    colours = {
        "color_range": frame.color_range,
        "color_primaries": frame.color_primaries,
        "color_trc": frame.color_trc,
        "colorspace": frame.colorspace,
    }
    if is_rgb:
        colours |= {"color_range": ColorRange.MPEG, "colorspace": _BT709}
    side_data = {each.type: bytes(each) for each in cast(Any, frame.side_data)}
    lost = [word for kind, word in _LOST.items() if kind in side_data]
    if any(component.is_alpha for component in components):
        lost.append("transparency")
    if lost:
        warn_once(f"{name}: {', '.join(lost)} cannot be kept.")
    if frame.interlaced_frame:
        warn_once(f"{name} is interlaced: its lines are upscaled as they are. Deinterlace it before.")
    aspect = stream.sample_aspect_ratio
    return Look(
        f"yuv{'444' if is_rgb else chroma}p{suffix}",
        colours,
        _hdr_parameters(side_data),
        cast(Fraction, stream.time_base),
        stream.average_rate or stream.guessed_rate or Fraction(25),
        1 / aspect if aspect and _turn(frame)[0] else aspect,
    )


def _chroma_size(pixel_format: VideoFormat) -> tuple[int, int]:
    return pixel_format.chroma_width(16), pixel_format.chroma_height(16)


def _hdr_parameters(side_data: Mapping[SideData, bytes]) -> list[str]:
    """Word AVMasteringDisplayMetadata and AVContentLightMetadata as x265 reads them."""
    parameters = []
    if display := side_data.get(SideData.MASTERING_DISPLAY_METADATA):
        *numbers, has_primaries, has_luminance = struct.unpack_from("=22i", display)
        values = [Fraction(*numbers[first : first + 2]) for first in range(0, 20, 2)]
        if has_primaries and has_luminance:
            red, green, blue, white = (
                "({},{})".format(*(round(value * _PRIMARIES) for value in values[first : first + 2]))
                for first in (0, 2, 4, 6)
            )
            least, most = (round(value * _LUMINANCE) for value in values[8:])
            parameters.append(f"master-display=G{green}B{blue}R{red}WP{white}L({most},{least})")
    if light := side_data.get(SideData.CONTENT_LIGHT_LEVEL):
        parameters.append("max-cll={},{}".format(*struct.unpack_from("=2I", light)))
    return parameters


def to_rgb(frame: VideoFrame) -> Pixels:
    """Convert a frame to RGB, upright: (H, W, 3), uint8, or uint16 where it has more than 8 bits."""
    is_deep = max(component.bits for component in frame.format.components) > 8
    rgb = frame.reformat(
        format="rgb48le" if is_deep else "rgb24", interpolation=_EXACTLY, dst_color_range=ColorRange.JPEG
    )
    pixels: Pixels = rgb.to_ndarray()
    is_transposed, is_upside_down, is_mirrored = _turn(frame)
    pixels = pixels.swapaxes(0, 1) if is_transposed else pixels
    return np.ascontiguousarray(pixels[:: -1 if is_upside_down else 1, :: -1 if is_mirrored else 1])


def _turn(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Tell how a frame is to be turned: transposed, then upside down, then left to right."""
    matrix = cast(Any, frame.side_data).get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return False, False, False
    # what a step to the right becomes, across and down; and a step down
    right_across, right_down, _, down_across, down_down = struct.unpack_from("=5i", matrix)
    if abs(right_down) > abs(right_across):
        return True, right_down < 0, down_across < 0
    return False, down_down < 0, right_across < 0


def from_rgb(pixels: Pixels, look: Look, pts: int) -> VideoFrame:
    """Convert RGB, (H, W, 3), to a frame that is encoded as ``look`` says, by the same matrix as `to_rgb`."""
    rgb = VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.dtype == np.uint8 else "rgb48le")
    rgb.colorspace, rgb.color_range = look.colours["colorspace"], ColorRange.JPEG
    frame = rgb.reformat(
        format=look.pixel_format,
        interpolation=_EXACTLY,
        # what is unspecified is limited, as everywhere
        dst_color_range=look.colours["color_range"] or ColorRange.MPEG,
    )
    for name, value in look.colours.items():
        setattr(frame, name, value)
    frame.pts, frame.time_base = pts, look.time_base
    return frame


def encode_segment(
    file: str | BinaryIO, frames: Iterable[VideoFrame], size: tuple[int, int], look: Look, crf: int
) -> None:
    """Encode frames, as H.264 those of 8 bits and as H.265 deeper ones, whose timestamps are kept.

    Args:
        file: To write to. To a name, FFmpeg writes itself; of a file's methods it drops what a Ctrl-C raises.
        frames: As `from_rgb` gives them.
        size: Their height and width.
        look: What they have in common.
        crf: Constant rate factor of x264 and x265: 0 best, 51 smallest.
    """
    is_deep = look.pixel_format[-2:] == "le"
    own = ["log-level=error", "info=0", "bframes=0", "repeat-headers=1", *look.hdr]
    options = {"crf": str(crf), "bf": "0"} | ({"x265-params": ":".join(own)} if is_deep else {})
    with av.open(file, "w", format=SEGMENT_FORMAT) as output:
        stream = output.add_stream(
            "libx265" if is_deep else "libx264",
            rate=look.rate,
            options=options,
            **{"height": size[0], "width": size[1], "pix_fmt": look.pixel_format},
        )
        encoder = cast(VideoStream, stream).codec_context
        encoder.time_base = look.time_base
        if look.aspect:
            encoder.sample_aspect_ratio = look.aspect
        for name, value in look.colours.items():
            setattr(encoder, name, value)
        for frame in frames:
            output.mux(encoder.encode(frame))
        output.mux(encoder.encode(None))


def check_encodes(size: tuple[int, int], look: Look, name: object) -> None:
    """See that frames of a size can be encoded.

    Raises:
        UserError: The encoder takes none as large, or as small.
    """
    try:
        encode_segment(io.BytesIO(), (), size, look, crf=0)
    except av.FFmpegError as error:
        raise UserError(
            f"{name}: frames of {size[1]} × {size[0]} pixels, {look.pixel_format}, cannot be encoded "
            f"({error.strerror}): give another size by --size or --outscale."
        ) from error


def segment_packets(segments: Iterable[Path]) -> Iterator[AnyPacket]:
    """Read the encoded frames of segments, one after the other."""
    for segment in segments:
        with opened(segment) as container:
            yield from (packet for packet in container.demux(video=0) if packet.size)


def check_holds(path: Path, target: Path) -> None:
    """See that a container holds a film's audio and subtitles; the log names what else it does not hold.

    Raises:
        UserError: It does not.
    """
    try:
        _check_format(path, target)
    except UserError as error:
        others = [suffix for suffix in VIDEO_FORMATS if _is_held(path, target.with_suffix(suffix))]
        advice = f"choose {' or '.join(others)}" if others else "leave it out before, or convert it"
        raise UserError(f"{error}: {advice}.") from error


def _is_held(path: Path, target: Path) -> bool:
    try:
        _check_format(path, target, is_told=False)
    except UserError:
        return False
    return True


def _check_format(path: Path, target: Path, is_told: bool = True) -> None:
    kind = VIDEO_FORMATS[target.suffix.lower()]
    with opened(path) as source, av.open(io.BytesIO(), "w", format=kind) as output:
        output.add_stream("libx264", rate=25)
        copies = _add_copies(source, output, path, target, is_told)
        try:
            output.start_encoding()
        except av.FFmpegError as error:
            names = ", ".join(source.streams[index].name for index in copies)
            raise UserError(
                f"{target}: {target.suffix} does not hold all of {names} in {path} ({error.strerror})"
            ) from error


def join(path: Path, segments: Sequence[Path], target: Path, file: str, span: Span) -> None:
    """Write a film of upscaled segments and of all that the old one has beside its video.

    Args:
        path: The old film.
        segments: Files of `encode_segment`.
        target: Name of the new film, whose suffix says in which format.
        file: Name of the file to write it to.
        span: The part of the old film that the segments are of.
    """
    kind = VIDEO_FORMATS[target.suffix.lower()]
    with (
        opened(path) as source,
        opened(segments[0]) as head,
        av.open(file, "w", format=kind) as output,
    ):
        old = main_stream(source, path)
        video = output.add_stream_from_template(head.streams.video[0], opaque=True)
        _describe(video, old)
        if old.average_rate:
            video.codec_context.framerate = old.average_rate
        if kind != "matroska" and video.codec_context.name == "hevc":
            video.codec_context.codec_tag = "hvc1"  # the only one that Apple's players know
        copies = _add_copies(source, output, path, target, is_told=False)
        tags = _true_tags(source.metadata)
        output.metadata.update(tags)
        output.set_chapters(_chapters(source, span))
        output.start_encoding()
        packets = heapq.merge(
            _of_stream(segment_packets(segments), video, span),
            _copied(source, copies, span),
            key=time_of,
        )
        for packet in _in_order(packets, path):
            output.mux(packet)
    with opened(Path(file)) as new:
        kept = {key.lower() for key in new.metadata}
    # MP4 has some tags in several languages, such as location-eng
    if lost := sorted(key for key in tags if not {key.lower(), key.lower()[:-4]} & kept):
        logger.warning("%s: %s holds no tags such as %s.", target, target.suffix, first_few(lost))


def _describe(new: Stream, old: Stream) -> None:
    new.metadata.update(_true_tags(old.metadata))
    new.disposition = old.disposition


def _true_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in tags.items() if not _FALSE_TAGS.match(key)}


def _add_copies(
    source: InputContainer, output: OutputContainer, path: Path, target: Path, is_told: bool = True
) -> dict[int, Stream]:
    """Add a stream for each that is copied; return them by the index of the old one."""
    video = main_stream(source, path)
    copies: dict[int, Stream] = {}
    lost = []
    is_matroska = output.format.name == "matroska"
    for stream in source.streams:
        name = _codec_name(stream)
        is_cover = bool(stream.disposition & Disposition.attached_pic)
        if stream.index == video.index or (name == "bin_data" and source.chapters()):
            continue  # MP4 has a stream of data for its chapters' titles
        try:
            if stream.type in ("data", "unknown") or (stream.type == "video" and not is_cover):
                raise ValueError
            if name is None and stream.type != "attachment":
                raise ValueError
            if stream.type == "attachment" and not is_matroska:
                raise ValueError
            if is_cover and is_matroska:  # which has pictures among its attachments
                if name not in _COVERS:
                    raise ValueError
                output.add_attachment(*_COVERS[name], _first_packet(path, stream.index))
                continue
            if name == "mov_text" and is_matroska:
                copies[stream.index] = output.add_mux_stream("subrip")
            else:
                copies[stream.index] = output.add_stream_from_template(stream, opaque=True)
        except ValueError:
            if stream.type in ("audio", "subtitle") and name is not None:
                raise UserError(
                    f"{target}: {target.suffix} holds no {stream.type} such as that of {path} ({name})"
                ) from None
            lost.append(f"stream {stream.index} ({stream.type}, {name or 'of an unknown codec'})")
            continue
        _describe(copies[stream.index], stream)
    if lost and is_told:
        logger.warning("%s: %s cannot be kept.", path, ", ".join(lost))
    return copies


def _first_packet(path: Path, index: int) -> bytes:
    with opened(path) as film:
        return bytes(next(film.demux(film.streams[index])))


def _chapters(source: InputContainer, span: Span) -> list[Any]:
    """Return chapters as they are in the part that is upscaled, in milliseconds."""
    chapters = []
    for chapter in source.chapters():
        tick = cast(Fraction, chapter["time_base"])
        times = [chapter[edge] * tick - span.offset for edge in ("start", "end")]
        if span.end is not None:
            times[1] = min(times[1], span.end - (span.start or 0))
        start, end = (max(time, Fraction(0)) for time in times)
        if start < end:
            edges = {"start": round(start * 1000), "end": round(end * 1000)}
            chapters.append({**chapter, **edges, "time_base": Fraction(1, 1000)})
    return chapters


def _of_stream(packets: Iterable[AnyPacket], stream: Stream, span: Span) -> Iterator[AnyPacket]:
    """Give packets to a stream; the part's begin becomes time zero."""
    for packet in packets:
        shift = round(span.offset / packet.time_base)
        if packet.pts is not None:
            packet.pts -= shift
        if packet.dts is not None:
            packet.dts -= shift
        packet.stream = stream
        yield packet


def _in_order(packets: Iterable[AnyPacket], name: object) -> Iterator[AnyPacket]:
    """Make sound's timestamps rise, as files demand; those of damaged films and of discs step back."""
    latest: dict[int, Fraction] = {}
    for packet in packets:
        if packet.stream.type == "audio":
            time, before = time_of(packet), latest.get(packet.stream.index)
            if before is not None and time <= before:
                warn_once(f"{name}: timestamps of its sound do not rise: they are moved.")
                time = before + _LEAST_STEP
                packet.pts = packet.dts = round(time / packet.time_base)
            latest[packet.stream.index] = time
        yield packet


def _copied(source: InputContainer, copies: Mapping[int, Stream], span: Span) -> Iterator[AnyPacket]:
    """Read the packets of streams that are copied."""
    if not copies:
        return
    for packet in _demuxed(source, [source.streams[index] for index in copies]):
        if not packet.size:  # the end
            continue
        stream = copies[packet.stream_index]
        if packet.stream.type == "subtitle":
            part = _within(packet, span)
            if part is not None and source.streams[packet.stream_index].name == "mov_text":
                part = _plain_text(part)
        else:
            is_cover = packet.stream.type == "video"
            part = packet if is_cover or span.holds(time_of(packet)) else None
        if part is not None:
            yield from _of_stream([part], stream, span)


def _within(packet: AnyPacket, span: Span) -> "AnyPacket | None":
    """Shorten a subtitle to the part that is upscaled; None if it is shown outside."""
    tick = packet.time_base
    start, end = time_of(packet), time_of(packet) + (packet.duration or 0) * tick
    if span.start is not None and start < span.offset < end:
        start = span.offset
    if not span.holds(start):
        return None
    if span.end is not None and packet.duration:
        end = min(end, span.beginning + span.end)
    packet.pts = packet.dts = round(start / tick)
    if packet.duration:
        packet.duration = round((end - start) / tick)
    return packet


def _plain_text(packet: AnyPacket) -> "AnyPacket | None":
    """Take the text out of an MP4's subtitle, as Matroska has it; None for a pause."""
    data = bytes(packet)
    text = data[2 : 2 + int.from_bytes(data[:2], "big")]
    if not text:
        return None
    plain: AnyPacket = Packet(text)
    plain.time_base, plain.pts, plain.dts, plain.duration = (
        packet.time_base,
        packet.pts,
        packet.dts,
        packet.duration,
    )
    return plain
