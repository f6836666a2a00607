"""AVIF, HEIC and JPEG XL, by Pillow and its plugins."""

import io
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageCms

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.image_folder import find_images
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.upscale.read_image import READ_SUFFIXES, read_image

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MODULES = {".avif": "PIL", ".heic": "pillow_heif", ".jxl": "pillow_jxl"}
LOSSY = 4  # levels on average


def write(path: Path, image: np.ndarray, orientation: int = 1) -> None:
    """Write an image with a maker in EXIF and a colour profile."""
    if path.suffix == ".heic":
        import pillow_heif

        pillow_heif.register_heif_opener()
    if path.suffix == ".jxl":
        import pillow_jxl  # noqa: F401
    exif = Image.Exif()
    exif[271], exif[0x0112] = "Maker", orientation
    Image.fromarray(image).save(path, exif=exif.tobytes(), icc_profile=ICC, quality=95)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return load_sample_image("chelsea")[40:104, 60:140]


@pytest.mark.parametrize("suffix", MODULES)
def test_pixels_transparency_and_metadata_are_read(tmp_path: Path, photo: np.ndarray, suffix: str) -> None:
    pytest.importorskip(MODULES[suffix])
    alpha = np.linspace(0, 255, 80).astype(np.uint8)[None].repeat(64, 0)
    path = tmp_path / f"photo{suffix}"
    write(path, np.dstack([photo, alpha]))
    image = read_image(path)
    assert image.alpha is not None
    is_visible = alpha > 0  # some encoders change colours that are not
    assert np.abs(image.pixels.astype(float) - photo)[is_visible].mean() < LOSSY
    assert np.abs(image.alpha.astype(float) - alpha).mean() < LOSSY
    assert image.exif[271] == "Maker"
    assert image.icc if suffix == ".jxl" else image.icc == ICC  # JPEG XL has a short form of sRGB
    assert find_images(tmp_path, True, READ_SUFFIXES) == [Path(path.name)]


@pytest.mark.parametrize("suffix", [".avif", ".heic"])
def test_they_are_turned_upright_once(tmp_path: Path, photo: np.ndarray, suffix: str) -> None:
    pytest.importorskip(MODULES[suffix])
    write(tmp_path / f"photo{suffix}", photo, orientation=6)
    image = read_image(tmp_path / f"photo{suffix}")
    assert np.abs(image.pixels.astype(float) - np.rot90(photo, -1)).mean() < LOSSY
    assert 0x0112 not in image.exif


def test_jpeg_xl_of_a_turned_jpeg_is_turned_once(tmp_path: Path, photo: np.ndarray) -> None:
    pytest.importorskip("pillow_jxl")
    write(tmp_path / "photo.jpg", photo, orientation=6)
    with Image.open(tmp_path / "photo.jpg") as image:
        image.save(tmp_path / "photo.jxl", lossless_jpeg=True)
    image = read_image(tmp_path / "photo.jxl")
    assert np.abs(image.pixels.astype(float) - np.rot90(photo, -1)).mean() < LOSSY
    assert 0x0112 not in image.exif


def test_jpeg_xl_has_its_turn_outside_of_exif(tmp_path: Path, photo: np.ndarray) -> None:
    """As other decoders of this file see it."""
    pytest.importorskip("pillow_jxl")
    write(tmp_path / "photo.jxl", photo, orientation=6)
    expected = imagecodecs.jpegxl_decode((tmp_path / "photo.jxl").read_bytes())
    assert np.abs(read_image(tmp_path / "photo.jxl").pixels.astype(float) - expected).mean() < LOSSY


def test_more_than_8_bits_are_told(tmp_path: Path, photo: np.ndarray, esc_log: list[str]) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    deep = pillow_heif.from_bytes("RGB;16", (80, 64), (photo.astype(np.uint16) * 257).tobytes())
    deep.save(tmp_path / "deep.heic", quality=95)
    image = read_image(tmp_path / "deep.heic")
    assert image.pixels.dtype == np.uint8
    assert np.abs(image.pixels.astype(float) - photo).mean() < LOSSY
    assert any("bits are read as 8" in message for message in esc_log)


@pytest.mark.parametrize(("suffix", "extra"), [(".heic", "heic"), (".jxl", "jxl")])
def test_missing_plugin_is_named(
    tmp_path: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, suffix: str, extra: str
) -> None:
    pytest.importorskip(MODULES[suffix])
    write(tmp_path / f"photo{suffix}", photo)
    monkeypatch.setitem(sys.modules, MODULES[suffix], None)
    with pytest.raises(UserError, match=rf"photo\{suffix} is \w+, which needs a plugin: .*\[{extra}\]"):
        read_image(tmp_path / f"photo{suffix}")


@pytest.mark.parametrize("suffix", MODULES)
def test_damaged_ones_are_told(tmp_path: Path, photo: np.ndarray, suffix: str) -> None:
    pytest.importorskip(MODULES[suffix])
    write(tmp_path / f"photo{suffix}", photo)
    data = (tmp_path / f"photo{suffix}").read_bytes()
    (tmp_path / f"photo{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"photo\{suffix} cannot be decoded"):
        read_image(tmp_path / f"photo{suffix}")


def test_training_reads_none_of_them(tmp_path: Path, photo: np.ndarray) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "AVIF")
    (tmp_path / "b.avif").write_bytes(buffer.getvalue())
    assert find_images(tmp_path, recursive=False) == [Path("a.png")]
