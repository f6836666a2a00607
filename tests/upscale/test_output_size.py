"""Results of any size: how large they become, and what reducing does."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.upscale.image_file import ImageFile
from esc_basicsr.upscale.output_size import OutputSize, reduced


@pytest.mark.parametrize(
    ("size", "image", "expected"),
    [
        (OutputSize(), (20, 30), (80, 120)),
        (OutputSize(outscale=Fraction("3.5")), (20, 30), (70, 105)),
        (OutputSize(outscale=Fraction(7, 3)), (20, 31, 3), (47, 72)),
        (OutputSize(box=(100, 100)), (20, 30), (67, 100)),
        (OutputSize(box=(100, 60)), (20, 30), (60, 90)),
    ],
)
def test_sides_stay_in_proportion(
    size: OutputSize, image: tuple[int, ...], expected: tuple[int, int]
) -> None:
    assert size.of(image, 4, "a.png") == expected


def test_sides_of_video_are_even() -> None:
    assert OutputSize(outscale=Fraction("1.7")).of((15, 31), 2, "a.png", multiple=2) == (26, 52)
    assert OutputSize().of((15, 31), 2, "a.png", multiple=2) == (30, 62)
    assert OutputSize(box=(103, 100)).of((20, 30), 4, "a.png", multiple=2) == (68, 102)  # not 104


def test_what_the_network_cannot_reach_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"a\.png: 30 × 20 pixels would be enlarged ×5, and the network makes ×4"
    ):
        OutputSize(box=(150, 100)).of((20, 30), 4, "a.png")
    with pytest.raises(UserError, match=r"a\.png: 30 × 20 pixels are larger"):
        OutputSize(box=(29, 100)).of((20, 30), 4, "a.png")


def test_reducing_is_pillows_antialiased_bicubic_as_encoded() -> None:
    image = load_sample_image("chelsea")[:60, :80]
    small = np.asarray(Image.fromarray(image).resize((33, 21), Image.Resampling.BICUBIC))
    # Pillow rounds after each direction
    np.testing.assert_allclose(reduced(image, (21, 33)).astype(int), small.astype(int), atol=1)
    deep = reduced(image.astype(np.uint16) * 257, (21, 33))
    assert deep.dtype == np.uint16
    np.testing.assert_allclose(deep / 257, small, atol=1.1)
    np.testing.assert_array_equal(reduced(image[..., 0], (21, 33)), reduced(image, (21, 33))[..., 0])


def test_fine_stripes_become_gray_instead_of_other_stripes() -> None:
    """The mean of 0 and 255 as encoded, for which linear light would give 188."""
    stripes = np.tile(np.array([0, 255], np.uint8), (40, 60))
    np.testing.assert_allclose(reduced(stripes, (10, 30))[:, 2:-2], 127.5, atol=1)


def test_metadata_is_true_of_sides_that_are_not_multiples() -> None:
    xmp = b'tiff:XResolution="72/1" tiff:YResolution="72/1" exif:PixelXDimension="30" tiff:ImageLength="20"'
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA002: 30, 0xA003: 20, 0xA20E: 100.0, 0x9214: (15, 10, 6, 4)})
    large = ImageFile(np.zeros((20, 30), np.uint8), exif=exif, xmp=xmp, dpi=(300.0, 150.0)).resized((50, 72))
    assert large.dpi == (720.0, 375.0)
    directory = large.exif.get_ifd(0x8769)
    assert [directory[tag] for tag in (0xA002, 0xA003, 0x9214)] == [72, 50, (36, 25, 14, 10)]
    assert float(directory[0xA20E]) == 240
    assert large.xmp == (
        b'tiff:XResolution="864/5" tiff:YResolution="180/1" exif:PixelXDimension="72" tiff:ImageLength="50"'
    )
