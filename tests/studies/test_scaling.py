"""Scaling is measured size by size, fitted on the larger half, and stopped before memory runs out."""

import argparse
import json

import cv2
import pytest
import scaling
from scaling import Row, expected_memory, exponents, markdown, output_size

from esc_basicsr.common.command_line import run_command


def run(*arguments: object) -> int:
    return run_command("scaling", [*map(str, arguments), "--device", "cpu"], prog="scaling")


def rows(network: str, time_power: float, memory_power: float) -> list[Row]:
    sides = (64, 128, 256, 512)
    return [
        Row(network, (s, s), [1e-6 * s ** (2 * time_power)], round(s ** (2 * memory_power)), None)
        for s in sides
    ]


def test_growth_measures_and_writes_it_down(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "peak_memory_growth", lambda build, lq: 100 * lq.numel())
    sizes = ("--sizes", "72x64", "64x32", "128x64")
    networks = ("--network", "ESC-FP:release", "ESC-FP")
    assert run(*networks, *sizes, "--scale", 2, "--repeats", 1, "--warmup", 0, "-o", tmp_path) == 0
    result = json.loads((tmp_path / "scaling.json").read_text())
    measured = [(row["network"], row["output"]) for row in result["rows"]]
    assert measured == [
        ("ESC-FP:release", [64, 32]),
        ("ESC-FP", [64, 32]),
        ("ESC-FP:release", [72, 64]),
        ("ESC-FP", [72, 64]),
        ("ESC-FP:release", [128, 64]),
        ("ESC-FP", [128, 64]),
    ]
    assert [row["difference"] is None for row in result["rows"]] == [True, False] * 3
    assert result["exponents"]["ESC-FP"]["memory"] == pytest.approx(1)
    assert result["skipped"] == []
    text = (tmp_path / "scaling.md").read_text()
    assert text in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "scaling.png")) is not None


def test_a_network_is_skipped_from_the_size_on_that_would_take_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "peak_memory_growth", lambda build, lq: lq.shape[-1] ** 2 << 20)
    sizes = ("--sizes", "16x16", "32x32", "64x64", "128x128")
    limit = ("--memory-limit", 1)
    network = ("--network", "MSRResNet,num_feat=4,num_block=1")
    assert run(*network, *sizes, *limit, "--repeats", 1, "-o", tmp_path) == 0
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["output"][0] for row in result["rows"]] == [16, 32, 64, 128]
    assert run(*network, *sizes, "--memory-limit", 0.5, "--repeats", 1, "-o", tmp_path) == 0
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["output"][0] for row in result["rows"]] == [16, 32, 64]
    assert result["skipped"] == [
        "MSRResNet,num_feat=4,num_block=1 is left out from 128×128 on: it would take about 1,024 MiB, "
        "and the limit is 512 MiB."
    ]


def test_exponents_are_those_of_the_larger_half():
    measured = rows("ESC", 1.0, 1.5)
    measured[0] = measured[0]._replace(seconds=[100.0])  # the smaller half has its own ways
    assert exponents(measured, "ESC") == pytest.approx({"seconds": 1.0, "memory": 1.5}, rel=1e-3)
    assert exponents(measured[:1], "ESC") is None
    assert "| ESC | 1.00 | 1.50 |" in markdown(measured, [])


def test_memory_is_expected_to_grow_as_it_did():
    linear, steep = rows("ESC", 1, 1), rows("ESC", 1, 3)
    assert expected_memory([], 100) == 0
    assert expected_memory(linear[:1], 2 * 64**2) == pytest.approx(2 * 64**2)
    assert expected_memory(linear, 4 * 512**2) == pytest.approx(4 * 512**2)
    assert expected_memory(steep, 4 * 512**2) == pytest.approx(16 * 512**6)


def test_sizes_are_read_as_width_by_height():
    assert output_size("1280x720") == output_size("1280×720") == (1280, 720)
    for text in ("1280", "0x4", "4x", "x4x4"):
        with pytest.raises(argparse.ArgumentTypeError, match="write WIDTHxHEIGHT"):
            output_size(text)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", "63x64"], "--sizes 63x64: not a multiple of the scale, 4"),
        (["--network", "MSRResNet,upscale=2"], "MSRResNet,upscale=2: upscales ×2: give it --scale 2"),
        (["--memory-limit", "-1"], "--memory-limit must be above 0"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
