"""The command upscale, as people call it."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from fixtures.films import frames_of, moving
from PIL import Image

from esc_basicsr.__main__ import main
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.fast import kernels
from esc_basicsr.upscale import Upscaler
from esc_basicsr.upscale.output_size import reduced


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two images, one of them in a folder of the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "more").mkdir(parents=True)
    photo = Image.fromarray(load_sample_image("chelsea")[:20, :30])
    photo.save("in/cat.png")
    photo.convert("L").save("in/more/gray.jpg", quality=95)
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_folder_becomes_a_folder(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upscale", "in", "-o", "out", "--model", str(model)]) == 0
    assert files(folder / "out") == ["cat_x2.png", "more/gray_x2.jpg"]
    assert "out: 2 of 2 images upscaled." in capsys.readouterr().out
    with Image.open("out/cat_x2.png") as image, Image.open("in/cat.png") as small:
        assert image.size == (60, 40)
        expected = Upscaler(model)(np.asarray(small))
        np.testing.assert_array_equal(np.asarray(image), expected)
    with Image.open("out/more/gray_x2.jpg") as image:
        assert (image.mode, image.size) == ("L", (60, 40))


def test_half_precision_that_is_chosen_is_named_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not kernels.load().has_bf16:
        pytest.skip("this processor has no instructions for bfloat16")
    call = ["upscale", "in", "--model", "ESC-light_x2"]
    assert main([*call, "-o", "auto"]) == main([*call, "-o", "exact", "--precision", "fp32"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "8-bit images were computed in bf16, which a trial found to agree with fp32.",
        "exact: 2 of 2 images upscaled.",
    ]


def test_one_image_becomes_the_file_that_is_named(folder: Path, model: Path) -> None:
    assert main(["upscale", "in/cat.png", "-o", "large.webp", "--model", str(model), "--scale", "2"]) == 0
    with Image.open("large.webp") as image:
        assert (image.format, image.size) == ("WEBP", (60, 40))


def test_pattern_and_format(folder: Path, model: Path) -> None:
    assert main(["upscale", "in/*.png", "-o", "out", "--model", str(model), "--format", "tiff"]) == 0
    assert files(folder / "out") == ["cat_x2.tiff"]


def test_transparency_is_upscaled_and_a_constant_one_stays(folder: Path, model: Path) -> None:
    photo = load_sample_image("chelsea")[:20, :30]
    Image.fromarray(np.dstack([photo, np.full((20, 30), 77, np.uint8)])).save("in/even.png")
    Image.fromarray(np.dstack([photo, photo[..., 0]])).save("in/uneven.png")
    assert main(["upscale", "in/even.png", "in/uneven.png", "-o", "out", "--model", str(model)]) == 0
    with Image.open("out/even_x2.png") as image:
        assert set(np.asarray(image)[..., 3].flat) == {77}
    with Image.open("out/uneven_x2.png") as image:
        assert image.mode == "RGBA"
        np.testing.assert_array_equal(np.asarray(image)[..., 3], Upscaler(model)(photo[..., 0]))


def test_tiffs_go_through_with_what_directories_they_have(folder: Path, model: Path) -> None:
    with Image.open("in/cat.png") as image:
        image.save("in/plain.tif")
        location = Image.Exif()
        location.get_ifd(0x8825)[1] = "N"
        image.save("in/located.jpg", exif=location.tobytes())
    call = [
        "upscale",
        "in/plain.tif",
        "in/located.jpg",
        "-o",
        "out",
        "--model",
        str(model),
        "--format",
        "tiff",
    ]
    assert main(call) == 0
    with Image.open("out/located_x2.tiff") as image:
        assert image.size == (60, 40)
        assert image.getexif().get_ifd(0x8825)[1] == "N"
    with Image.open("out/plain_x2.tiff") as image:
        assert image.size == (60, 40)


def test_folder_that_cannot_be_made_is_told(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["upscale", "in/more", "-o", "in/cat.png/out", "--model", str(model)]) == 2
    assert "in/cat.png/out cannot be made" in capsys.readouterr().err


def test_sixteen_bits_are_rounded_where_the_format_asked_for_has_eight(folder: Path, model: Path) -> None:
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save("in/deep.png")
    for kind, mode in (("png", "I;16"), ("jpg", "L")):
        assert main(["upscale", "in/deep.png", "-o", "out", "--model", str(model), "--format", kind]) == 0
        with Image.open(f"out/deep_x2.{kind}") as image:
            assert image.mode == mode


def test_nothing_is_overwritten_unless_told(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["upscale", "in", "-o", "out", "--model", str(model)]
    (folder / "out").mkdir()
    (folder / "out" / "cat_x2.png").write_text("mine")
    assert main(call) == 2
    assert "1 of 2 files exist already: out/cat_x2.png" in capsys.readouterr().err
    assert files(folder / "out") == ["cat_x2.png"]
    assert main([*call, "--skip-existing"]) == 0
    assert "out: 1 of 1 images upscaled; 1 existed already." in capsys.readouterr().out
    assert (folder / "out" / "cat_x2.png").read_text() == "mine"
    assert main([*call, "--overwrite"]) == 0
    with Image.open("out/cat_x2.png") as image:
        assert image.size == (60, 40)
    with pytest.raises(SystemExit, match="2"):
        main([*call, "--overwrite", "--skip-existing"])


@pytest.mark.parametrize("out", ["in", "in/large"])
def test_what_was_upscaled_is_not_upscaled_again_where_out_is_in_the_input(
    folder: Path, model: Path, out: str
) -> None:
    call = ["upscale", "in", "-o", out, "--model", str(model)]
    assert main(call) == 0
    once = files(folder)
    assert len(once) == 4
    assert main([*call, "--skip-existing"]) == 0
    assert main([*call, "--overwrite"]) == 0
    assert files(folder) == once


def test_warnings_have_lines_of_their_own_beside_the_bar(
    folder: Path, model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And --memory is heeded: by tiles the image is nearly what it is whole."""
    # as in a process of its own, which has not begun BasicSR's log
    monkeypatch.setattr(logging.getLogger("basicsr"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("basicsr"), "propagate", True)
    Image.fromarray(load_sample_image("chelsea")[:96, :128]).save("in/large.png")
    assert main(["upscale", "in/large.png", "-o", "whole.png", "--model", str(model)]) == 0
    capfd.readouterr()
    memory = str(Upscaler(model).bytes_per_pixel * 60**2 / 2**30)
    assert (
        main(["upscale", "in/large.png", "-o", "tiled.png", "--model", str(model), "--memory", memory]) == 0
    )
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    (warning,) = (line for line in lines if "worked through in tiles" in line)
    assert "it/s" not in warning
    assert "%|" not in warning
    whole, tiled = (np.asarray(Image.open(name)).astype(float) for name in ("whole.png", "tiled.png"))
    assert 0 < np.mean((whole - tiled) ** 2) < 255**2 / 10**4


def test_image_that_cannot_be_read_does_not_keep_others_from_it(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "in" / "a.png").write_bytes(b"no image")
    assert main(["upscale", "in", "-o", "out", "--model", str(model)]) == 2
    captured = capsys.readouterr()
    assert "out: 2 of 3 images upscaled." in captured.out
    assert "error: 1 could not be upscaled:\n  in/a.png cannot be decoded as an image" in captured.err
    assert files(folder / "out") == ["cat_x2.png", "more/gray_x2.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png", "-o", "out"], "none.png: no such image or folder"),
        (["*.gif", "-o", "out"], "*.gif: no file matches"),
        (["in/more", "-o", "out", "--quality", "0"], "--quality must be from 1 to 100"),
        (["in/more", "-o", "out", "--memory", "-1"], "--memory must be above 0"),
        (["in/cat.png", "-o", "out.jpg", "--format", "png"], "--format png contradicts the name out.jpg"),
        (["in/cat.png", "-o", "out.gif"], ".gif is not written; choose among .png"),
        (["in/more", "-o", "out", "--memory", "nan"], "--memory must be above 0"),
        (["in", "-o", "in/cat.png"], "in/cat.png is a file; for 2 images a folder"),
        (["in/cat.png", "in/more/../cat.png", "-o", "out"], "would both become"),
        (["in", "-o", "out", "--scale", "4"], "a network of scale ×2, not ×4"),
        (["in", "-o", "out", "--device", "cuda:9"], "device 'cuda:9' is not available"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = files(folder)
    assert main(["upscale", *arguments, "--model", str(model)]) == 2
    assert message in capsys.readouterr().err
    assert files(folder) == before


def test_file_that_is_no_model_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upscale", "in", "-o", "out", "--model", "in/cat.png"]) == 2
    assert "in/cat.png: not a PyTorch checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".onnx", ".xml", ".param"])
def test_exported_network_is_told_from_a_checkpoint(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    (folder / f"small{suffix}").write_bytes(b"\x08")
    if suffix == ".pt":  # which checkpoints are called as well
        assert main(["export", str(model), "-o", "small.pt", "--overwrite"]) == 0
    assert main(["upscale", "in", "-o", "out", "--model", f"small{suffix}"]) == 2
    assert f"small{suffix} is an exported network" in capsys.readouterr().err


def test_any_size_for_16_bits_and_transparency(folder: Path, model: Path) -> None:
    photo = load_sample_image("chelsea")[:20, :30].astype(np.uint16) * 257
    samples = np.dstack([photo, photo[..., 0]])
    (folder / "in/deep.png").write_bytes(imagecodecs.png_encode(samples))
    call = ["upscale", "in/deep.png", "-o", "out", "--model", str(model)]
    assert main([*call, "--outscale", "1.5"]) == 0
    assert main([*call, "--size", "47x100"]) == 0
    assert files(folder / "out") == ["deep_47x100.png", "deep_x1.5.png"]
    image = imagecodecs.png_decode((folder / "out/deep_x1.5.png").read_bytes())
    assert (image.shape, image.dtype) == ((30, 45, 4), np.uint16)
    whole = Upscaler(model)(photo)
    np.testing.assert_array_equal(image[..., :3], reduced(whole, (30, 45)))
    assert imagecodecs.png_decode((folder / "out/deep_47x100.png").read_bytes()).shape == (31, 47, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--outscale", "2.5"], "--outscale 2.5 is more than the network's ×2"),
        (["--outscale", "0.5"], "--outscale must be at least 1, got 0.5"),
        (["--size", "20x20"], "in/cat.png: 30 × 20 pixels are larger than the result is to be"),
    ],
)
def test_sizes_that_cannot_be_made_are_refused(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["upscale", "in/cat.png", "-o", "out", "--model", str(model), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list((folder / "out").glob("*"))


@pytest.mark.parametrize(
    "arguments",
    [["--outscale", "1/0"], ["--outscale", "1e400"], ["--size", "3840"], ["--size", "9" * 400 + "x1"]],
)
def test_sizes_that_are_none_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["upscale", "in/cat.png", "-o", "out", *arguments])
    assert f"got '{arguments[1]}'" in capsys.readouterr().err


def test_network_that_ships_is_chosen_by_the_size(folder: Path) -> None:
    for number, size in (("1.5", (45, 30)), ("3.5", (105, 70))):
        assert main(["upscale", "in/cat.png", "-o", f"{number}.png", "--outscale", number]) == 0
        with Image.open(f"{number}.png") as image:
            assert image.size == size


def test_ensemble_is_what_it_is_in_python(folder: Path, model: Path) -> None:
    assert main(["upscale", "in/cat.png", "-o", "out", "--model", str(model), "--ensemble"]) == 0
    with Image.open("out/cat_x2.png") as image, Image.open("in/cat.png") as small:
        expected = Upscaler(model, ensemble=True)(np.asarray(small))
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_films_are_upscaled_where_they_are_named(
    folder: Path,
    model: Path,
    make_film: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    esc_log: list[str],
) -> None:
    make_film(folder / "in/film.mp4", moving(3))
    call = ["upscale", "in/film.mp4", "in/cat.png", "-o", "out", "--model", str(model)]
    assert main([*call, "--crf", "1", "--start", "0:00.08", "--end", "1"]) == 0
    assert files(folder / "out") == ["cat_x2.png", "film_x2.mp4"]
    assert "out: 2 of 2 files upscaled." in capsys.readouterr().out
    films = [frames_of(path) for path in (folder / "in/film.mp4", folder / "out/film_x2.mp4")]
    for old, new in zip(films[0][1:], films[1], strict=True):
        difference = Upscaler(model)(old) - new.astype(float)
        assert np.abs(difference @ [0.2126, 0.7152, 0.0722]).mean() < 5  # on luma: this network adds colours
    assert main(["upscale", "in", "-o", "all", "--model", str(model)]) == 0
    assert files(folder / "all") == ["cat_x2.png", "more/gray_x2.jpg"]
    assert any("left out: film.mp4" in message for message in esc_log)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in/film.mp4", "-o", "large.avi"], "large.avi: .avi is not written; choose among .mkv, .mp4, .mov"),
        (["in/film.mp4", "-o", "large.png"], "large.png: .png is not written; choose among .mkv, .mp4, .mov"),
        (["in/cat.png", "-o", "large.mkv"], "large.mkv: .mkv is not written; choose among .png"),
        (["in/film.mp4", "-o", "large.mkv", "--crf", "52"], "--crf must be from 0 to 51"),
        (["in/film.mp4", "-o", "o.mkv", "--start", "3", "--end", "2.5"], "--end must be later than --start"),
        (["in/film.mp4", "-o", "o.mkv", "--start", "1"], "in/film.mp4 has no frames within this time"),
        (["in/cat.png", "-o", "large.png", "--start", "1"], "--start and --end are for films"),
    ],
)
def test_wrong_wishes_for_films_are_refused(
    folder: Path,
    model: Path,
    make_film: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    make_film(folder / "in/film.mp4", moving(2))
    assert main(["upscale", *arguments, "--model", str(model)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["in"]


def test_films_need_an_extra_that_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "in/film.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["upscale", "in/film.mp4", "-o", "out"]) == 2
    assert "pip install 'esc-basicsr[video]'" in capsys.readouterr().err
