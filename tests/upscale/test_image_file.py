"""Image files of every kind, made here: read, written, and what belongs to them kept."""

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.data.source_image import to_8_bits
from esc_basicsr.upscale.image_file import ImageFile
from esc_basicsr.upscale.read_image import read_image
from esc_basicsr.upscale.write_image import fitted
from esc_basicsr.upscale.write_image import write_image as write_fitted

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
TEXTS = {"Title": "Cup", "Comment": "Hot"}
LOSSLESS = ("png", "tif", "tiff")


def write_image(path: Path, image: ImageFile) -> None:
    write_fitted(path, fitted(path, image))


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    return load_sample_image("coffee")[100:124, 200:232]


def deep(image: np.ndarray) -> np.ndarray:
    """16 bits whose lower ones matter."""
    noise = np.random.default_rng(0).integers(0, 257, image.shape)
    return np.minimum(image.astype(int) * 257 + noise, 65535).astype(np.uint16)


def exif() -> Image.Exif:
    data = Image.Exif()
    data[271] = "Maker"
    data[305] = "Software"
    data[315] = "Author"
    data.get_ifd(0x8769).update({0x9003: "2020:01:02 03:04:05", 0xA002: 32, 0xA003: 24})
    return data


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "tif", "tiff"])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("is_gray", [False, True])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_what_is_written_is_read_again_with_all_that_belongs_to_it(
    tmp_path: Path,
    rgb: np.ndarray,
    suffix: str,
    depth: int,
    is_gray: bool,
    has_alpha: bool,
    esc_log: list[str],
) -> None:
    pixels = rgb[..., 1] if is_gray else rgb
    alpha = (
        np.linspace(0, 255, rgb[..., 0].size).reshape(rgb.shape[:2]).astype(np.uint8) if has_alpha else None
    )
    if depth == 16:
        pixels, alpha = deep(pixels), None if alpha is None else deep(alpha)
    image = ImageFile(np.ascontiguousarray(pixels), alpha, ICC, exif(), XMP, (300.0, 150.0), TEXTS)
    file = tmp_path / f"image.{suffix}"
    if has_alpha and suffix in ("jpg", "jpeg"):
        with pytest.raises(UserError, match=r"image\.\w+: JPEG holds no transparency"):
            write_image(file, image)
        assert not list(tmp_path.iterdir())
        return
    write_image(file, image)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    again = read_image(file)
    if depth == 16 and suffix not in LOSSLESS:
        pixels, alpha = to_8_bits(pixels), None if alpha is None else to_8_bits(alpha)
        assert any("16 are rounded" in message for message in esc_log)
    expected = np.dstack([pixels] * 3) if is_gray and suffix == "webp" else pixels
    assert (again.pixels.shape, again.pixels.dtype) == (expected.shape, expected.dtype)
    assert (again.alpha is None) is (alpha is None)
    if suffix in LOSSLESS:
        np.testing.assert_array_equal(again.pixels, expected)
        assert alpha is None or np.array_equal(again.alpha, alpha)
    else:
        assert np.abs(again.pixels.astype(float) - expected).mean() < 6
    assert again.icc == ICC
    is_deep_tiff = depth == 16 and suffix in ("tif", "tiff")
    assert [again.exif[tag] for tag in (271, 305, 315)] == ["Maker", "Software", "Author"]
    if not is_deep_tiff:
        assert again.exif.get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05"
    if suffix != "webp":  # which has no field for it
        assert again.dpi == pytest.approx((300, 150), abs=0.02)
    assert again.xmp is not None
    assert again.xmp.strip() == XMP
    if suffix in ("png", "jpg", "jpeg"):
        assert again.texts["Comment"] == "Hot"
    if suffix == "png":
        assert again.texts["Title"] == "Cup"


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_is_upright(tmp_path: Path, rgb: np.ndarray, depth: int, orientation: int) -> None:
    """Stored as a camera held otherwise stores it: Pillow's own turning is the measure, for 16 bits too."""
    data = Image.Exif()
    data[0x0112] = orientation
    stored = Image.fromarray(rgb)
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=data)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    upright = read_image(tmp_path / "a.png")
    assert 0x0112 not in upright.exif
    if depth == 16:
        write_image(tmp_path / "b.png", ImageFile(rgb.astype(np.uint16) * 257, exif=data))
        again = read_image(tmp_path / "b.png")
        np.testing.assert_array_equal(again.pixels // 257, upright.pixels)
        assert 0x0112 not in again.exif
    expected = {
        **{1: rgb, 2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 4: rgb[::-1], 5: rgb.swapaxes(0, 1)},
        **{6: np.rot90(rgb, -1), 7: np.rot90(rgb, 2).swapaxes(0, 1), 8: np.rot90(rgb)},
    }[orientation]
    np.testing.assert_array_equal(upright.pixels, expected)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_orientation_in_xmp_is_not_applied_twice(tmp_path: Path, rgb: np.ndarray, suffix: str) -> None:
    """Pillow, and viewers, turn a image by XMP where EXIF does not say how."""
    meta = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r xmlns:tiff="t" tiff:Orientation="6"/></x:xmpmeta>'
    write_image(tmp_path / f"a.{suffix}", ImageFile(rgb, xmp=meta))
    first = read_image(tmp_path / f"a.{suffix}")
    assert first.pixels.shape == (32, 24, 3)
    write_image(tmp_path / f"b.{suffix}", first)
    assert read_image(tmp_path / f"b.{suffix}").pixels.shape == (32, 24, 3)


@pytest.mark.parametrize(
    "form", ["planes", "white to black", "premultiplied", "big-endian", "gray with alpha"]
)
def test_deep_tiffs_of_every_form_are_read_as_they_are_meant(
    tmp_path: Path, rgb: np.ndarray, form: str
) -> None:
    pixels = deep(rgb)
    alpha = np.linspace(1000, 65535, pixels[..., 0].size).reshape(pixels.shape[:2]).astype(np.uint16)
    file = tmp_path / "a.tif"
    if form == "planes":
        planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        tifffile.imwrite(file, planes, planarconfig="separate", photometric="rgb")
    elif form == "white to black":
        tifffile.imwrite(file, 65535 - pixels[..., 0], photometric="miniswhite")
        pixels = pixels[..., 0]
    elif form == "premultiplied":
        product = np.rint(pixels * (alpha[..., None] / 65535)).astype(np.uint16)
        tifffile.imwrite(file, np.dstack([product, alpha]), photometric="rgb", extrasamples=["assocalpha"])
    elif form == "big-endian":
        tifffile.imwrite(file, pixels, photometric="rgb", byteorder=">")
    else:
        gray = np.dstack([pixels[..., 0], alpha])
        tifffile.imwrite(
            file, gray, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]
        )
        pixels = pixels[..., 0]
    image = read_image(file)
    assert image.pixels.dtype == np.uint16
    if form == "premultiplied":
        # a colour times a small alpha has few levels
        assert (np.abs(image.pixels.astype(int) - pixels) <= 1 + 65535 / alpha[..., None]).all()
    else:
        np.testing.assert_array_equal(image.pixels, pixels)
    if "alpha" in form or form == "premultiplied":
        np.testing.assert_array_equal(image.alpha, alpha)
    else:
        assert image.alpha is None


