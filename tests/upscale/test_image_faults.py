"""Images as they come: odd metadata, hidden colours, limits of formats. None ends a folder."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from esc_basicsr.__main__ import main
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.image_folder import read_image as read_bgr
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.upscale import Upscaler
from esc_basicsr.upscale.image import upscale_file
from esc_basicsr.upscale.image_file import ImageFile
from esc_basicsr.upscale.read_image import png_chunks, read_image
from esc_basicsr.upscale.write_image import fitted, write_image

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


class Nearest:
    """Stands for a network: repeats pixels, and remembers what it was given."""

    scale, name = 2, "nearest"

    def __init__(self) -> None:
        self.given: list[np.ndarray] = []

    def __call__(self, image: np.ndarray) -> np.ndarray:
        self.given.append(image)
        return np.repeat(np.repeat(image, 2, 0), 2, 1)


@pytest.fixture
def photo() -> np.ndarray:
    return np.ascontiguousarray(load_sample_image("coffee")[100:124, 200:232])


def names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(rows: np.ndarray, bits: int, kind: int, width: int, *more: bytes) -> bytes:
    """Put a PNG together: ``rows`` are the bytes of each row."""
    head = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + b"".join(more)
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


# Transparency


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("gray", [False, True])
def test_hidden_colours_do_not_reach_what_is_visible(
    tmp_path: Path, model: Path, suffix: str, deep: bool, gray: bool
) -> None:
    if suffix == "webp" and deep:
        return  # it has 8 bits
    alpha = np.zeros((24, 24), np.uint8)
    alpha[8:16, 8:16] = 255
    results = []
    upscaler = Upscaler(model)
    for hidden in (0, 255):
        pixels = np.full((24, 24) if gray else (24, 24, 3), hidden, np.uint8)
        pixels[8:16, 8:16] = 120 if gray else (230, 40, 90)
        image = ImageFile(pixels, alpha)
        if deep:
            image = ImageFile(pixels.astype(np.uint16) * 257, alpha.astype(np.uint16) * 257)
        source, target = tmp_path / f"{hidden}.{suffix}", tmp_path / f"{hidden}_x2.png"
        write_image(source, fitted(source, image), 100)
        if suffix == "webp":  # lossless, and colours below transparency are kept
            Image.fromarray(
                np.dstack([pixels, alpha]) if not gray else np.dstack([*[pixels] * 3, alpha])
            ).save(source, lossless=True, exact=True)
        upscale_file(upscaler, source, target)
        results.append(read_image(target).pixels)
    np.testing.assert_array_equal(*results)


def test_wholly_transparent_image_goes_through(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", ImageFile(np.full((4, 5, 3), 9, np.uint8), np.zeros((4, 5), np.uint8)))
    upscale_file(Nearest(), tmp_path / "a.png", tmp_path / "b.png")  # type: ignore[arg-type]
    result = read_image(tmp_path / "b.png")
    assert result.alpha is not None and not result.alpha.any() and not result.pixels.any()


def test_opaque_transparency_goes_into_a_jpeg(tmp_path: Path, photo: np.ndarray) -> None:
    opaque = np.full(photo.shape[:2], 255, np.uint8)
    write_image(tmp_path / "a.png", ImageFile(photo, opaque))
    upscale_file(Nearest(), tmp_path / "a.png", tmp_path / "a.jpg")  # type: ignore[arg-type]
    assert read_image(tmp_path / "a.jpg").pixels.shape == (48, 64, 3)
    opaque[3, 3] = 254
    write_image(tmp_path / "b.png", ImageFile(photo, opaque))
    network = Nearest()
    with pytest.raises(UserError, match="JPEG holds no transparency"):
        upscale_file(network, tmp_path / "b.png", tmp_path / "b.jpg")  # type: ignore[arg-type]
    assert not network.given


def test_deep_gray_with_transparency_and_transparent_shades_are_exact(tmp_path: Path) -> None:
    values = np.array([[1000, 65535, 30000, 1], [5, 40000, 2000, 65535]], ">u2")
    (tmp_path / "ga.png").write_bytes(png_of(values, 16, 4, 2))
    image = read_image(tmp_path / "ga.png")
    assert image.alpha is not None
    assert image.pixels.tolist() == [[1000, 30000], [5, 2000]]
    assert image.alpha.tolist() == [[65535, 1], [40000, 65535]]
    two_bits = png_of(np.array([[0b00011011]], np.uint8), 2, 0, 4, chunk(b"tRNS", b"\0\1"))
    (tmp_path / "two.png").write_bytes(two_bits)
    image = read_image(tmp_path / "two.png")
    assert image.alpha is not None
    assert image.pixels.tolist() == [[0, 85, 170, 255]]
    assert image.alpha.tolist() == [[255, 0, 255, 255]]


# Orientation


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_every_format_and_depth(
    tmp_path: Path, suffix: str, deep: bool, orientation: int
) -> None:
    if deep and suffix in ("jpg", "webp"):
        return  # they have 8 bits
    stored = np.zeros((16, 32), np.uint8)
    stored[:8, :16], stored[:8, 16:], stored[8:, :16], stored[8:, 16:] = 20, 80, 140, 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{suffix}"
    if deep and suffix == "tif":
        tifffile.imwrite(
            file,
            stored.astype(np.uint16) * 257,
            photometric="minisblack",
            extratags=[(0x0112, 3, 1, orientation, True)],
        )
    elif deep:
        body = exif.tobytes().removeprefix(b"Exif\0\0")
        file.write_bytes(png_of(stored.astype(">u2") * np.array(257, ">u2"), 16, 0, 32, chunk(b"eXIf", body)))
    else:
        quality = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(suffix, {})
        Image.fromarray(stored).save(file, exif=exif, **quality)
    expected = {
        **{1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T},
        **{6: np.rot90(stored, -1), 7: np.rot90(stored, 2).T, 8: np.rot90(stored)},
    }[orientation]
    image = read_image(file)
    pixels = image.pixels if image.pixels.ndim == 2 else image.pixels[..., 0]
    assert pixels.shape == expected.shape
    assert np.abs(pixels // (257 if deep else 1) - expected.astype(int)).max() <= 3
    assert 0x0112 not in image.exif
    assert np.abs(read_bgr(file)[..., 0].astype(int) - expected).max() <= 3  # what `lmdb` makes of it


# Metadata


def damaged_exif(kind: str) -> bytes:
    entry = {
        "text for a fraction": struct.pack("<HHI4s", 0x011A, 2, 3, b"72\0\0"),
        "unknown type": struct.pack("<HHI4s", 0x010F, 99, 1, b"abcd"),
        "offset beyond the end": struct.pack("<HHII", 0x010F, 2, 5000, 60000),
        "fraction over zero": struct.pack("<HHII", 0x011A, 5, 1, 26),
    }[kind]
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4) + struct.pack("<II", 72, 0)


@pytest.mark.parametrize(
    "kind", ["text for a fraction", "unknown type", "offset beyond the end", "fraction over zero"]
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("target", ["jpg", "png", "webp", "tif"])
def test_damaged_exif_does_not_keep_an_image_from_it(
    tmp_path: Path, photo: np.ndarray, kind: str, suffix: str, target: str
) -> None:
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(photo).save(file, exif=damaged_exif(kind))
    upscale_file(Nearest(), file, tmp_path / f"out.{target}")  # type: ignore[arg-type]
    assert read_image(tmp_path / f"out.{target}").pixels.shape == (48, 64, 3)


def test_tags_of_a_directory_that_make_no_sense_are_named_and_the_others_kept(
    tmp_path: Path, photo: np.ndarray, esc_log: list[str]
) -> None:
    exif = Image.Exif()
    exif[271] = "Maker"
    exif.get_ifd(0x8769).update({0x9003: "2020:01:02 03:04:05", 0x829A: (1, "a")})
    with pytest.raises(TypeError):
        exif.tobytes()
    image = ImageFile(photo, exif=exif, name="it")
    image = image.resized((2 * photo.shape[0], 2 * photo.shape[1]))
    assert image.exif[271] == "Maker"
    assert image.exif.get_ifd(0x8769) == {0x9003: "2020:01:02 03:04:05"}
    assert esc_log == ["it: EXIF's ExposureTime make no sense, and are dropped."]


def test_images_without_pixels_are_refused(tmp_path: Path) -> None:
    width_alone = struct.pack("<HHHII", 1, 256, 4, 1, 17)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 8) + width_alone + bytes(40))
    for read in (read_image, read_bgr):
        with pytest.raises(UserError, match=r"a\.tif has no pixels"):
            read(tmp_path / "a.tif")


def test_premultiplied_8_bits_are_divided_by_their_alpha(tmp_path: Path) -> None:
    product = np.array([[[100, 50, 0, 128], [255, 7, 9, 255]]], np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", product, photometric="rgb", extrasamples=["assocalpha"])
    image = read_image(tmp_path / "a.tif")
    assert image.alpha is not None and image.alpha.tolist() == [[128, 255]]
    assert np.abs(image.pixels.astype(int) - [[[199, 100, 0], [255, 7, 9]]]).max() <= 1


@pytest.mark.parametrize("part", ["EXIF", "XMP"])
def test_metadata_too_long_for_the_format_is_dropped_with_a_warning_before_the_work(
    tmp_path: Path, photo: np.ndarray, part: str, esc_log: list[str]
) -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 70_000
    more = {"exif": exif} if part == "EXIF" else {"xmp": b"<x:xmpmeta>" + b" " * 70_000 + b"</x:xmpmeta>"}
    write_image(tmp_path / "a.png", ImageFile(photo, icc=ICC, **more))  # type: ignore[arg-type]
    warned_before: list[bool] = []

    class Watching(Nearest):
        def __call__(self, image: np.ndarray) -> np.ndarray:
            warned_before.append(any(f"{part} cannot be written as JPEG" in message for message in esc_log))
            return super().__call__(image)

    upscale_file(Watching(), tmp_path / "a.png", tmp_path / "a.jpg")  # type: ignore[arg-type]
    assert warned_before == [True]
    assert read_image(tmp_path / "a.jpg").icc == ICC


def test_sizes_in_metadata_are_those_of_the_larger_image(tmp_path: Path, photo: np.ndarray) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA002: 32, 0xA003: 24, 0x9214: (10, 12), 0xA20E: 300.5})
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r xmlns:exif="e" xmlns:tiff="t" exif:PixelXDimension="32" '
        b'tiff:ImageLength="24" tiff:XResolution="72/1"/></x:xmpmeta>'
    )
    source = tmp_path / "a.png"
    write_image(source, ImageFile(photo, exif=exif, xmp=xmp, dpi=(300.0, 150.0)))
    upscale_file(Nearest(), source, tmp_path / "b.png")  # type: ignore[arg-type]
    image = read_image(tmp_path / "b.png")
    directory = image.exif.get_ifd(0x8769)
    assert [directory[tag] for tag in (0xA002, 0xA003, 0x9214)] == [64, 48, (20, 24)]
    assert float(directory[0xA20E]) == pytest.approx(601)
    assert image.dpi == pytest.approx((600, 300), abs=0.1)
    assert image.xmp is not None
    for text in (b'PixelXDimension="64"', b'ImageLength="48"', b'XResolution="144/1"'):
        assert text in image.xmp


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("is_point", [False, True])
def test_georeference_covers_the_same_ground_or_is_dropped(
    tmp_path: Path, kind: Any, is_point: bool, esc_log: list[str]
) -> None:
    tags = [
        (33550, "d", 3, (10.0, 20.0, 0.0), True),
        (33922, "d", 6, (4, 6, 0, 5e5, 5e6, 0), True),
        (34735, "H", 8, (1, 1, 0, 1, 1025, 0, 1, 2 if is_point else 1), True),
    ]
    pixels = np.zeros((20, 40, 3), kind)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extratags=tags, metadata=None)
    upscale_file(Nearest(), tmp_path / "a.tif", tmp_path / "b.tif")  # type: ignore[arg-type]
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        found = file.pages[0].tags  # type: ignore[union-attr]
        if is_point:
            assert 33550 not in found and 33922 not in found
            assert any("georeference" in message for message in esc_log)
        else:
            assert found[33550].value == (5, 10, 0)
            assert found[33922].value == (8, 12, 0, 5e5, 5e6, 0)
            assert found[34735].value == (1, 1, 0, 1, 1025, 0, 1, 1)


def test_polynomials_of_a_georeference_are_dropped_with_a_warning(
    tmp_path: Path, photo: np.ndarray, esc_log: list[str]
) -> None:
    tags = [(50844, "d", 92, tuple(range(92)), True), (33550, "d", 3, (10.0, 20.0, 0.0), True)]
    tifffile.imwrite(tmp_path / "a.tif", photo, photometric="rgb", extratags=tags, metadata=None)
    upscale_file(Nearest(), tmp_path / "a.tif", tmp_path / "b.tif")  # type: ignore[arg-type]
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        assert not {50844, 33550} & {tag.code for tag in file.pages[0].tags}  # type: ignore[union-attr]
    assert any("georeference" in message for message in esc_log)


def test_other_tags_of_a_deep_tiff_are_said_to_be_lost(tmp_path: Path, esc_log: list[str]) -> None:
    tags = [(42113, "s", 0, "-9999", True)]  # GDAL's
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5), np.uint16), extratags=tags, metadata=None)
    upscale_file(Nearest(), tmp_path / "a.tif", tmp_path / "b.tif")  # type: ignore[arg-type]
    assert any("a 16-bit TIFF keeps of EXIF only" in message for message in esc_log)


def test_orientation_in_a_raw_profile_is_applied_once(tmp_path: Path, esc_log: list[str]) -> None:
    """Sideways by EXIF as ImageMagick writes it into a PNG's texts, where Pillow finds it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes())}\n{exif.tobytes().hex()}\n")
    info.add_text("Raw profile type iptc", "\niptc\n1\n00\n")
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(tmp_path / "a.png", pnginfo=info)
    assert read_image(tmp_path / "a.png").pixels.shape == (16, 8, 3)
    upscale_file(Nearest(), tmp_path / "a.png", tmp_path / "b.png")  # type: ignore[arg-type]
    assert read_image(tmp_path / "b.png").pixels.shape == (32, 16, 3)
    assert any("Raw profile type iptc cannot be kept" in message for message in esc_log)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("kind", "content", "matters"),
    [
        (b"gAMA", struct.pack(">I", 100_000), True),
        (b"gAMA", struct.pack(">I", 45_455), False),
        (b"sRGB", b"\0", False),
        (b"cICP", bytes([9, 16, 0, 1]), True),
    ],
)
def test_what_a_png_says_of_its_colours_is_kept_or_warned_about(
    tmp_path: Path, bits: int, kind: bytes, content: bytes, matters: bool, esc_log: list[str]
) -> None:
    rows = np.full((4, 4), 128, np.uint8 if bits == 8 else ">u2")
    (tmp_path / "a.png").write_bytes(png_of(rows, bits, 0, 4, chunk(kind, content)))
    upscale_file(Nearest(), tmp_path / "a.png", tmp_path / "b.png")  # type: ignore[arg-type]
    assert dict(png_chunks((tmp_path / "b.png").read_bytes()))[kind] == content
    assert not esc_log
    upscale_file(Nearest(), tmp_path / "a.png", tmp_path / "b.jpg")  # type: ignore[arg-type]
    assert any(kind.decode() in message for message in esc_log) is matters


