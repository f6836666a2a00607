import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.image_folder import read_image
from esc_basicsr.data.source_image import decode_source_image, source_image_size


@pytest.fixture(scope="module")
def bgr(photographs) -> np.ndarray:
    return np.ascontiguousarray(photographs["coffee"][:80, :, ::-1])  # 80 x 96


def _encoded(suffix: str, image: np.ndarray) -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _pillow(bgr: np.ndarray, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(bgr[..., ::-1])).convert(mode)


def _decode(data: bytes) -> np.ndarray:
    image = decode_source_image(data, "it")
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.flags.c_contiguous
    return image


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp", ".jpg"])
def test_formats_give_opencvs_pixels(bgr, suffix):
    data = _encoded(suffix, bgr)
    np.testing.assert_array_equal(_decode(data), cv2.imdecode(np.frombuffer(data, np.uint8), 1))
    assert source_image_size(io.BytesIO(data), "it") == (80, 96)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp", ".jpg"])
@pytest.mark.parametrize("part", [0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(bgr, suffix, part):
    data = _encoded(suffix, bgr)
    with pytest.raises(UserError, match=r"^it cannot be decoded"):
        decode_source_image(data[: int(len(data) * part)], "it")


def test_any_changed_byte_of_a_png_is_seen_but_of_its_empty_end(bgr):
    data = _encoded(".png", bgr)
    for place in range(0, len(data) - len("....IENDcrc."), len(data) // 40):
        damaged = bytearray(data)
        damaged[place] ^= 0x55
        with pytest.raises(UserError, match=r"^it cannot be decoded"):
            decode_source_image(bytes(damaged), "it")


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match=r"a\.png is empty \(0 bytes\): replace or remove it"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "data", [b"no image", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff"]
)
def test_what_is_no_image_of_a_known_format_is_refused(data):
    with pytest.raises(UserError, match=r"^it cannot be decoded"):
        decode_source_image(data, "it")


def test_another_format_under_a_known_name_is_refused(bgr):
    with pytest.raises(UserError, match="PNG, JPEG, WebP, BMP or TIFF of 8 or 16 bits is expected"):
        decode_source_image(_saved(_pillow(bgr), "GIF"), "it")


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bits_are_rounded(suffix):
    deep = np.arange(256 * 3 * 85, dtype=np.uint16).reshape(-1, 64, 3)
    expected = np.rint(deep / 257).astype(np.uint8)
    np.testing.assert_array_equal(_decode(_encoded(suffix, deep)), expected)
    np.testing.assert_array_equal(
        _decode(_encoded(suffix, deep[..., 0])), np.repeat(expected[..., :1], 3, axis=2)
    )
    opaque = np.dstack([deep, np.full(deep.shape[:2], 0xFFFF, np.uint16)])
    np.testing.assert_array_equal(_decode(_encoded(suffix, opaque)), expected)


def test_16_bits_with_transparency_are_refused():
    deep = np.full((8, 8, 4), 0xFFFF, np.uint16)
    deep[0, 0, 3] -= 1
    with pytest.raises(UserError, match="is transparent in 1 of 64 pixels"):
        decode_source_image(_encoded(".png", deep), "it")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "1"])
def test_gray_becomes_three_equal_channels(bgr, mode, kind):
    image = _decode(_saved(_pillow(bgr, mode), kind))
    assert image.shape == bgr.shape
    if kind in ("PNG", "TIFF"):
        gray = np.asarray(_pillow(bgr, mode).convert("L"))
        np.testing.assert_array_equal(image, np.repeat(gray[..., None], 3, axis=2))


def test_palette_becomes_colours(bgr):
    image = _pillow(bgr).quantize(64)
    expected = np.asarray(image.convert("RGB"))[..., ::-1]
    np.testing.assert_array_equal(_decode(_saved(image, "PNG")), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_opaque_alpha_is_dropped_and_transparency_refused(bgr, kind):
    image = _pillow(bgr, "RGBA")
    np.testing.assert_array_equal(_decode(_saved(image, kind)), bgr)
    image.putpixel((3, 4), (9, 9, 9, 254))
    with pytest.raises(
        UserError, match=r"^it is transparent in 1 of 7,680 pixels: put it on a ground, or remove"
    ):
        decode_source_image(_saved(image, kind), "it")


def test_transparent_colour_is_refused_where_it_occurs(bgr):
    colour = tuple(bgr[0, 0, ::-1].tolist())
    with pytest.raises(UserError, match="is transparent in"):
        decode_source_image(_saved(_pillow(bgr), "PNG", transparency=colour), "it")


def test_cmyk_is_not_inverted(bgr):
    tiff = _decode(_saved(_pillow(bgr, "CMYK"), "TIFF"))
    np.testing.assert_array_equal(tiff, bgr)  # Pillow's CMYK of an RGB image has no black
    jpeg = _decode(_saved(_pillow(bgr, "CMYK"), "JPEG", quality=95))
    assert np.abs(jpeg.astype(int) - bgr).mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(bgr, kind, orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    image = _decode(_saved(_pillow(bgr), kind, exif=exif, **options))
    expected = np.rot90(bgr, turns)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < (4 if kind == "JPEG" else 0.001)


def test_16_bits_turned_by_exif_are_turned(bgr):
    data = _encoded(".png", bgr.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    chunk = exif.tobytes().removeprefix(b"Exif\0\0")
    body = b"eXIf" + chunk
    data = data[:33] + struct.pack(">I", len(chunk)) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]
    np.testing.assert_array_equal(_decode(data), np.rot90(bgr, -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_animations_and_pages_are_refused(bgr, kind):
    image = _pillow(bgr)
    data = _saved(image, kind, save_all=True, append_images=[image.rotate(90)])
    with pytest.raises(UserError, match=r"^it has 2 frames or pages: save the one that is wanted by itself"):
        decode_source_image(data, "it")


def test_first_picture_of_a_cameras_jpeg_is_taken(bgr):
    image = _pillow(bgr)
    data = _saved(image, "MPO", save_all=True, append_images=[image.resize((24, 20))])
    assert _decode(data).shape == bgr.shape


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(bgr, mode):
    with pytest.raises(UserError, match=f"has samples of a kind that is not read .Pillow's mode {mode}."):
        decode_source_image(_saved(_pillow(bgr, "L").convert(mode), "TIFF"), "it")


def test_enormous_image_is_refused_by_its_head():
    data = _saved(Image.new("1", (20000, 20000)), "PNG")
    with pytest.raises(UserError, match=r"^it has more than 178,956,970 pixels: cut it into parts"):
        decode_source_image(data, "it")
