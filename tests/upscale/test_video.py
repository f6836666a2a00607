"""Films: what is in them goes through, in order, also by way of a kill."""

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from filelock import FileLock
from fixtures.films import BT709, CHAPTERS, SUBTITLES, TICK, frames_of, moving, packets_of

from esc_basicsr.common.errors import UserError
from esc_basicsr.upscale import video, video_file
from esc_basicsr.upscale.output_size import OutputSize
from esc_basicsr.upscale.upscaler import Upscaler
from esc_basicsr.upscale.video import upscale_video

PQ = {"color_range": 1, "color_primaries": 9, "color_trc": 16, "colorspace": 9}
HDR = (
    "log-level=error:repeat-headers=1:hdr10=1:max-cll=1000,400:"
    "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
)


class Doubling:
    """Stands for an Upscaler: doubles pixels, and counts what it is called for."""

    scale, precision, ensemble = 2, "fp32", False

    def __init__(self, model: Path, fails_at: int | None = None) -> None:
        self.name, self.calls, self.fails_at = str(model), 0, fails_at

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        return pixels.repeat(2, 0).repeat(2, 1)


@pytest.fixture
def doubling(model: Path) -> Doubling:
    return Doubling(model)


def upscale(upscaler: Any, source: Path, target: Path, *span: Fraction) -> Path:
    upscale_video(upscaler, source, target, OutputSize(), 1, *span)
    return target


def times_of(path: Path) -> list[Fraction]:
    return [time for time, _ in packets_of(path, "video")]


def probe(path: Path) -> dict[str, Any]:
    with av.open(str(path)) as film:
        context = film.streams.video[0].codec_context
        chapters = [
            (
                *(round(chapter[edge] * chapter["time_base"] * 1000) for edge in ("start", "end")),
                chapter["metadata"]["title"],
            )
            for chapter in film.chapters()
        ]
        return {
            "title": film.metadata["title"],
            "chapters": chapters,
            "languages": {each.type: each.language for each in film.streams if each.type != "data"},
            "size": (context.height, context.width),
            "pixels": context.pix_fmt,
            "colours": {name: getattr(context, name) for name in BT709},
            "aspect": film.streams.video[0].sample_aspect_ratio,
            "rate": film.streams.video[0].average_rate,
        }


def planes_of(path: Path) -> list[list[float]]:
    """The mean of each plane of each frame, as its numbers are stored, in the 256 levels of 8 bits."""
    means = []
    with av.open(str(path)) as film:
        for frame in film.decode(video=0):
            dtype = np.uint16 if frame.format.components[0].bits > 8 else np.uint8
            planes = [
                np.frombuffer(plane, dtype).reshape(plane.height, -1)[:, : plane.width]
                for plane in frame.planes
            ]
            scale = 2 ** (frame.format.components[0].bits - 8)
            means.append([float(plane.mean()) / scale for plane in planes])
    return means


