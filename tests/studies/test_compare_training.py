"""The comparison of trainings starts them alike, feeds them alike, and measures what it says."""

import argparse
import json
from pathlib import Path
from typing import Any

import compare_training
import cv2
import numpy as np
import pytest
import torch
from compare_losses import NETWORK
from compare_training import RUNS, Row, build, markdown, options_of, smooth

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.options.schema import SECTIONS

SMALL = {"type": "ESC", **NETWORK, "dim": 16, "pdim": 4, "conv_blocks": 1, "kernel_size": 5}
CPU = torch.device("cpu")


def arguments(*given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compare_training.add_arguments(parser)
    return parser.parse_args(list(map(str, given)))


def test_comparison_writes_figures_losses_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_training, "NETWORK", SMALL)
    photograph = {"coffee": load_sample_image("coffee")[:64, :64]}
    lmdb = build_lmdb_sets(photograph, tmp_path, "coffee", crop_size=0)[1]
    runs = ["float32", "accumulate-4", "channels_last", "release", "bf16", "other-start"]
    sizes = ("--patch", 8, "--batch", 4, "--iterations", 7)
    args = arguments("-o", tmp_path / "out", "--train", lmdb, *sizes, "--runs", *runs)
    assert compare_training.run(args) == 0
    results = json.loads((tmp_path / "out/training-speed.json").read_text())
    rows = {row["run"]: row for row in results["rows"]}
    assert list(rows) == runs
    assert {len(losses) for losses in results["losses"].values()} == {7}
    assert all(row["seconds"] > 0 and row["memory"] is None for row in rows.values())
    assert rows["float32"]["largest"] == 0
    for name in ("accumulate-4", "channels_last", "release"):  # the same training but for the order of sums
        assert rows[name]["largest"] < 1e-4
        assert rows[name]["loss"] == pytest.approx(rows["float32"]["loss"], rel=1e-4)
    assert 1e-6 < rows["bf16"]["largest"] < 0.05
    assert rows["other-start"]["mean"] > rows["bf16"]["mean"]
    assert cv2.imread(str(tmp_path / "out/training-speed.png")) is not None
    assert f"| {rows['bf16']['loss']:.5f} | {rows['bf16']['largest']:.1e} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--iterations", 5), "--iterations must be above 5"),
        (("--batch", 0), "--batch must be at least 1, got 0"),
        (("--patch", 0), "--patch must be at least 1, got 0"),
        (("--device", "cuda"), "--device cuda: this machine has no GPU"),
        (("--train", "nowhere.lmdb"), "nowhere.lmdb"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[Any, ...], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        compare_training.run(arguments("-o", tmp_path / "out", *given))
    assert not (tmp_path / "out").exists()


def test_runs_differ_by_options_that_users_have() -> None:
    for changes in RUNS.values():
        for section, options in {"": changes, "train": changes.get("train", {})}.items():
            for key, value in options.items():
                if key not in ("train", "manual_seed"):
                    assert SECTIONS[section][key].kind.accepts(value)


def test_all_start_from_the_same_weights_but_the_one_that_should_not() -> None:
    first = build(options_of("float32", SMALL, 2, 10, CPU)).net_g.state_dict()
    for run in ("bf16", "accumulate-4", "channels_last", "release", "other-start"):
        weights = build(options_of(run, SMALL, 2, 10, CPU)).net_g.state_dict()
        pairs = [(weights[key], value) for key, value in first.items()]
        assert all(torch.equal(*pair) for pair in pairs) is (run != "other-start")


def test_smoothed_losses_are_means_of_25() -> None:
    losses = np.random.default_rng(0).random(60)
    np.testing.assert_allclose(smooth(losses), [losses[i : i + 25].mean() for i in range(36)])
    np.testing.assert_allclose(smooth(losses[:7]), [losses[:7].mean()])


def test_table_relates_each_row_to_the_first() -> None:
    rows = [Row("float32", 0.5, None, 0.05, 0.0, 0.0), Row("compile", 0.25, 3 << 20, 0.051, 2e-4, 1e-4)]
    assert markdown(rows).splitlines()[2:] == [
        "| float32 | 2.00 | 1.00 |  | 0.05000 |  |  |",
        "| compile | 4.00 | 2.00 | 3 MiB | 0.05100 | 2.0e-04 | 1.0e-04 |",
    ]