def test_what_cannot_be_kept_is_named(tmp_path: Path, photo: np.ndarray, esc_log: list[str]) -> None:
    iptc = b"Photoshop 3.0\0" + b"8BIM" + struct.pack(">HHI", 0x0404, 0, 6) + b"\x1c\x02\x05\0\x01a"
    buffer = io.BytesIO()
    gain = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r xmlns:hdrgm="h" hdrgm:Version="1.0"/></x:xmpmeta>'
    Image.fromarray(photo).save(buffer, "JPEG", xmp=gain)
    data = buffer.getvalue()
    marker = b"\xff\xed" + struct.pack(">H", len(iptc) + 2) + iptc
    (tmp_path / "a.jpg").write_bytes(data[:2] + marker + data[2:])
    assert read_image(tmp_path / "a.jpg").xmp is None
    told = "\n".join(esc_log)
    assert "IPTC cannot be kept" in told and "gain map cannot be kept" in told


# Sizes and formats


@pytest.mark.parametrize(("suffix", "width"), [("webp", 8200), ("jpg", 32_800)])
def test_what_no_file_of_the_format_holds_is_refused_before_the_work(
    tmp_path: Path, suffix: str, width: int
) -> None:
    Image.fromarray(np.zeros((2, width, 3), np.uint8)).save(tmp_path / "a.png")
    network = Nearest()
    with pytest.raises(UserError, match=r"pixels are more than \w+ holds: write PNG or TIFF"):
        upscale_file(network, tmp_path / "a.png", tmp_path / f"b.{suffix}")  # type: ignore[arg-type]
    assert not network.given


