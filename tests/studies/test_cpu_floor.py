"""A processor's rates, and the floor of a network's time by them."""

import json

import cpu_floor
import cv2
import pytest
from cpu_floor import Row, Work, floor_of, markdown, work_of

from esc_basicsr.archs.variants import build_variant
from esc_basicsr.common.command_line import run_command

RATES = {"float32": 10.0, "bfloat16": 40.0, "exponentials": 5.0, "gelus": 2.0, "bytes": 100.0}


def run(*arguments: object) -> int:
    return run_command(cpu_floor.__name__, [*map(str, arguments), "--device", "cpu"], prog="cpu_floor")


def test_floor_is_of_arithmetic_or_of_memory_whichever_takes_longer():
    work = Work(multiply_adds=80, exponentials=10, gelus=4, bytes=700)
    assert floor_of(work, RATES, "float32") == pytest.approx(8 + 2 + 2)
    assert floor_of(work, RATES, "bfloat16") == pytest.approx(7)


def test_work_is_counted_in_whole_windows():
    net = build_variant("ESC", 4)
    work, wider = (work_of("ESC", 4, 33, width) for width in (32, 64))
    layers = 5  # of window attention, one a block
    assert len(net.blocks) == layers
    assert work.exponentials == layers * 2 * 4 * 32**4  # two windows, one of which is filled up; 4 heads
    assert wider.exponentials == 2 * work.exponentials
    # two a ConvFFN, of which a block has one of 128 channels and five of 80
    assert wider.gelus == 2 * work.gelus == 2 * 2 * layers * (128 + 5 * 80) * 33 * 32
    assert wider.bytes == 2 * work.bytes


def test_study_measures_and_writes_down(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_floor, "_SIDE", 64)
    monkeypatch.setattr(cpu_floor, "_UNCACHED", 2**12)
    small = ("--network", "ESC-FP", "ESC-FP:kernels", "--scale", 2, "--input-size", 8, 8)
    assert run(*small, "--repeats", 1, "--warmup", 0, "-o", tmp_path) == 0
    result = json.loads((tmp_path / "cpu_floor.json").read_text())
    assert [row["network"] for row in result["rows"]] == ["ESC-FP", "ESC-FP:kernels"]
    assert result["rows"][0]["floor"] == result["rows"][1]["floor"] > 0
    assert {*result["rates"]} == {*cpu_floor.RATES} and min(result["rates"].values()) > 0
    assert (tmp_path / "cpu_floor.md").read_text() in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "cpu_floor.png")) is not None


def test_table_has_the_ratio_to_the_floor():
    lines = markdown([Row("ESC", 3.0, 1.5)], {"float32": 57.1e9}).splitlines()
    assert lines[2] == "| multiply-adds in float32 | 57.10 G |"
    assert lines[-1] == "| ESC | 3,000.0 ms | 1,500.0 ms | 2.00 |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--network", "MSRResNet"],
            "--network MSRResNet: expected ESC, ESC-light, ESC-FP",
        ),
        (["--input-size", 0, 8], "--input-size must be at least 1 1, got 0 8"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
