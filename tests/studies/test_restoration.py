"""The study of restoration trains by sound option files, and measures and draws what comes of it."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import restoration
import torch
import yaml
from PIL import Image
from torch import nn

from esc_basicsr.archs import Bicubic
from esc_basicsr.options.check import check_options
from esc_basicsr.options.recipes import Recipe


class Darker(nn.Module):
    """Takes a level off every pixel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images - 1 / 255


def test_all_tasks_are_trained_measured_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(recipe: Recipe, folder: Path, iterations: int) -> nn.Module:
        options = restoration.options_of(recipe, iterations)
        (folder / f"{recipe.name}.yml").write_text(yaml.safe_dump(options, sort_keys=False))
        monkeypatch.chdir(folder)
        check_options(options, recipe.name, is_train=True)
        trained.append(recipe.name)
        return Darker() if recipe.degradation else Bicubic(recipe.scale)

    monkeypatch.setattr(restoration, "train", train)
    monkeypatch.setattr(restoration, "TRAINING_PAIRS", 4)
    monkeypatch.setattr(restoration, "TEST_PAIRS", 1)
    assert restoration.run(Namespace(data=None, iterations=7, output=tmp_path / "out")) == 0
    figures = json.loads((tmp_path / "out/restoration.json").read_text())
    rows = {row["network"]: row for row in figures["rows"]}
    assert [*rows] == trained and len(rows) == 4
    noise, real = rows["ESC_x1_DIV2K_noise50"], rows["ESC-RealM_x2_DIV2K_MSE"]
    assert 14 < noise["before"] < 16 and noise["before"] != noise["after"]  # sigma 50, clipped: 14.8 dB or so
    assert real["before"] == real["after"] < 35
    assert "ESC_x1_DIV2K_jpeg_gray | photographs" in capsys.readouterr().out
    with Image.open(tmp_path / "out/restoration.jpg") as sheet:
        assert sheet.size == (3 * 486 - 6, 504)
