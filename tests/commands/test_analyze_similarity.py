"""`analyze similarity` compares the layers it finds, beside a random twin, and refuses what has none."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from esc_basicsr.__main__ import main
from esc_basicsr.archs import ESC
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.lab.analysis.images import central_lr
from esc_basicsr.lab.networks.by_name import build_network

SWINIR = (
    "SwinIR,img_size=16,embed_dim=8,depths=[2,2],num_heads=[2,2],window_size=4,mlp_ratio=1,"
    "upsampler=pixelshuffledirect"
)
HIT = "HiT_SRF,embed_dim=16,depths=[2],num_heads=[2],base_win_size=[4,4],hier_win_ratios=[0.5,2]"
QUICK = ["--scale", "2", "--size", "16", "--device", "cpu"]
MAPS = ["map_pixel", "map_window", "map_relative"]


def analyze(*arguments: str) -> int:
    return main(["analyze", "similarity", *arguments])


@pytest.fixture
def photographs(tmp_path):
    """A folder of five, of different sizes."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for width in (32, 34, 40, 36, 33):
        part = load_sample_image("coffee")[100 + width : 138 + width, 100 : 100 + width]
        Image.fromarray(part).save(folder / f"{width}.png")
    return str(folder)


def result_of(folder):
    return json.loads((folder / "similarity.json").read_text())


def test_a_trained_network_is_compared_with_a_random_twin(tmp_path, photographs, capsys):
    net = build_network(SWINIR, 2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = tmp_path / "swinir.pth"
    torch.save({"params": net.state_dict()}, weights)
    out = tmp_path / "out"
    networks = ["--network", f"{SWINIR},weights={weights}", HIT]
    assert analyze(*networks, "--images", photographs, *QUICK, "-o", str(out)) == 0
    result = result_of(out)
    assert result["settings"]["lr_sizes"] == [[16, 16]] and len(result["settings"]["images"]) == 5
    trained, twin, hit = result["rows"]
    assert [row["weights"] for row in (trained, twin, hit)] == [str(weights), "random", "random"]
    assert trained["network"] == twin["network"] == SWINIR and trained["params"] == twin["params"]
    assert [name[:8] for name in trained["layers"]] == ["layers.0", "layers.0", "layers.1", "layers.1"]
    assert list(trained["statistics"]) == ["cka", "cka_unbiased", *MAPS]
    assert list(hit["statistics"]) == ["cka", "cka_unbiased"]
    for statistic in trained["statistics"].values():
        pairs = np.array(statistic["pairs"])
        np.testing.assert_allclose(pairs.diagonal(), 1)
        np.testing.assert_allclose(pairs, pairs.T)
        assert statistic["adjacent"] == pytest.approx(np.mean([pairs[0, 1], pairs[1, 2], pairs[2, 3]]))
        assert statistic["within_groups"] == pytest.approx(np.mean([pairs[0, 1], pairs[2, 3]]))
        assert statistic["two_apart"] == pytest.approx(np.mean([pairs[0, 2], pairs[1, 3]]))
    # random attention is uniform; what was trained, as weights this large are, is not
    assert twin["statistics"]["map_pixel"]["uniform"] > 0.999 > trained["statistics"]["map_pixel"]["uniform"]
    assert trained["statistics"]["map_pixel"]["adjacent"] < twin["statistics"]["map_pixel"]["adjacent"]
    text = (out / "similarity.md").read_text()
    assert text in capsys.readouterr().out
    assert f"{SWINIR}: 3, 2 and 2, {HIT}: 1, 1 and 0" in text
    assert f"No attention maps by windows were seen in every layer of {HIT}:" in text
    assert cv2.imread(str(out / "similarity.png")) is not None


def test_a_checkpoint_has_a_twin_of_its_kind(tmp_path, photographs):
    options = {"dim": 16, "pdim": 4, "kernel_size": 5, "n_blocks": 3, "conv_blocks": 1, "window_size": 4}
    torch.manual_seed(1)
    net = ESC(upscaling_factor=2, num_heads=2, **options)
    ours, foreign = tmp_path / "esc.pth", tmp_path / "swinir.pth"
    torch.save(net.state_dict(), ours)
    swinir = SWINIR.replace("SwinIR", "spandrel.SwinIR")
    trained = build_network(swinir, 2).model
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save(trained.state_dict(), foreign)
    out = tmp_path / "out"
    arguments = ["--images", photographs, "--size", "16", "--device", "cpu", "-o", str(out)]
    assert analyze("--network", str(ours), str(foreign), *arguments) == 0
    rows = result_of(out)["rows"]
    assert [row["weights"] for row in rows] == [str(ours), "random", str(foreign), "random"]
    assert rows[0]["layers"] == rows[1]["layers"] == [f"blocks.{i}.attn" for i in range(3)]
    assert rows[2]["layers"] == rows[3]["layers"] and len(rows[2]["layers"]) == 4
    assert [row["network"] for row in rows] == ["esc.pth"] * 2 + ["swinir.pth"] * 2
    for trained, twin in (rows[:2], rows[2:]):
        assert trained["statistics"]["cka"] != twin["statistics"]["cka"]
    assert set(MAPS) < set(rows[0]["statistics"]) and set(MAPS) < set(rows[2]["statistics"])


def test_a_files_network_with_another_files_weights_has_no_twin(tmp_path, photographs):
    options = {"dim": 16, "pdim": 4, "kernel_size": 5, "n_blocks": 2, "conv_blocks": 1, "window_size": 4}
    net = ESC(upscaling_factor=2, num_heads=2, **options)
    for name in ("a.pth", "b.pth"):
        torch.save(net.state_dict(), tmp_path / name)
    given = f"{tmp_path / 'a.pth'},weights={tmp_path / 'b.pth'}"
    out = tmp_path / "out"
    assert analyze("--network", given, "--images", photographs, *QUICK, "-o", str(out)) == 0
    assert [row["weights"] for row in result_of(out)["rows"]] == [str(tmp_path / "b.pth")]


def test_whole_images_are_rows_where_asked_for(tmp_path, photographs):
    out = tmp_path / "out"
    arguments = ["--network", SWINIR, "--images", photographs, *QUICK, "--batch", "4", "-o", str(out)]
    assert analyze(*arguments, "--rows", "images", "--modules", "layers.*.attn") == 0
    (row,) = result_of(out)["rows"]
    assert list(row["statistics"]) == ["cka_unbiased", *MAPS]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--images", "coffee", "--rows", "images"], "--rows images needs at least 4 images, got 1"),
        (["--rows", "images", "--batch", "3"], "--batch must be at least 4, got 3"),
        (["--rows", "images", "--size", "20"], "LR images of one size, got 16×16, 20×16"),
        (["--size", "7"], "32.png is too small: of 32×38 pixels, and --size 7. At ×2 it takes 16 a side"),
        (["--network", "MSRResNet"], "MSRResNet: no attention modules of a known kind"),
        (["--modules", "body.*"], "no module is called 'body.*'. Candidates: layers.0.residual_group"),
        (["--modules", "layers.0.*.0.attn"], "layers are compared, and there is but one"),
        (["--modules", "conv_first", "upsample"], "upsample has (32, 32) pixels of an image of (16, 16)"),
        (["--network", "Nothing"], "'Nothing' is no network"),
        (["-o", __file__], "cannot be made: File exists"),
    ],
)
def test_mistakes_are_told(arguments, message, tmp_path, photographs, capsys):
    out = tmp_path / "out"
    given = ["--network", SWINIR, "--images", photographs, *QUICK, "-o", str(out), *arguments]
    assert analyze(*given) == 2
    assert message in capsys.readouterr().err
    assert not list(out.glob("*"))