def assert_alike(images: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(images) == len(expected)
    for one, other in zip(images, expected, strict=True):
        assert np.abs(one.astype(float) - other).mean() < 3  # frames differ by 20


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
def test_all_that_a_film_holds_goes_with_it(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, suffix: str
) -> None:
    colours = {"color_range": 1, "color_primaries": 5, "color_trc": 6, "colorspace": 5}
    film = make_film(tmp_path / "film.mp4", colours=colours, aspect=Fraction(4, 3))
    large = upscale(doubling, film, tmp_path / f"large{suffix}")
    found = probe(large)
    assert found == {
        "title": "A film",
        "chapters": CHAPTERS,
        "languages": found["languages"],
        "size": (48, 64),
        "pixels": "yuv420p",
        "colours": colours,
        "aspect": Fraction(4, 3),
        "rate": 12,
    }
    assert (found["languages"]["audio"], found["languages"]["subtitle"]) == ("ita", "eng")
    assert_alike(frames_of(large), [image.repeat(2, 0).repeat(2, 1) for image in frames_of(film)])
    audio, copied = packets_of(film, "audio"), packets_of(large, "audio")
    assert [sound for _, sound in copied] == [sound for _, sound in audio]
    # Matroska counts milliseconds, and begins with the audio's first one instead of at zero.
    shift = copied[0][0] - audio[0][0]
    assert abs(times_of(large)[0] - times_of(film)[0] - shift) <= Fraction(1, 1000)
    texts = [(time, text) for time, text in packets_of(large, "subtitle") if len(text) > 2]
    for (time, text), (start, _, expected) in zip(texts, SUBTITLES, strict=True):
        assert expected.encode() in text
        assert abs(time - shift - Fraction(start, 1000)) <= Fraction(1, 1000)
    assert sorted(tmp_path.iterdir()) == [film, large]


def test_variable_frame_rate_keeps_every_timestamp(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling
) -> None:
    times = [0, 20, 45, 200, 201, 270, 500, 520, 530, 531, 532, 600]
    film = make_film(tmp_path / "film.mp4", times=times, is_silent=True)
    assert times_of(film) == [time * TICK for time in times]
    assert times_of(upscale(doubling, film, tmp_path / "large.mp4")) == times_of(film)
    for one, other in zip(times_of(upscale(doubling, film, tmp_path / "a.mkv")), times, strict=True):
        assert abs(one - other * TICK) <= Fraction(1, 2000)


@pytest.mark.parametrize("colour_range", [1, 2])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p10le"])
def test_levels_stay_what_they_are(
    tmp_path: Path,
    make_film: Callable[..., Path],
    doubling: Doubling,
    colour_range: int,
    pixel_format: str,
) -> None:
    """Black and white of a range, and colours by a matrix, are the same numbers afterwards."""
    flat = [(0, 0, 0), (255, 255, 255), (200, 40, 90), (20, 180, 60)]
    images = [np.full((32, 64, 3), colour, np.uint8) for colour in flat]
    film = make_film(
        tmp_path / "film.mkv",
        images,
        pixel_format=pixel_format,
        colours=BT709 | {"color_range": colour_range},
        is_silent=True,
    )
    large = upscale(doubling, film, tmp_path / "large.mkv")
    assert probe(large)["pixels"].replace("yuvj", "yuv") == pixel_format
    assert probe(large)["colours"]["color_range"] == colour_range
    for old, new in zip(planes_of(film), planes_of(large), strict=True):
        assert np.abs(np.array(old) - new).max() <= 1


def test_hdr_is_kept(tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling) -> None:
    film = make_film(
        tmp_path / "film.mkv",
        moving(3, 64, 64),
        codec="libx265",
        pixel_format="yuv420p10le",
        colours=PQ,
        options={"x265-params": HDR},
        is_silent=True,
    )
    large = upscale(doubling, film, tmp_path / "large.mp4")
    assert probe(large)["colours"] == PQ
    with av.open(str(large)) as container:
        assert container.streams.video[0].codec_tag == "hvc1"
    told = []
    for path in (film, large):
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            told.append({each.type.name: bytes(each) for each in frame.side_data})
    for name in ("MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL"):
        assert told[0][name] == told[1][name]


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotated_films_come_out_upright(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, rotation: int
) -> None:
    """And their pixels are as wide, in relation, as they were high."""
    film = make_film(tmp_path / "film.mp4", rotation=rotation, aspect=Fraction(4, 3))
    large = upscale(doubling, film, tmp_path / "large.mp4")
    turned = [np.rot90(image, rotation // 90).repeat(2, 0).repeat(2, 1) for image in frames_of(film)]
    assert_alike(frames_of(large), turned)
    assert probe(large)["aspect"] == (Fraction(4, 3) if rotation == 180 else Fraction(3, 4))
    with av.open(str(large)) as container:
        assert next(container.decode(video=0)).rotation == 0


def test_mirrored_films_come_out_as_they_are_shown(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling
) -> None:
    """As phones store what their front camera sees."""
    film = make_film(tmp_path / "film.mp4", rotation=90, is_mirrored=True)
    large = upscale(doubling, film, tmp_path / "large.mp4")
    turned = [np.rot90(image)[:, ::-1].repeat(2, 0).repeat(2, 1) for image in frames_of(film)]
    assert_alike(frames_of(large), turned)


def test_frames_that_repeat_are_computed_once(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, esc_log: list[str]
) -> None:
    slides = [image for image in moving(3) for _ in range(4)]
    film = make_film(
        tmp_path / "film.mkv", slides, options={"crf": "0"}, pixel_format="yuv444p", is_silent=True
    )
    large = upscale(doubling, film, tmp_path / "large.mkv")
    assert doubling.calls == 3
    assert_alike(frames_of(large), [image.repeat(2, 0).repeat(2, 1) for image in slides])
    assert any("9 frames repeat" in message for message in esc_log)


def test_frames_are_decoded_as_they_are_needed(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled: list[int] = []

    def counted(*args: Any) -> Any:
        for number, frame in enumerate(frames_from(*args)):
            pulled.append(number - doubling.calls)
            yield frame

    frames_from = video.frames_from
    monkeypatch.setattr(video, "frames_from", counted)
    upscale(doubling, make_film(tmp_path / "film.mp4", is_silent=True), tmp_path / "large.mp4")
    assert len(pulled) == 1 + 12  # the first one tells how all are encoded
    assert max(pulled) <= 1


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_stopped_film_goes_on_where_it_was(
    tmp_path: Path,
    make_film: Callable[..., Path],
    model: Path,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    esc_log: list[str],
) -> None:
    """With B-frames and key frames far apart, whose order in the file is another."""
    monkeypatch.setattr(video, "_SEGMENT", 5)
    film = make_film(tmp_path / f"film{suffix}", moving(24), times=[25 * index for index in range(24)])
    whole = upscale(
        Doubling(model), film, tmp_path / "whole.mp4" if suffix == ".mp4" else tmp_path / "whole.mkv"
    )
    target = tmp_path / f"large{suffix}"
    calls = 0
    for fails_at in (7, 8):
        stopped = Doubling(model, fails_at)
        with pytest.raises(KeyboardInterrupt):
            upscale(stopped, film, target)
        calls += stopped.calls
        assert not target.exists()
        assert esc_log[-1] == f"{target}.parts holds what is done: call again to go on."
    last = Doubling(model)
    upscale(last, film, target)
    assert (calls, last.calls) == (15, 24 - 10)
    # x264 with several threads writes now and then a few other bits
    assert_alike(frames_of(target), [image.repeat(2, 0).repeat(2, 1) for image in frames_of(film)])
    assert times_of(target) == times_of(whole)
    assert packets_of(target, "audio") == packets_of(whole, "audio")
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.slow
def test_killed_process_leaves_what_it_did(
    tmp_path: Path, make_film: Callable[..., Path], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_SEGMENT", 5)
    film = make_film(tmp_path / "film.mp4")
    code = f"""
import os, signal
from pathlib import Path
from test_video import Doubling, upscale, video
class Killed(Doubling):
    def __call__(self, pixels):
        if self.calls == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(pixels)
video._SEGMENT = 5
upscale(Killed(Path({str(model)!r})), Path({str(film)!r}), Path({str(tmp_path / "large.mp4")!r}))
"""
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert process.returncode == -9
    assert not (tmp_path / "large.mp4").exists()
    resumed = Doubling(model)
    upscale(resumed, film, tmp_path / "large.mp4")
    assert resumed.calls == 12 - 5
    assert times_of(tmp_path / "large.mp4") == times_of(film)
    expected = [image.repeat(2, 0).repeat(2, 1) for image in frames_of(film)]
    assert_alike(frames_of(tmp_path / "large.mp4"), expected)


def test_parts_of_another_job_are_not_mixed(
    tmp_path: Path, make_film: Callable[..., Path], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_SEGMENT", 2)
    film, target = make_film(tmp_path / "film.mp4"), tmp_path / "large.mp4"
    with pytest.raises(KeyboardInterrupt):
        upscale(Doubling(model, fails_at=3), film, target)
    with pytest.raises(UserError, match=r"large\.mp4\.parts holds parts of another job \(size, crf differ\)"):
        upscale_video(Doubling(model), film, target, OutputSize(box=(50, 50)), 20)  # type: ignore[arg-type]
    with (
        FileLock(tmp_path / "large.mp4.parts" / "lock"),
        pytest.raises(UserError, match="is being made by another process"),
    ):
        upscale(Doubling(model), film, target)
    upscale(Doubling(model), film, target)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_part_of_a_film_has_what_belongs_to_it(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, suffix: str
) -> None:
    film = make_film(tmp_path / f"film{suffix}", options={"g": "4"})
    large = upscale(doubling, film, tmp_path / f"large{suffix}", Fraction("0.3"), Fraction("0.7"))
    # frames are 1/12 s apart: those at 4/12 to 8/12 s
    assert doubling.calls == 5
    assert_alike(frames_of(large), [image.repeat(2, 0).repeat(2, 1) for image in frames_of(film)[4:9]])
    assert [round(float(time), 2) for time in times_of(large)] == [0.03, 0.12, 0.2, 0.28, 0.37]
    assert probe(large)["chapters"] == [(0, 100, "one"), (100, 400, "two")]
    texts = [(round(float(time), 2), text) for time, text in packets_of(large, "subtitle") if len(text) > 2]
    assert [time for time, _ in texts] == [0.0, 0.2]
    sounds = {sound: time for time, sound in packets_of(film, "audio")}
    copied = packets_of(large, "audio")
    assert len(copied) in (18, 19)  # of 1024 samples
    for time, sound in copied:
        assert abs(sounds[sound] - time - Fraction("0.3")) <= Fraction(1, 1000)


def test_what_cannot_be_done_is_told_before_it_is_begun(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling
) -> None:
    film = make_film(tmp_path / "film.mkv")
    with pytest.raises(UserError, match=r"\.mp4 holds no subtitle such as .* \(s.*rt?\): choose \.mkv\."):
        upscale(doubling, film, tmp_path / "large.mp4")
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(UserError, match=r"text\.mp4 cannot be upscaled"):
        upscale(doubling, tmp_path / "text.mp4", tmp_path / "large.mp4")
    with av.open(str(tmp_path / "sound.mkv"), "w") as sound:
        stream = sound.add_stream("pcm_s16le", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2000), np.int16), format="s16", layout="stereo")
        frame.sample_rate = 48000
        sound.mux(stream.encode(frame))
    with pytest.raises(UserError, match=r"sound\.mkv has no video"):
        upscale(doubling, tmp_path / "sound.mkv", tmp_path / "large.mkv")
    assert doubling.calls == 0
    assert not list(tmp_path.glob("large*"))


def test_recordings_that_were_put_together_are_refused(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling
) -> None:
    film = make_film(tmp_path / "a.ts", times=[100 * index for index in range(12)], is_silent=True)
    (tmp_path / "b.ts").write_bytes(2 * film.read_bytes())
    last = float(times_of(film)[-1])
    with pytest.raises(UserError, match=rf"b\.ts: timestamps begin again at {last:.2f} s"):
        upscale(doubling, tmp_path / "b.ts", tmp_path / "large.mkv")


def test_film_that_is_cut_off_is_told(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, esc_log: list[str]
) -> None:
    form: Any = {"options": {"g": "1"}, "container": {"movflags": "faststart"}, "is_silent": True}
    film = make_film(tmp_path / "film.mp4", moving(24), **form)
    upscale(doubling, film, tmp_path / "whole.mp4")
    assert not any("cut off" in message for message in esc_log)
    film.write_bytes(film.read_bytes()[: film.stat().st_size * 6 // 10])
    came = len(times_of(upscale(doubling, film, tmp_path / "large.mp4")))
    assert 0 < came < 20
    assert any(f"{came} frames came, and it promises some 24" in message for message in esc_log)


def test_start_beyond_the_end_is_told_without_decoding(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(video, "frames_from")
    with pytest.raises(UserError, match=r"film\.mp4 has no frames within this time"):
        upscale(doubling, make_film(tmp_path / "film.mp4"), tmp_path / "large.mp4", Fraction(9))


def test_error_in_reading_is_told_of_the_film(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> Any:
        yield from itertools.islice(frames_from(*args), 3)
        av.error.err_check(-errno.EACCES)

    frames_from = video.frames_from
    monkeypatch.setattr(video, "frames_from", failing)
    with pytest.raises(UserError, match=r"film\.mp4 cannot be upscaled: Permission denied"):
        upscale(doubling, make_film(tmp_path / "film.mp4"), tmp_path / "large.mp4")


def test_folder_of_parts_that_holds_none_is_no_hindrance_and_a_file_is_told(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling
) -> None:
    film, parts = make_film(tmp_path / "film.mp4"), tmp_path / "large.mp4.parts"
    parts.write_text("a file")
    with pytest.raises(UserError, match=r"large\.mp4\.parts cannot be made"):
        upscale(doubling, film, tmp_path / "large.mp4")
    parts.unlink()
    parts.mkdir()
    (parts / "job.json").write_text('{"crf": 40}')
    upscale(doubling, film, tmp_path / "large.mp4")


def test_damaged_part_of_a_film_is_left_out_and_told(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, esc_log: list[str]
) -> None:
    film = make_film(tmp_path / "film.mkv", options={"g": "1"}, is_silent=True)
    content = packets_of(film, "video")[5][1]
    film.write_bytes(film.read_bytes().replace(content, bytes(len(content))))
    large = upscale(doubling, film, tmp_path / "large.mkv")
    assert any("film.mkv is damaged" in message for message in esc_log)
    assert times_of(large)[:5] == times_of(film)[:5]
    assert times_of(large)[-6:] == times_of(film)[-6:]


def test_odd_sides_become_even_and_a_network_does_the_work(
    tmp_path: Path, make_film: Callable[..., Path], model: Path
) -> None:
    """Of a size of its own: the network's frames are reduced."""
    film = make_film(tmp_path / "film.mkv", moving(2, 17, 27), pixel_format="yuv444p", is_silent=True)
    upscaler = Upscaler(model)
    upscale_video(upscaler, film, tmp_path / "large.mkv", OutputSize(outscale=Fraction("1.5")), 1)
    assert probe(tmp_path / "large.mkv")["size"] == (26, 40)
    upscale(upscaler, film, tmp_path / "double.mkv")
    assert_alike(frames_of(tmp_path / "double.mkv"), [upscaler(image) for image in frames_of(film)])


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".ts", "libx264"), (".avi", "mpeg4"), (".webm", "libvpx-vp9")]
)
def test_other_containers_are_read_and_begin_at_zero(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, suffix: str, codec: str
) -> None:
    options = {"crf": "4"} if codec == "libvpx-vp9" else {"q:v": "1"} if codec == "mpeg4" else {}
    film = make_film(tmp_path / f"film{suffix}", codec=codec, is_silent=True, options=options)
    large = upscale(doubling, film, tmp_path / "large.mkv")
    assert_alike(frames_of(large), [image.repeat(2, 0).repeat(2, 1) for image in frames_of(film)])
    first = times_of(film)[0]
    assert (first > 0) is (suffix == ".ts")
    for old, new in zip(times_of(film), times_of(large), strict=True):
        assert abs(old - first - new) <= Fraction(1, 900)


def streams_beside(path: Path) -> tuple[list[Any], list[bytes]]:
    """Name and content of the fonts, and of the cover pictures."""
    with av.open(str(path)) as film:
        fonts = [(each.metadata["filename"], each.data) for each in film.streams.attachments]
        covers = [each for each in film.streams.video if each.disposition & Disposition.attached_pic]
        return fonts, [bytes(packet) for packet in film.demux(covers) if packet.size] if covers else []


def test_cover_and_fonts_go_with_a_film(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, esc_log: list[str]
) -> None:
    film = make_film(tmp_path / "film.mp4", is_silent=True)
    with av.open(str(film)) as old, av.open(str(tmp_path / "cover.mp4"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0], opaque=True)
        cover: Any = new.add_stream("mjpeg", rate=1, width=32, height=24, pix_fmt="yuvj420p")
        cover.disposition = Disposition.attached_pic
        new.start_encoding()
        picture = av.VideoFrame.from_ndarray(moving(1)[0]).reformat(format="yuvj420p")
        picture.pts = 0
        new.mux([*cover.encode(picture), *cover.encode(None)])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    fonts, covers = streams_beside(tmp_path / "cover.mp4")
    assert (fonts, len(covers)) == ([], 1)
    for suffix in (".mp4", ".mkv"):
        large = upscale(doubling, tmp_path / "cover.mp4", tmp_path / f"large{suffix}")
        assert streams_beside(large) == ([], covers)
        assert len(times_of(large)) == 12

    with av.open(str(tmp_path / "large.mkv")) as old, av.open(str(tmp_path / "font.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0], opaque=True)
        new.add_attachment("a.ttf", "application/x-truetype-font", b"a font")
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    large = upscale(doubling, tmp_path / "font.mkv", tmp_path / "font_x2.mkv")
    assert streams_beside(large) == ([("a.ttf", b"a font")], [])
    upscale(doubling, tmp_path / "font.mkv", tmp_path / "font_x2.mp4")
    assert any("(attachment, a.ttf) cannot be kept" in message for message in esc_log)


def test_names_that_look_like_addresses_are_files(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_film(tmp_path / "film.mp4", is_silent=True).rename(tmp_path / "12:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(times_of(upscale(doubling, Path("12:30.mp4"), Path("12:31.mp4")).absolute())) == 12


def changed(film: Path, old: bytes, new: bytes) -> Path:
    """Replace bytes of a file by as many others."""
    content = film.read_bytes()
    assert old in content
    film.write_bytes(content.replace(old, new))
    return film


def test_tags_in_another_encoding_do_not_keep_a_film_from_it(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling
) -> None:
    film = changed(make_film(tmp_path / "film.mkv"), b"A film", b"A f\xeflm")  # Latin-1
    assert probe(upscale(doubling, film, tmp_path / "large.mkv"))["title"] == "A f\ufffdlm"


def test_sound_of_an_unknown_codec_is_named(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, esc_log: list[str]
) -> None:
    film = changed(make_film(tmp_path / "film.mkv"), b"A_AAC", b"A_NEW")
    large = upscale(doubling, film, tmp_path / "large.mkv")
    assert any("stream 1 (audio, of an unknown codec) cannot be kept" in message for message in esc_log)
    assert {"video", "subtitle"} == probe(large)["languages"].keys()
    with pytest.raises(UserError, match=r"film\.mkv: FFmpeg has no decoder for its video"):
        upscale(doubling, changed(film, b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/AVC"), tmp_path / "a.mkv")


def test_sound_whose_timestamps_step_back_goes_through(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, esc_log: list[str]
) -> None:
    """As in what was recorded over a bad connection; muxers refuse it."""
    # a block of the second stream at 256 ms, and the same at 150 ms
    film = changed(make_film(tmp_path / "film.mkv"), b"\x82\x01\x00\x80", b"\x82\x00\x96\x80")
    sounds = [sound for _, sound in packets_of(film, "audio")]
    large = upscale(doubling, film, tmp_path / "large.mkv")
    assert sorted(sound for _, sound in packets_of(large, "audio")) == sorted(sounds)
    assert any("timestamps of its sound do not rise" in message for message in esc_log)


def test_films_that_are_long_for_their_frames_are_not_said_to_be_cut_off(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, esc_log: list[str]
) -> None:
    """As recordings of a screen, whose frames come when something moves."""
    slides = make_film(tmp_path / "a.mkv", times=[*range(0, 110, 10), 3000], is_silent=True)
    upscale(doubling, slides, tmp_path / "large.mkv")
    assert not any("cut off" in message for message in esc_log)
    times = [600 * index for index in range(12)]
    film = make_film(tmp_path / "b.mkv", times=times, options={"g": "1"}, is_silent=True)
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    upscale(doubling, film, tmp_path / "b_x2.mkv")
    assert any("frames came, and it promises 1" in message for message in esc_log)


def test_what_no_encoder_takes_is_told_before_the_work(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling
) -> None:
    film = make_film(tmp_path / "film.mkv", [np.zeros((16, 8200, 3), np.uint8)], is_silent=True)
    with pytest.raises(UserError, match=r"frames of 16400 × 32 pixels, yuv420p, cannot be encoded"):
        upscale(doubling, film, tmp_path / "large.mkv")
    assert doubling.calls == 0


def test_a_part_from_the_first_frame_on_is_whole(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling
) -> None:
    """Where the first timestamp is no whole count of microseconds, by which FFmpeg tells the beginning."""
    film = make_film(tmp_path / "film.ts", is_silent=True)
    assert times_of(film)[0].denominator > 1
    assert len(times_of(upscale(doubling, film, tmp_path / "large.mkv", Fraction(0)))) == 12


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_full_disk_is_told_and_nothing_is_lost(
    tmp_path: Path, make_film: Callable[..., Path], model: Path, suffix: str
) -> None:
    """When all is upscaled, and the film does not fit beside its parts."""
    resource = pytest.importorskip("resource")
    film = make_film(tmp_path / f"film{suffix}")
    whole = upscale(Doubling(model), film, tmp_path / f"whole{suffix}").stat().st_size
    target = tmp_path / f"large{suffix}"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole - 500, before[1]))
    try:
        with pytest.raises(UserError, match=rf"large\{suffix} cannot be written: File too large"):
            upscale(Doubling(model), film, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.glob("*large*")] == [f"large{suffix}.parts"]
    last = Doubling(model)
    assert upscale(last, film, target).stat().st_size == pytest.approx(whole, abs=100)
    assert last.calls == 0


def test_program_streams_lose_no_frames_behind_a_guessed_length(tmp_path: Path, doubling: Doubling) -> None:
    """FFmpeg takes the length of an .mpg from its bit rate, and guesses timestamps behind a seek."""
    film = tmp_path / "film.mpg"
    options = {"q:v": "1", "g": "12", "bf": "2"}
    with av.open(str(film), "w") as container:
        stream: Any = container.add_stream("mpeg2video", rate=25, width=64, height=48, options=options)
        for image in moving(60, 48, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image).reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    with av.open(str(film)) as container:
        assert container.duration is not None
        assert container.duration < 2_200_000
    large = upscale(doubling, film, tmp_path / "large.mkv", Fraction("2.2"))
    assert_alike(frames_of(large), [image.repeat(2, 0).repeat(2, 1) for image in frames_of(film)[55:]])


@pytest.mark.parametrize(("width", "matrix"), [(64, 6), (1280, 1)])
def test_matrix_that_is_not_told_is_what_players_take_for_the_old_size(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, width: int, matrix: int
) -> None:
    """Old recordings tell none; as large as new ones, they would be shown with other colours."""
    untold = {"color_range": 1, "color_primaries": 2, "color_trc": 2, "colorspace": 2}
    images = [np.full((16, width, 3), colour, np.uint8) for colour in ((200, 40, 90), (20, 180, 60))]
    film = make_film(tmp_path / "film.mkv", images, colours=untold, is_silent=True)
    assert probe(film)["colours"]["colorspace"] == 2
    large = upscale(doubling, film, tmp_path / "large.mkv")
    assert probe(large)["colours"] == untold | {"colorspace": matrix}
    for old, new in zip(planes_of(film), planes_of(large), strict=True):
        assert np.abs(np.array(old) - new).max() <= 1


class Hesitating:
    """A container of ten packets, of which FFmpeg wants to be called again for some."""

    name = "film.ts"

    def __init__(self, *hesitations: int) -> None:
        self.position, self.hesitations = 0, [*hesitations]

    def demux(self, *_: Any) -> Any:
        while self.position < 10:
            if self.position in self.hesitations:
                self.hesitations.remove(self.position)
                av.error.err_check(-errno.EAGAIN)
            self.position += 1
            yield self.position


def test_ffmpeg_is_called_again_where_it_asks_for_it() -> None:
    """As in a damaged transport stream; but not for ever."""
    once: Any = Hesitating(0, 4, 4)
    assert [*video_file._demuxed(once, [])] == [*range(1, 11)]
    for_ever: Any = Hesitating(*[5] * 2000)
    with pytest.raises(UserError, match=r"film\.ts cannot be read on: it is damaged"):
        [*video_file._demuxed(for_ever, [])]


def test_whatever_a_decoder_raises_of_a_damaged_frame_the_others_come(
    tmp_path: Path, make_film: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some say that it is not permitted, or not yet implemented."""

    class Damaged:
        def decode(self) -> Any:
            av.error.err_check(-errno.EPERM)

    def damaged(*args: Any) -> Any:
        packets = [*demuxed(*args)]
        return [*packets[:5], Damaged(), *packets[5:]]

    demuxed = video_file._demuxed
    monkeypatch.setattr(video_file, "_demuxed", damaged)
    assert len([*video_file.frames_from(make_film(tmp_path / "film.mp4", is_silent=True))]) == 12


def test_format_that_is_advised_holds_the_sound(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling
) -> None:
    """Opus, which MOV does not hold; that is told before the work."""
    film = tmp_path / "film.mkv"
    with av.open(str(make_film(tmp_path / "a.mkv", is_silent=True))) as old, av.open(str(film), "w") as new:
        video_stream = new.add_stream_from_template(old.streams.video[0], opaque=True)
        sound: Any = new.add_stream("libopus", rate=48000)
        new.start_encoding()
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), format="s16", layout="stereo")
        frame.sample_rate = 48000
        new.mux([*sound.encode(frame), *sound.encode(None)])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = video_stream
                new.mux(packet)
    with pytest.raises(UserError, match=r"\.mov does not hold all of opus in .*: choose \.mkv or \.mp4\."):
        upscale(doubling, film, tmp_path / "large.mov")
    assert doubling.calls == 0
    upscale(doubling, film, tmp_path / "large.mp4")


def test_tags_that_a_format_does_not_hold_are_named(
    tmp_path: Path, make_film: Callable[..., Path], doubling: Doubling, esc_log: list[str]
) -> None:
    film = tmp_path / "film.mkv"
    with av.open(str(make_film(tmp_path / "a.mkv", is_silent=True))) as old, av.open(str(film), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0], opaque=True)
        new.metadata.update({"title": "A film", "artist": "Me", "camera": "Mine"})
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    upscale(doubling, film, tmp_path / "large.mkv")
    assert not any("holds no tags" in message for message in esc_log)
    upscale(doubling, film, tmp_path / "large.mp4")
    assert any("large.mp4: .mp4 holds no tags such as CAMERA." in message for message in esc_log)
