"""The ablation's short training: rows as their option files have them, one start, the same batches."""

import argparse
import json
from pathlib import Path

import compare_ablation
import cv2
import pytest
import torch
import yaml
from compare_ablation import POINTS, SMALL, Row, draw, markdown, networks

from esc_basicsr.commands.benchmark_set import lay_out_benchmark
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets
from esc_basicsr.data.photos import load_photograph
from esc_basicsr.options.recipes import ABLATION, option_files


def arguments(*given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compare_ablation.add_arguments(parser)
    return parser.parse_args(list(map(str, given)))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        compare_ablation, "SMALL", {**SMALL, "dim": 16, "pdim": 4, "n_blocks": 1, "conv_blocks": 1}
    )


def test_rows_are_trained_and_measured_in_turn(
    tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph = load_photograph("coffee")[:64, :64]
    lmdb = build_lmdb_sets({"coffee": photograph}, tmp_path, "coffee", crop_size=0)[1]
    (tmp_path / "originals").mkdir()
    cv2.imwrite(str(tmp_path / "originals/one.png"), photograph)
    lay_out_benchmark(tmp_path / "originals", tmp_path / "sets/Urban100", [2])
    rows = ["kernel9", "ESC"]
    given = ["--rows", *rows, "--small", "--patch", 8, "--batch", 1, "--iterations", POINTS]
    given += ["--train", lmdb, "--data", tmp_path / "sets", "--val", "Urban100", "-o", tmp_path / "out"]
    assert compare_ablation.run(arguments(*given)) == 0
    results = json.loads((tmp_path / "out/ablation-training.json").read_text())
    assert [row["name"] for row in results["rows"]] == rows
    assert results["moments"] == list(range(1, POINTS + 1))
    for row in results["rows"]:
        assert len(set(row["psnr"]["Urban100"])) == POINTS  # it learns
        assert row["seconds"] > 0
    ends = {row["name"]: row["psnr"]["Urban100"][-1] for row in results["rows"]}
    apart = f"{ends['kernel9'] - ends['ESC']:+.2f} dB (-0.04)"  # what the paper has: 33.42 against 33.46
    assert f"| {ends['kernel9']:.2f} dB | {apart} |" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "out/ablation-training.png")) is not None


def test_rows_are_those_of_the_option_files() -> None:
    texts = {path.stem: text for path, text in option_files().items() if path.parts[0] == "train"}
    rows = networks(["ESC", *ABLATION], small=False)
    assert len({str(network) for network in rows.values()}) == 8
    for name, network in rows.items():
        file = "_".join(["ESC_x2_DIV2K", *([name] if name in ABLATION else [])])
        written = yaml.safe_load(texts[file])["network_g"]
        assert {**written, **network} == written


def test_small_rows_keep_what_makes_them_rows() -> None:
    small = networks(["ESC", *ABLATION], small=True)
    for name, (changes, _) in ABLATION.items():
        assert {**small[name], **changes} == small[name]
    assert len({str(network) for network in small.values()}) == 8


def test_table_without_esc_has_no_differences() -> None:
    rows = [Row("window16", 5, 0.5, {"photographs": [20.0, 30.0]})]
    assert markdown(rows).splitlines()[2:] == ["| window16 | 5 | 0.50 | 30.00 dB |  |"]
    assert draw(rows, [1, 2]).axes[1].lines[:] == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--iterations", 9), "--iterations must be at least 10"),
        (("--batch", 0), "--batch must be at least 1, got 0"),
        (("--device", "cuda"), "--device cuda: this machine has no GPU"),
        (("--val", "Set5"), "--val names test sets of a folder: give it by --data"),
        (("--data", "nowhere"), "--data nowhere: Set5 does not exist as HR/X2"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[object, ...], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        compare_ablation.run(arguments("-o", tmp_path / "out", *given))
    assert not (tmp_path / "out").exists()
