"""A network that is put among those that ship can be had by its name, with the figures of its test."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ship_network as ship
import torch

from esc_basicsr.__main__ import main
from esc_basicsr.archs.variants import build_variant
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.upscale import Upscaler
from esc_basicsr.weights import shipped as pretrained
from esc_basicsr.weights.shipped import load_network, model_list

RESULTS = """\
method,trained_on,figures_from,same_network,Set5 psnr,Set5 ssim,mine psnr,mine ssim
ours,,measured,yes,33.5,0.9,31.123456,0.8
ESC-light,DIV2K,arXiv:2503.06671,yes,38.24,0.96,,
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in which nothing ships."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "models.json").write_text("{}")
    monkeypatch.setattr(pretrained, "_FOLDER", folder)
    monkeypatch.setattr(ship, "_FOLDER", folder)
    # the list is read once in a process
    monkeypatch.setattr(ship, "model_list", model_list.__wrapped__)
    monkeypatch.setattr(pretrained, "model_list", model_list.__wrapped__)
    return folder


@pytest.fixture
def put(tmp_path: Path, package: Path) -> Callable[..., int]:
    torch.save({"params": build_variant("ESC-light", 3).state_dict()}, tmp_path / "trained.pth")
    (tmp_path / "results.csv").write_text(RESULTS)
    exported = tmp_path / "ESC-light_x3.safetensors"
    assert main(["export", str(tmp_path / "trained.pth"), "-o", str(exported), "--precision", "fp16"]) == 0

    def run(file: Path = exported, results: Path = tmp_path / "results.csv") -> int:
        arguments = [file, "--results", results, "--data", "photographs", "--licence", "CC BY 4.0"]
        return run_command("ship_network", [*map(str, arguments)], prog="ship")

    return run


def test_it_is_listed_loaded_by_name_and_the_default_of_its_scale(
    tmp_path: Path, package: Path, put: Callable[..., int]
) -> None:
    assert put() == 0
    (entry,) = json.loads((package / "models.json").read_text()).values()
    assert entry["psnr"] == {"Set5": 33.5, "mine": 31.1235}
    trained = load_network("ESC-light_x3")
    assert (trained.variant, trained.scale) == ("ESC-light", 3)
    exact = load_network(tmp_path / "trained.pth").network.state_dict()
    for key, value in trained.network.state_dict().items():
        torch.testing.assert_close(value, exact[key].half().float(), rtol=0, atol=0)
    assert Upscaler(scale=3)(np.zeros((4, 5, 3), np.uint8)).shape == (12, 15, 3)
    with pytest.raises(UserError, match="No trained network of scale ×2 ships"):
        Upscaler(scale=2)
    (package / "ESC-light_x3.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="is damaged: install esc_basicsr anew"):
        load_network("ESC-light_x3")


def test_what_cannot_ship_is_told(
    tmp_path: Path,
    package: Path,
    put: Callable[..., int],
    tiny_network: dict,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert put(file=tmp_path / "trained.pth") == 2
    assert "is no .safetensors file" in capsys.readouterr().err
    assert put(results=tmp_path / "none.csv") == 2
    assert "cannot be read as a table" in capsys.readouterr().err
    (tmp_path / "other.csv").write_text("a,figures_from\n1,measured\n")
    assert put(results=tmp_path / "other.csv") == 2
    assert "has no PSNR that was measured" in capsys.readouterr().err
    (tmp_path / "two.csv").write_text(RESULTS + RESULTS.splitlines()[1])
    assert put(results=tmp_path / "two.csv") == 2
    assert "expected the results of one test, found 2" in capsys.readouterr().err
    assert [path.name for path in package.iterdir()] == ["models.json"]
