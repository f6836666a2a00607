"""`analyze erf` averages what it is asked to, writes it down, and refuses what cannot be averaged."""

import json

import cv2
import pytest
import torch.nn as nn
from PIL import Image
from torch import Tensor

from esc_basicsr.__main__ import main
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.lab.analysis import networks

TINY = "MSRResNet,num_feat=4,num_block=1"
QUICK = ["--scale", "2", "--size", "20", "--window-size", "8", "--positions", "2", "--device", "cpu"]


def analyze(*arguments: str) -> int:
    return main(["analyze", "erf", *arguments])


@pytest.fixture
def photographs(tmp_path):
    """A folder of two."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("coffee", "chelsea"):
        Image.fromarray(load_sample_image(name)[100:150, 100:160]).save(folder / f"{name}.png")
    return folder


def test_networks_are_measured_side_by_side_and_written_down(tmp_path, photographs, capsys):
    out = tmp_path / "out"
    images = ["--images", str(photographs), "camera"]
    assert analyze("--network", TINY, "Bicubic", *images, *QUICK, "-o", str(out)) == 0
    result = json.loads((out / "erf.json").read_text())
    assert result["settings"]["centres"] == [6, 10] and result["settings"]["field_size"] == [16, 16]
    assert len(result["settings"]["images"]) == 3
    tiny, bicubic = result["rows"]
    assert (tiny["images"], tiny["positions"], bicubic["weights"]) == (3, 4, "none")
    # Keys' kernel over a pixel's 2 outputs, positive part: 1.734 in the middle, 0.156 on either side
    assert [bicubic["raw"][share]["side"] for share in ("20%", "50%", "99%")] == [1, 1, 3]
    assert bicubic["raw_shares"][0] == pytest.approx((1.734375 / 2.046875) ** 2, abs=1e-3)
    assert tiny["raw_shares"][-1] == tiny["log_shares"][-1] == 1
    text = (out / "erf.md").read_text()
    assert text in capsys.readouterr().out
    assert "averaged over 3 images (20×20" in text and "and 4 positions" in text
    assert cv2.imread(str(out / "erf.png")) is not None


class Sometimes(nn.Module):
    """NaN for bright images, nothing that depends on the image for dark ones."""

    def forward(self, x: Tensor) -> Tensor:
        factor = float("nan") if x.mean() > 0.5 else 0.0
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2) * factor


def test_images_without_finite_gradients_are_left_out(tmp_path, monkeypatch, capsys, esc_log):
    monkeypatch.setattr(networks, "build_network", lambda name, scale: Sometimes())
    bright, dark = tmp_path / "bright.png", tmp_path / "dark.png"
    Image.new("RGB", (40, 40), "white").save(bright)
    Image.new("RGB", (40, 40), "black").save(dark)
    arguments = ["--network", "ESC", *QUICK, "-o", str(tmp_path / "out")]
    assert analyze(*arguments, "--images", str(bright), str(dark)) == 2
    assert esc_log == [f"ESC: {bright} is left out: its gradient is not finite."]
    assert "ESC: the receptive field is zero everywhere" in capsys.readouterr().err
    assert analyze(*arguments, "--images", str(bright)) == 2
    assert "ESC: no image has a finite gradient" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--positions", "0"], "expected 1 <= --positions <= --window-size <= --size, got 0, 8 and 20"),
        (["--positions", "9"], "got 9, 8 and 20"),
        (["--size", "7"], "got 2, 8 and 7"),
        (
            ["--size", "400"],
            "coffee is too small: of 600×400 pixels, and --size 400. At ×2 it takes 800",
        ),
        (["--images", "absent"], "absent: there is no such file"),
        (["--network", "Nothing"], "'Nothing' is no network"),
        (["-o", __file__], "cannot be made: File exists"),
    ],
)
def test_mistakes_are_told(arguments, message, tmp_path, capsys):
    given = ["--network", TINY, "--images", "coffee", *QUICK, "-o", str(tmp_path / "out"), *arguments]
    assert analyze(*given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