def save(path: Path, image: Image.Image, **options: Any) -> ImageFile:
    image.save(path, **options)
    return read_image(path)


def test_other_modes_become_gray_or_colour(tmp_path: Path, rgb: np.ndarray) -> None:
    image = Image.fromarray(rgb)
    assert save(tmp_path / "p.png", image.quantize(16)).pixels.shape == (24, 32, 3)
    bilevel = save(tmp_path / "1.png", image.convert("1"))
    assert bilevel.pixels.shape == (24, 32)
    assert set(np.unique(bilevel.pixels)) <= {0, 255}
    palette = image.quantize(16)
    see_through = save(tmp_path / "t.png", palette, transparency=3)
    assert see_through.alpha is not None
    assert {*np.unique(see_through.alpha)} == {0, 255}
    cmyk = save(tmp_path / "c.jpg", image.convert("CMYK"), quality=100)
    assert cmyk.pixels.shape == (24, 32, 3)
    assert cmyk.icc is None
    assert np.abs(cmyk.pixels.astype(int) - rgb).mean() < 4
    assert save(tmp_path / "b.bmp", image).pixels.shape == (24, 32, 3)


def test_deep_tiff_of_others_is_read(tmp_path: Path, rgb: np.ndarray) -> None:
    pixels = deep(rgb)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, pixels)
    cv2.imwrite(str(tmp_path / "b.png"), pixels[..., ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "b.png").pixels, pixels)


