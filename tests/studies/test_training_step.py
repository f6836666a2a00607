"""Training steps of the forms: measured in turn, and their gradients compared."""

import json

import cv2
import pytest
import torch
import training_step

from esc_basicsr.common.command_line import run_command
from esc_basicsr.lab.measure.training_step import Row, largest_relative_difference, markdown


def run(*arguments: object) -> int:
    return run_command(
        training_step.__name__, [*map(str, arguments), "--device", "cpu"], prog="training_step"
    )


def test_steps_are_measured_and_gradients_agree(tmp_path, capsys):
    names = ["ESC-light:release", "ESC-light", "ESC-light:kernels"]
    sizes = ("--batch", 1, "--patch", 20, "--repeats", 2)
    assert run("--network", *names, *sizes, "-o", tmp_path) == 0
    result = json.loads((tmp_path / "training_step.json").read_text())
    assert [row["network"] for row in result["rows"]] == names
    assert [len(row["seconds"]) for row in result["rows"]] == [2] * 3
    assert [row["difference"] is None for row in result["rows"]] == [True, False, False]
    for row in result["rows"][1:]:
        assert 0 <= row["bias_difference"] <= row["difference"] < 1e-3
    assert (tmp_path / "training_step.md").read_text() in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "training_step.png")) is not None


def test_difference_is_relative_and_the_worst_parameters():
    expected = {"a": torch.tensor([3.0, 4.0]), "b.bias": torch.tensor([100.0])}
    made = {"a": torch.tensor([3.0, 4.5]), "b.bias": torch.tensor([101.0])}
    assert largest_relative_difference(made, expected, "") == pytest.approx(0.1)
    assert largest_relative_difference(made, expected, "bias") == pytest.approx(0.01)


def test_table_compares_with_the_first_form_of_the_same_variant():
    rows = [
        Row("ESC:release", [4.0, 6.0, 5.0], None, None),
        Row("ESC", [2.0], 1e-6, 1e-7),
        Row("ESC-FP", [1.0], None, None),
    ]
    lines = markdown(rows).splitlines()
    assert lines[3] == "| ESC | 2,000.0 ms | 2.50 | 1.0e-06 | 1.0e-07 |"
    assert lines[4] == "| ESC-FP | 1,000.0 ms |  |  |  |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--network", "MSRResNet"],
            "--network MSRResNet: expected ESC, ESC-light, ESC-FP, or a form of one",
        ),
        (["--network", "ESC:release-flex"], "ESC:release-flex: Flex has no gradients on a CPU"),
        (["--batch", 0], "must be at least 1, got 0 and 64"),
        (["--precision", "bf16"], "ESC-light:kernels: measure the C++ kernels in bfloat16"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
