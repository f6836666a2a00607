import json
import sys

import pytest
import torch

from esc_basicsr.__main__ import main
from esc_basicsr.export import onnx_network
from esc_basicsr.weights.read import read_safetensors_metadata
from esc_basicsr.weights.shipped import load_network
from esc_basicsr.weights.write import write_safetensors


def export(checkpoint, out, *options):
    return main(["export", str(checkpoint), "-o", str(out), *options])


ENDINGS = [[".onnx"], [".xml", ".bin"], [".ncnn.param", ".ncnn.bin"], [".pt"], [".safetensors"]]


@pytest.mark.parametrize("endings", ENDINGS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_ending_tells_the_format_and_differences_are_printed(
    checkpoint, tmp_path, capsys, endings, precision
):
    out = tmp_path / "new" / f"tiny{endings[0]}"
    assert export(checkpoint, out, "--precision", precision) == 0
    printed = capsys.readouterr().out
    assert "2×3×5×5: differs by" in printed and "ESC ×2, " in printed and precision in printed
    assert ("opset 18" in printed) == (endings == [".onnx"])
    assert {path.name for path in out.parent.iterdir()} == {f"tiny{ending}" for ending in endings}


def test_safetensors_tell_what_the_source_told_and_load_again(checkpoint, lively_network, tmp_path):
    source = tmp_path / "trained.safetensors"
    write_safetensors(
        source, load_network(checkpoint).network.state_dict(), {"iteration": "500", "name": "mine"}
    )
    out = tmp_path / "out.safetensors"
    assert export(source, out, "--precision", "fp16") == 0
    about = read_safetensors_metadata(out)
    assert (about["iteration"], about["name"]) == ("500", "mine")
    assert (about["scale"], about["precision"]) == ("2", "fp16")
    trained = load_network(out)
    assert json.loads(about["network_g"]) == trained.options
    lr = torch.rand(1, 3, 9, 7)
    assert torch.allclose(trained.network(lr), load_network(source).network(lr), atol=1e-2)


def test_network_that_differs_is_not_left_behind(checkpoint, tmp_path, capsys, monkeypatch):
    read = onnx_network.read_onnx
    monkeypatch.setattr(onnx_network, "read_onnx", lambda content: lambda lr: read(content)(lr) + 1)
    out = tmp_path / "tiny.onnx"
    out.write_text("before")
    assert export(checkpoint, out, "--overwrite") == 2
    assert "differs from the network by 1.0e+00" in capsys.readouterr().err
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.onnx", "tiny_x2.pth"]


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("a.bin", [], "its ending tells no format"),
        ("a.pt", ["--opset", "18"], "--opset is ONNX's"),
        ("a.xml", ["--format", "onnx"], "contradicts the name"),
        ("a.safetensors", ["--time", "8x8"], "nothing that runs"),
        ("a.pt", ["--time", "0x8"], "expected height and width"),
        ("tiny_x2.pth", ["--format", "onnx"], "Add --overwrite"),
        ("tiny_x2.pth/a.safetensors", [], "cannot be made"),
    ],
)
def test_mistakes_are_told(checkpoint, tmp_path, capsys, out, options, message):
    before = checkpoint.read_bytes()
    assert export(checkpoint, tmp_path / out, *options) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny_x2.pth"] and checkpoint.read_bytes() == before


def test_second_file_of_a_format_is_guarded_as_the_first(checkpoint, tmp_path, capsys):
    weights = tmp_path / "tiny.bin"
    weights.mkdir()  # which nothing replaces
    for options, message in (([], "tiny.bin exists. Add --overwrite"), (["--overwrite"], "no plain file")):
        assert export(checkpoint, tmp_path / "tiny.xml", *options) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.bin", "tiny_x2.pth"]


@pytest.mark.parametrize(
    ("package", "ending", "extra"),
    [
        ("onnx", ".onnx", "onnx"),
        ("onnxruntime", ".onnx", "onnx"),
        ("openvino", ".xml", "openvino"),
        ("ncnn", ".param", "ncnn"),
        ("pnnx", ".param", "ncnn"),
    ],
)
def test_missing_extra_is_told_and_others_work(
    checkpoint, tmp_path, capsys, monkeypatch, package, ending, extra
):
    for name in [name for name in sys.modules if name.startswith("esc_basicsr.export.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert export(checkpoint, tmp_path / f"tiny{ending}") == 2
    error = capsys.readouterr().err
    assert f"the package {package}:" in error and f"pip install 'esc-basicsr[{extra}]'" in error
    assert export(checkpoint, tmp_path / "tiny.safetensors") == 0


def test_time_compares_in_one_run(checkpoint, tmp_path, capsys):
    assert export(checkpoint, tmp_path / "tiny.onnx", "--time", "9x12") == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table][:3] == ["| runs by", "| esc_basicsr", "| ONNX Runtime"]
    assert table[1][2] == "1.00" and float(table[2][3].rstrip(" |")) < 1e-5
