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


DEEP = {
    "10.jxl": lambda deep: imagecodecs.jpegxl_encode(deep >> 6, lossless=True, bitspersample=10),
    "16.jxl": lambda deep: imagecodecs.jpegxl_encode(deep, lossless=True),
    "10.avif": lambda deep: imagecodecs.avif_encode(deep >> 6, level=100, bitspersample=10),
    "12.avif": lambda deep: imagecodecs.avif_encode(deep >> 4, level=100, bitspersample=12),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_more_than_8_bits_become_16(tmp_path: Path, photo: np.ndarray, name: str, channels: int) -> None:
    pytest.importorskip(MODULES[f".{name[3:]}"])
    ramp = np.linspace(0, 65535, 80 * 64).reshape(64, 80)
    deep = np.dstack([photo.astype(np.uint16) * 257, ramp.astype(np.uint16)])[..., -channels:]
    (tmp_path / name).write_bytes(DEEP[name](deep.squeeze()))
    image = read_image(tmp_path / name)
    assert image.pixels.dtype == np.uint16
    expected = deep[..., :3] if channels == 4 else deep.squeeze()
    step = 65535 / (2 ** int(name[:2]) - 1)
    tolerance = 3 * step if channels == 1 and name.endswith("avif") else step
    given = image.pixels[..., 0] if channels == 1 and image.pixels.ndim == 3 else image.pixels
    assert np.abs(given.astype(float) - expected).max() <= tolerance
    if channels == 4:
        assert image.alpha is not None
        assert np.abs(image.alpha.astype(float) - deep[..., 3]).max() <= step


def test_deep_heic_is_turned_and_reaches_white(tmp_path: Path, photo: np.ndarray) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    photo = photo.copy()
    photo[:32] = 255
    deep = pillow_heif.from_bytes("RGB;16", (80, 64), (photo.astype(np.uint16) * 257).tobytes())
    deep.info["exif"] = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    deep.save(tmp_path / "deep.heic", quality=95)
    image = read_image(tmp_path / "deep.heic")
    assert image.pixels.dtype == np.uint16
    assert np.abs(image.pixels / 257 - np.rot90(photo, -1)).mean() < LOSSY
    assert image.pixels.max() == 65535


@pytest.mark.parametrize(("transfer", "is_kept"), [(16, True), (13, False)])
def test_what_heic_says_of_its_colours_is_kept(
    tmp_path: Path, photo: np.ndarray, transfer: int, is_kept: bool
) -> None:
    """PQ, of which a reader that takes it for sRGB makes a flat gray picture."""
    pillow_heif = pytest.importorskip("pillow_heif")
    primaries = 9 if is_kept else 1
    pillow_heif.from_pillow(Image.fromarray(photo)).save(
        tmp_path / "hdr.heic", color_primaries=primaries, transfer_characteristics=transfer
    )
    assert read_image(tmp_path / "hdr.heic").colour == ({b"cICP": bytes([9, 16, 0, 1])} if is_kept else {})


def test_xmp_of_jpeg_xl_is_kept_or_named(tmp_path: Path, photo: np.ndarray, esc_log: list[str]) -> None:
    pytest.importorskip("pillow_jxl")
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">me</x:xmpmeta>'
    options = {"xmp": xmp, "use_container": True}
    Image.fromarray(photo).save(tmp_path / "a.jxl", **options)
    assert read_image(tmp_path / "a.jxl").xmp == xmp
    Image.fromarray(photo).save(tmp_path / "b.jxl", **options, compress_metadata=True)
    assert read_image(tmp_path / "b.jxl").xmp is None
    assert any("XMP that is compressed cannot be kept" in message for message in esc_log)


def test_animations_and_floats_of_jpeg_xl_are_refused(tmp_path: Path, photo: np.ndarray) -> None:
    """Of which the plugin gives the first frame, or 8 bits."""
    pytest.importorskip("pillow_jxl")
    for frames in (np.stack([photo, photo]), np.stack([photo[..., 0]] * 2)):
        (tmp_path / "a.jxl").write_bytes(imagecodecs.jpegxl_encode(frames, lossless=True))
        with pytest.raises(UserError, match=r"a\.jxl is animated"):
            read_image(tmp_path / "a.jxl")
    (tmp_path / "a.jxl").write_bytes(imagecodecs.jpegxl_encode(photo / np.float32(255), lossless=True))
    with pytest.raises(UserError, match=r"a\.jxl has floats"):
        read_image(tmp_path / "a.jxl")


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
