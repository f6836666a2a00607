"""`analyze features` shows the layers asked for, or a network's stages, and what a query attends to."""

import json

import cv2
import numpy as np
import pytest

from esc_basicsr.__main__ import main
from esc_basicsr.archs import ESC
from esc_basicsr.commands.analyze_features import stage_names
from esc_basicsr.lab.analysis.networks import Subject
from esc_basicsr.lab.networks.by_name import build_network

SWINIR = (
    "SwinIR,img_size=16,embed_dim=8,depths=[2,2],num_heads=[2,2],window_size=4,mlp_ratio=1,"
    "upsampler=pixelshuffledirect"
)
TINY = "MSRResNet,num_feat=4,num_block=2"
QUICK = ["--scale", "2", "--size", "18", "--device", "cpu"]


def analyze(*arguments: str) -> int:
    return main(["analyze", "features", *arguments])


def test_networks_are_shown_side_by_side_and_written_down(tmp_path, capsys):
    out = tmp_path / "out"
    assert analyze("--network", SWINIR, TINY, *QUICK, "--query", "1", "14", "-o", str(out)) == 0
    result = json.loads((out / "features.json").read_text())
    assert result["settings"]["lr_size"] == [16, 16] and result["settings"]["query"] == [1, 14]
    swinir, tiny = result["rows"]
    assert [layer["layer"] for layer in swinir["layers"]] == ["layers.0", "layers.1"]
    assert [layer["size"] for layer in swinir["layers"]] == [[16, 16, 8]] * 2
    assert [layer["layer"] for layer in tiny["layers"]] == ["body.0", "body.1"]
    for layer in [*swinir["layers"], *tiny["layers"]]:
        assert layer["relative_log_amplitude"][0] == 0
        assert 0 < sum(layer["explained"]) <= 1 + 1e-9
    assert tiny["attention"] == []
    regular, shifted = swinir["attention"][:2]
    assert regular["window"] == [0, 12, 4]
    assert shifted["window"] == [-2, 14, 4]
    assert np.sum(regular["weights"]) == pytest.approx(1)
    seen = np.array(shifted["weights"], dtype=float)
    assert np.isnan(seen[2:]).all() and np.isnan(seen[:, :2]).all()
    assert seen[:2, 2:].sum() == pytest.approx(1)
    text = (out / "features.md").read_text()
    assert text in capsys.readouterr().out
    assert "of the query at x 1, y 14" in text and "8×16×16" in text
    assert cv2.imread(str(out / "features.png")) is not None


def test_layers_are_shown_that_were_asked_for(tmp_path):
    out = tmp_path / "out"
    # the last is of the output's size
    layers = ["--layers", "conv_first", "body.?.conv1", "conv_last"]
    assert analyze("--network", TINY, *layers, *QUICK, "-o", str(out)) == 0
    (row,) = json.loads((out / "features.json").read_text())["rows"]
    sizes = {layer["layer"]: layer["size"] for layer in row["layers"]}
    assert sizes == {
        "conv_first": [18, 18, 4],
        "body.0.conv1": [18, 18, 4],
        "body.1.conv1": [18, 18, 4],
        "conv_last": [36, 36, 3],
    }


@pytest.mark.parametrize(("network", "scale", "side"), [("ESCReal", 4, 16), ("ESCRealM", 2, 8)])
def test_networks_for_photographs_are_shown_and_attend_in_the_images_pixels(tmp_path, network, scale, side):
    sizes = "dim=16,pdim=4,kernel_size=5,n_blocks=1,conv_blocks=1,window_size=4,num_heads=2"
    arguments = ["--network", f"{network},{sizes}", *QUICK, "--scale", str(scale), "-o", str(tmp_path)]
    arguments += ["--layers", "blocks.0", "--size", "16"]
    assert analyze(*arguments) == 0
    (row,) = json.loads((tmp_path / "features.json").read_text())["rows"]
    assert [layer["size"] for layer in row["layers"]] == [[side, side, 16]]
    # at ×2 a pixel of the features is two by two of the image's, and a query is none of them
    assert [one["window"][2] for one in row["attention"]] == ([4] if network == "ESCReal" else [])


def test_a_network_without_colours_is_drawn(tmp_path):
    out = tmp_path / "out"
    network = "MSRResNet,num_feat=2,num_block=2"
    assert analyze("--network", network, *QUICK, "-o", str(out)) == 0
    (row,) = json.loads((out / "features.json").read_text())["rows"]
    assert [layer["explained"] for layer in row["layers"]] == [None, None]


def stages(net) -> list[str]:
    return stage_names(Subject("net", net, 2, 0, "random", "net"))


def test_stages_are_the_largest_list_nearest_to_the_root():
    options = {"dim": 16, "pdim": 4, "kernel_size": 5, "n_blocks": 8, "conv_blocks": 1, "window_size": 4}
    found = stages(ESC(upscaling_factor=2, num_heads=2, **options))
    assert found == [f"blocks.{number}" for number in (0, 1, 3, 4, 6, 7)]
    swinir = SWINIR.replace("SwinIR", "spandrel.SwinIR")
    assert stages(build_network(swinir, 2)) == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--query", "18", "0"], "--query 18 0 does not lie in the LR image of 18×18"),
        (["--layers", "head.*"], "no module is called 'head.*'. Candidates: conv_first, body"),
        (["--modules", "attn"], "no module is called 'attn'. None of its modules is called like attention"),
        (["--network", "Bicubic"], "Bicubic: it has no layers to look into"),
        (["--size", "0"], "astronaut is too small"),
        (["--image", "absent"], "absent: there is no such file"),
        (["-o", __file__], "cannot be made: File exists"),
    ],
)
def test_mistakes_are_told(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert analyze("--network", TINY, *QUICK, "-o", str(out), *arguments) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
