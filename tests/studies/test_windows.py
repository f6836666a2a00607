"""The methods of window attention agree, and their ratios stand beside the paper's."""

import json

import cv2
import pytest
import torch

from esc_basicsr.common.command_line import run_command
from esc_basicsr.lab.measure import window_attention
from esc_basicsr.lab.measure.window_attention import FLEX, METHODS, Layer, Row, markdown, naive_memory


def run(*arguments: object) -> int:
    return run_command("windows", [*map(str, arguments), "--device", "cpu"], prog="windows")


def test_methods_are_measured_and_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(window_attention, "peak_memory_growth", lambda build, x: 1000)
    methods = [method for method in METHODS if method != FLEX]  # which takes long to compile on a CPU
    arguments = ("--method", *methods, "--window", 8, 4, "--size", 10, 12, "--repeats", 2, "-o", tmp_path)
    assert run(*arguments) == 0
    rows = json.loads((tmp_path / "windows.json").read_text())["rows"]
    assert [(row["window"], row["method"]) for row in rows] == [
        (w, method) for w in (4, 8) for method in methods
    ]
    for row in rows:
        assert len(row["seconds"]) == 2
        assert (row["difference"] is None) if row["method"] == "naive" else (row["difference"] < 1e-5)
    assert (tmp_path / "windows.md").read_text() in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "windows.png")) is not None


def test_naive_method_is_skipped_where_it_would_take_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(window_attention, "peak_memory_growth", lambda build, x: 1000)
    limit = naive_memory(4, (8, 8)) / 2**30
    arguments = ("--window", 4, 8, "--size", 8, 8, "--memory-limit", limit, "--repeats", 1, "-o", tmp_path)
    assert run(*arguments, "--method", "naive", "fused") == 0
    result = json.loads((tmp_path / "windows.json").read_text())
    assert [(row["window"], row["method"]) for row in result["rows"]] == [
        (4, "naive"),
        (4, "fused"),
        (8, "fused"),
    ]
    (note,) = result["skipped"]
    assert note.startswith("The naive one is left out at 8: it would take about")


def test_memory_of_scores_is_counted():
    # 15 windows of 4096 queries and keys, 4 heads, three maps of float32, and the bias
    assert naive_memory(64, (180, 320)) == (3 * 15 + 1) * 4 * 4096**2 * 4


def test_methods_share_weights_and_notice_the_bias():
    x = torch.rand(1, 64, 6, 6)
    with torch.inference_mode():
        layer = Layer("fused", 4)
        before = layer(x)
        layer.attn.relative_position_bias.zero_()
        assert (layer(x) - before).abs().max() > 1e-3
    assert torch.equal(Layer("naive", 4).attn.to_qkv.weight, layer.attn.to_qkv.weight)


def test_papers_ratios_stand_below_ours():
    rows = [
        Row("naive", 32, [0.8], 40 << 20, None),
        Row("fused", 32, [0.1], 10 << 20, 1e-6),
        Row("fused", 64, [0.1], 10 << 20, None),
    ]
    assert markdown(rows).splitlines()[3:] == [
        "| 32 | fused | 100.0 ms | 8.0 | 10 MiB | 4.0 | 1.0e-06 |",
        "| 32 | the paper's, on its GPU |  | 16 |  | 12.2 |  |",
        "| 64 | fused | 100.0 ms |  | 10 MiB |  |  |",
    ]
    assert "paper" not in markdown(rows[2:])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--window", "0"], "--window must be at least 1, got 0"),
        (["--size", "8", "0"], "--size must be at least 1, got 0"),
        (["--memory-limit", "0"], "--memory-limit must be above 0"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