def test_exif_learns_the_new_size(rgb: np.ndarray) -> None:
    image = ImageFile(rgb, exif=exif())
    large = image.resized((48, 64))
    assert [large.exif.get_ifd(0x8769)[tag] for tag in (0xA002, 0xA003)] == [64, 48]
    assert image.exif.get_ifd(0x8769)[0xA002] == 32


def test_description_that_tifffile_made_of_the_old_size_is_left_out(tmp_path: Path, rgb: np.ndarray) -> None:
    tifffile.imwrite(tmp_path / "own.tiff", rgb)
    assert 270 not in read_image(tmp_path / "own.tiff").exif
    tifffile.imwrite(tmp_path / "users.tiff", rgb, description="a cup", metadata=None)
    assert read_image(tmp_path / "users.tiff").exif[270] == "a cup"


GRAY_ICC = ICC[:16] + b"GRAY" + ICC[20:]


@pytest.mark.parametrize(
    ("name", "bits", "has_alpha", "is_kept"),
    [
        *(("a.png", 8, False, True), ("a.png", 8, True, True), ("a.jpg", 8, False, True)),
        *(("a.webp", 8, False, False), ("a.png", 16, True, True), ("a.tiff", 16, False, True)),
    ],
)
def test_gray_profile_is_not_given_to_colours(
    tmp_path: Path, rgb: np.ndarray, name: str, bits: int, has_alpha: bool, is_kept: bool, esc_log: list[str]
) -> None:
    gray = rgb[..., 1] if bits == 8 else deep(rgb[..., 1])
    write_image(tmp_path / name, ImageFile(gray, gray if has_alpha else None, GRAY_ICC))
    assert read_image(tmp_path / name).icc == (GRAY_ICC if is_kept else None)
    assert any("gray colour profile is dropped" in message for message in esc_log) is not is_kept


def test_cmyk_whose_profile_is_anothers_is_refused_as_what_it_is(tmp_path: Path, rgb: np.ndarray) -> None:
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "a.jpg", icc_profile=ICC)
    with pytest.raises(UserError, match=r"a\.jpg is CMYK, and its colour profile does not fit it"):
        read_image(tmp_path / "a.jpg")


def test_want_of_memory_is_not_called_damage(
    tmp_path: Path, rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder is replaced: nothing public can run out of memory on demand."""
    Image.fromarray(rgb).save(tmp_path / "a.png")

    def fail(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("esc_basicsr.upscale.read_image.decoded", fail)
    with pytest.raises(UserError, match=r"a\.png cannot be decoded: there is not enough memory"):
        read_image(tmp_path / "a.png")


def damaged(rgb: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(rgb)
    if kind == "animated":
        image.save(buffer, "WEBP", save_all=True, append_images=[image.rotate(90)])
    elif kind == "float":
        Image.fromarray(rgb[..., 0].astype(np.float32)).save(buffer, "TIFF")
    else:
        image.save(buffer, "PNG", pnginfo=PngImagePlugin.PngInfo())
    data = buffer.getvalue()
    return {"empty": b"", "text": b"no image", "cut": data[:-200]}.get(kind, data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is empty"),
        ("text", "cannot be decoded as an image"),
        ("cut", "truncated or damaged"),
        ("animated", "2 frames"),
        ("float", "samples of a kind that is not read"),
    ],
)
def test_what_is_no_image_is_refused_by_name(
    tmp_path: Path, rgb: np.ndarray, kind: str, message: str
) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(damaged(rgb, kind))
    with pytest.raises(UserError, match=rf"image\.png .*{message}"):
        read_image(file)


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="20000 × 1 pixels are more than WEBP holds"):
        write_image(tmp_path / "long.webp", ImageFile(np.zeros((1, 20000, 3), np.uint8)))
