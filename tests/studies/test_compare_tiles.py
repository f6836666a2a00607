"""What tiles cost is measured on whole photographs, and written down."""

import json
from pathlib import Path

import compare_tiles
import numpy as np
import pytest
import torch

from esc_basicsr.archs.variants import NETWORKS
from esc_basicsr.common.command_line import run_command


def run(*arguments: object) -> int:
    module = "compare_tiles"
    return run_command(module, [*map(str, arguments)], prog="compare_tiles")


@pytest.fixture
def model(tmp_path: Path, tiny_network: dict, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose network looks at all of the image, and small photographs."""
    load = compare_tiles.load_photograph
    monkeypatch.setattr(compare_tiles, "load_photograph", lambda name: load(name)[:61, :81])
    monkeypatch.setattr(compare_tiles, "IMAGES", ("coffee", "astronaut"))
    network = NETWORKS[tiny_network.pop("type")](**tiny_network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    torch.save({"params": network.state_dict()}, tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def test_aligned_tiles_are_compared_with_plain_ones_and_with_row_chunks(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", model, "--windows", 1, 2, "-o", tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "tiles.json").read_text())["rows"]
    assert len(rows) == 2 * (1 + 2 * 2)
    to_whole = {(row["method"], row["image"]): row["psnr_to_whole"] for row in rows}
    for name in ("coffee", "astronaut"):
        assert to_whole["row chunks", name] > 80  # roundings of a float apart
        assert to_whole["tiles of 4", name] < to_whole["tiles of 8", name] < to_whole["row chunks", name]
    plain = np.mean([row["psnr_to_whole"] for row in rows if row["method"] == compare_tiles.PLAIN])
    aligned = np.mean([row["psnr_to_whole"] for row in rows if row["method"].startswith("tiles")])
    assert plain < aligned
    assert (tmp_path / "out" / "tiles.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert said.strip() == (tmp_path / "out" / "tiles.md").read_text().strip()
    assert "| plain tiles of the same memory as tiles of 8 |" in said


def test_sides_of_no_tile_are_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", model, "--windows", 0) == 2
    assert "--windows must be at least 1" in capsys.readouterr().err
