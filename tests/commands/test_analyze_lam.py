"""`analyze lam` maps what it is asked to, writes it down, and refuses what cannot be mapped."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from esc_basicsr.__main__ import main
from esc_basicsr.commands.analyze_lam import make_scene
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.lab.analysis import networks
from esc_basicsr.lab.analysis.drawing import Attributed, draw_attribution
from esc_basicsr.lab.analysis.local_attribution import Window
from esc_basicsr.lab.networks.by_name import build_network

TINY = "MSRResNet,num_feat=4,num_block=1"
QUICK = ["--scale", "2", "--fold", "3", "--crop", "40", "--device", "cpu"]


def analyze(*arguments: str) -> int:
    return main(["analyze", "lam", *arguments])


def test_networks_are_mapped_side_by_side_and_written_down(tmp_path, capsys):
    networks = [TINY, "Bicubic"]
    assert analyze("--network", *networks, "--window", "100", "60", "8", *QUICK, "-o", str(tmp_path)) == 0
    result = json.loads((tmp_path / "lam.json").read_text())
    settings = result["settings"]
    assert settings["window"] == [100, 60, 8] and settings["lr_size"] == [20, 20]
    assert settings["crop"] == [100 - 15, 60 - 15, 40, 40]
    first, second = result["rows"]
    assert (first["network"], first["weights"], second["weights"]) == (TINY, "random", "none")
    for row in (first, second):
        assert 100 / 400 <= row["diffusion_index"] < 100
        assert row["sum"] == pytest.approx(row["detail_gained"], rel=0.5)
    text = (tmp_path / "lam.md").read_text()
    assert text in capsys.readouterr().out
    assert "8×8 at x 100, y 60" in text and "Random weights show" in text
    assert cv2.imread(str(tmp_path / "lam.png")) is not None


def test_window_is_centred_and_in_the_middle_of_the_crop():
    image = load_sample_image("coffee")  # 400×600
    scene = make_scene(image, "coffee", None, 256, 4)
    assert scene.hr.shape == (256, 256, 3) and scene.lr.shape == (64, 64, 3)
    assert scene.window == Window(119, 119, 16)
    assert (scene.left + scene.window.x, scene.top + scene.window.y) == (291, 191)
    assert np.array_equal(scene.hr, image[scene.top : scene.top + 256, scene.left : scene.left + 256])


@pytest.mark.parametrize("x, y", [(0, 0), (583, 383), (0, 383)])
def test_windows_at_the_border_are_looked_at_from_one_side(x, y):
    scene = make_scene(load_sample_image("coffee"), "coffee", [x, y], 256, 3)
    assert scene.hr.shape == (255, 255, 3)
    assert (scene.left + scene.window.x, scene.top + scene.window.y) == (x, y)
    assert max(scene.window[:2]) + 16 <= 254


def test_the_least_crop_is_what_the_window_and_its_neighbours_need():
    image = load_sample_image("coffee")
    with pytest.raises(UserError, match="at least 24 pixels a side; got --crop 23"):
        make_scene(image, "coffee", [50, 50, 20], 23, 4)
    scene = make_scene(image, "coffee", [50, 50, 20], 24, 4)
    assert scene.window.x + 20 <= 23 and scene.left + scene.window.x == 50


def test_a_small_photograph_is_taken_whole():
    scene = make_scene(load_sample_image("coffee")[:61, :42], "part", None, 256, 4)
    assert scene.hr.shape == (60, 40, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--window", "600", "0"],
            "--window 600 0 16 does not lie in coffee: of 600×400 pixels X can be 0 to",
        ),
        (["--window", "584", "0"], "X can be 0 to 583 and Y 0 to 383"),
        (["--window", "-1", "0"], "--window -1 0 16 does not lie in coffee"),
        (["--window", "4"], "--window: expected X Y or X Y SIZE, got 1 numbers"),
        (["--window", "4", "4", "0"], "--window: SIZE must be at least 1, got 0"),
        (
            ["--window", "4", "4", "40"],
            "a window of 40 pixels at ×2 needs --crop and an image of at least 42 pixels",
        ),
        (["--fold", "0"], "--fold must be at least 1"),
        (["--image", "absent.png"], "absent.png: there is no such file"),
        (["--network", "ESC", "Nothing"], "'Nothing' is no network"),
        (["--network", "VGGStyleDiscriminator,num_in_ch=3,num_feat=4,input_size=64"], "cannot be"),
        (["-o", __file__], "cannot be made: File exists"),
    ],
)
def test_mistakes_are_told(arguments, message, tmp_path, capsys):
    given = ["--network", TINY, "--image", "coffee", *QUICK, "-o", str(tmp_path / "out"), *arguments]
    assert analyze(*given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_small_images_and_flat_ones_are_told(tmp_path, capsys):
    small, flat = tmp_path / "small.png", tmp_path / "flat.png"
    Image.new("RGB", (16, 64)).save(small)
    Image.new("RGB", (64, 64), "teal").save(flat)
    arguments = ["--network", "Bicubic", *QUICK, "-o", str(tmp_path / "out")]
    assert analyze(*arguments, "--image", str(small)) == 2
    assert "an image of at least 18 pixels a side" in capsys.readouterr().err
    assert analyze(*arguments, "--image", str(flat)) == 2
    assert "Bicubic: the attribution is zero but for rounding, so there is no map" in capsys.readouterr().err


def test_one_network_without_a_map_leaves_the_others(tmp_path, monkeypatch, capsys):
    class Blank(torch.nn.Module):
        def forward(self, x):
            return 0 * x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def build_or_blank(name, scale):
        return Blank() if name == TINY else build_network(name, scale)

    monkeypatch.setattr(networks, "build_network", build_or_blank)
    out = tmp_path / "out"
    arguments = ["--image", "coffee", *QUICK, "-o", str(out)]
    assert analyze("--network", "Bicubic", TINY, *arguments) == 2
    assert f"{TINY}: the attribution is zero but for rounding" in capsys.readouterr().err
    assert [row["network"] for row in json.loads((out / "lam.json").read_text())["rows"]] == ["Bicubic"]
    assert f"Left out: {TINY}: the attribution is zero" in (out / "lam.md").read_text()


def test_a_map_of_one_pixel_is_drawn_without_density():
    hr, lr = np.zeros((16, 16, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    one = np.zeros((8, 8))
    one[2, 3] = 1
    column = Attributed("A ×2, random weights", one, 1.5, hr[:4, :4])
    figure = draw_attribution(hr, lr, Window(4, 4, 4), [column], "caption")
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert any(text.startswith("no density") for text in texts)
    titles = [axis.get_title() for axis in figure.axes]
    assert "A ×2, random weights\ndiffusion index 1.50" in titles


def test_help_lists_the_analyses_and_their_options(capsys):
    for arguments, expected in (
        (["--help"], "erf"),
        (["lam", "--help"], "--integration {right,midpoint}"),
        (["features", "--help"], "torchscript:FILE"),
    ):
        with pytest.raises(SystemExit):
            main(["analyze", *arguments])
        assert expected in capsys.readouterr().out