def test_images_of_more_than_pillows_limit_are_read_up_to_a_limit_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's limit is lowered: an image above the real one takes seconds."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("1", (100, 80)).save(tmp_path / "scan.png")
    assert read_image(tmp_path / "scan.png").pixels.shape == (80, 100)
    with pytest.raises(UserError, match=r"scan\.png has more than 4,000 pixels: raise --max-megapixels"):
        read_image(tmp_path / "scan.png", most_pixels=4000)
    with pytest.raises(UserError, match="has more than 2,000 pixels"):  # a set is built of others' files
        read_bgr(tmp_path / "scan.png")
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_image_larger_than_the_memory_is_refused_by_its_size(
    tmp_path: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(photo).save(tmp_path / "a.png")
    monkeypatch.setattr("esc_basicsr.upscale.read_image.available_memory", lambda device: 5000)
    with pytest.raises(UserError, match=r"a\.png has 32 × 24 pixels, which take"):
        read_image(tmp_path / "a.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(60 * 2**30)
    with pytest.raises(UserError, match=r"sparse\.png: its 60\.0 GiB do not fit"):
        read_image(tmp_path / "sparse.png")


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_large_compressed_chunks_of_a_png_are_no_damage(tmp_path: Path, kind: bytes) -> None:
    text = zlib.compress(b'{"nodes":[' + b'{"id":1},' * 400_000 + b"]}")
    content = {
        b"zTXt": b"workflow\0\0" + text,
        b"iCCP": b"profile\0\0" + text,
        b"iTXt": b"workflow\0\1\0\0\0" + text,
    }[kind]
    (tmp_path / "a.png").write_bytes(png_of(np.zeros((8, 24), np.uint8), 8, 2, 8, chunk(kind, content)))
    assert read_image(tmp_path / "a.png").pixels.shape == (8, 8, 3)
    assert read_bgr(tmp_path / "a.png").shape == (8, 8, 3)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"])
@pytest.mark.parametrize("strips", [False, True])
def test_tiffs_that_promise_more_rows_than_they_hold_are_refused(
    tmp_path: Path, photo: np.ndarray, compression: str | None, strips: bool
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "TIFF", compression=compression)
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = file.pages[0].tags  # type: ignore[union-attr]
        for tag in ("ImageLength", *([] if strips else ["RowsPerStrip"])):
            data[tags[tag].valueoffset : tags[tag].valueoffset + 2] = struct.pack("<H", 400)
    (tmp_path / "a.tif").write_bytes(data)
    for read in (read_image, read_bgr):
        with pytest.raises(UserError, match=r"a\.tif cannot be decoded: it is truncated"):
            read(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "values", [np.full((4, 4, 3), 187.0), np.array([[0.5, float("nan")]]), -np.ones((2, 2))]
)
def test_floats_out_of_range_are_refused(values: np.ndarray, model: Path) -> None:
    with pytest.raises(UserError, match=r"expected floats in \[0, 1\], got values from"):
        Upscaler(model)(values * (3 if values.min() < 0 else 1))


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_a_flat_image_has_no_frame(level: float) -> None:
    """Beyond an edge there is more of the same, not black, which was 7 levels off."""
    sr = Upscaler("ESC-light_x2")(np.full((20, 20, 3), level, np.float32))
    assert np.abs(sr - sr[20, 20]).max() < 1.5 / 255


# Whole folders


@pytest.fixture
def folder(tmp_path: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("a", "z"):
        Image.fromarray(photo).save(f"in/{name}.png")
    return tmp_path


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("could not create a primitive"), ValueError("odd"), OSError(5, "I/O")],
)
def test_whatever_happens_to_one_image_the_others_are_done(
    folder: Path,
    model: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails_once(path: Path, *arguments: Any) -> ImageFile:
        if path.name == "a.png":
            raise error
        return read_image(path, *arguments)

    monkeypatch.setattr("esc_basicsr.upscale.image.read_image", fails_once)
    assert main(["upscale", "in", "-o", "out", "--model", str(model)]) == 2
    assert "1 could not be upscaled:\n  in/a.png" in capsys.readouterr().err
    assert names("out") == ["z_x2.png"]


def test_images_of_formats_that_are_not_read_are_named(folder: Path, model: Path, esc_log: list[str]) -> None:
    for name in ("b.gif", "c.psd", "d.jp2", "e.MP4"):
        (folder / "in" / name).write_bytes(b"x")
    assert main(["upscale", "in", "-o", "out", "--model", str(model)]) == 0
    (told,) = (message for message in esc_log if "not read" in message)
    assert all(name in told for name in ("b.gif", "c.psd", "d.jp2", "e.MP4"))


@pytest.mark.parametrize("length", [247, 251])
def test_long_and_odd_names_break_nothing(
    folder: Path, model: Path, photo: np.ndarray, length: int, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "n" * (length - 4)
    Image.fromarray(photo).save(f"in/{long}.png")
    odd = os.fsencode("in/") + b"\xff\x1b[2J.png"
    with open(odd, "wb") as file:  # noqa: PTH123 - a name that is no text
        Image.fromarray(photo).save(file, "PNG")
    code = main(["upscale", "in", "-o", "out", "--model", str(model)])
    fits = length + 3 <= 255
    assert fits or "\x1b" not in capsys.readouterr().err
    assert code == (0 if fits else 2)
    assert len(names("out")) == 3 + fits


def test_a_folder_that_nothing_can_be_written_into_is_refused_before_the_work(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The writing is replaced: whoever may do all may write into any folder."""

    def refuse(**options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("esc_basicsr.common.files.tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(Upscaler, "__call__", lambda *arguments: pytest.fail("it worked"))
    assert main(["upscale", "in", "-o", "out", "--model", str(model)]) == 2
    assert "out: nothing can be written here: Permission denied" in capsys.readouterr().err


def test_only_plain_files_are_replaced(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo("pipe.png")
    monkeypatch.setattr(Upscaler, "__call__", lambda *arguments: pytest.fail("it worked"))
    assert main(["upscale", "in/a.png", "-o", "pipe.png", "--overwrite", "--model", str(model)]) == 2
    assert not Path("pipe.png").is_file()
    assert names(".") == ["in", "pipe.png"]