def test_layers_that_give_nothing_are_told(tmp_path, photographs, capsys):
    net = build_network(SWINIR, 2)
    torch.nn.init.zeros_(net.layers[1].residual_group.blocks[0].attn.proj.weight)
    weights = tmp_path / "swinir.pth"
    torch.save({"params": net.state_dict()}, weights)
    given = ["--network", f"{SWINIR},weights={weights}", "--images", photographs, *QUICK]
    assert analyze(*given, "-o", str(tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "layers.1.residual_group.blocks.0.attn: its features are constant, or not finite" in said
    # what was found of its random twin is kept
    assert [row["weights"] for row in result_of(tmp_path / "out")["rows"]] == ["random"]


def test_photographs_are_cut_to_their_centre_and_whole_windows(tmp_path):
    image = np.arange(50 * 70 * 3, dtype=np.uint32).reshape(50, 70, 3).astype(np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    assert central_lr(str(path), 16, 4, 4, 2).shape == (16, 16, 3)
    assert central_lr(str(path), 100, 8, 8, 2).shape == (24, 32, 3)
    assert central_lr(str(path), 100, 1, 1, 3).shape == (16, 23, 3)
    np.testing.assert_array_equal(central_lr(str(path), 10, 10, 1, 1), image[20:30, 30:40])
    with pytest.raises(UserError, match=r"it takes 64 a side, for an LR image of at least 32×32\."):
        central_lr(str(path), 100, 32, 32, 2)
