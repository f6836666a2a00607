"""The loader comparison times the same crops of every method, and measures what it says."""

import argparse
import json

import compare_loaders
import cv2
import numpy as np
import pytest
import torch
from compare_loaders import differences_of, levels, methods

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets
from esc_basicsr.data.photos import load_photograph

CROP = 128  # of ×2


@pytest.fixture
def photos(tmp_path):
    """A folder of two photographs that are large enough for ×2, and one that is not."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("coffee", 200), ("chelsea", 160), ("rocket", 100)):
        cv2.imwrite(str(folder / f"{name}.png"), load_photograph(name)[:size, :size, ::-1])
    return folder


def arguments(*given):
    parser = argparse.ArgumentParser()
    compare_loaders.add_arguments(parser)
    return parser.parse_args([*map(str, given), "--samples", "4", "--batch", "2", "--repeats", "1"])


def test_comparison_writes_rates_and_differences_of_every_way_and_a_picture(photos, tmp_path, capsys):
    threads = torch.get_num_threads()
    args = arguments("--photos", photos, "--scales", "2", "-o", tmp_path / "out")
    assert compare_loaders.run(args) == 0
    assert torch.get_num_threads() == threads
    result = json.loads((tmp_path / "out/loader.json").read_text())
    assert result["settings"]["records"] == 2 and result["settings"]["machine"]["threads"] == 1
    sizes = result["settings"]["bytes_per_record"]
    assert sizes["stored"] > sizes["compressed"] > 0
    rows = {row["method"]: row for row in result["rows"]}
    assert len(rows) == 6 and all(row["samples_per_second"] > 0 for row in rows.values())
    assert rows[compare_loaders.PLAIN]["times_plain"] == 1
    assert rows[compare_loaders.STORED]["from_ours"]["largest"] == 0
    assert rows[compare_loaders.ON_DEVICE]["from_ours"]["largest"] <= 1
    assert 0 < rows[compare_loaders.STORED]["from_plain"]["mean"] < 1
    assert f"| ×2 | {compare_loaders.STORED} |" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "out/loader.png")) is not None


def test_every_way_gives_the_same_hr(tmp_path):
    photographs = {"coffee": load_photograph("coffee")[:200, :180]}
    folders = {
        level: build_lmdb_sets(photographs, tmp_path, f"x{level}", crop_size=0, compression=level)[1]
        for level in (0, 1)
    }
    compared = methods(folders, 2, samples=4, batch=2)
    del compared[compare_loaders.HR_ALONE]
    results = [levels(method) for method in compared.values()]
    for lq, gt in results:
        assert lq.shape == (4, 3, CROP // 2, CROP // 2)
        assert torch.equal(gt, results[0][1])


def test_plain_lr_is_pillows_and_ours_but_for_rounding_off_the_border(tmp_path):
    photographs = {"coffee": load_photograph("coffee")[:200, :180]}
    path = build_lmdb_sets(photographs, tmp_path, "x", crop_size=0)[1]
    compared = methods({0: path, 1: path}, 2, samples=4, batch=2)
    difference = differences_of(
        levels(compared[compare_loaders.PLAIN])[0], levels(compared[compare_loaders.STORED])[0]
    )
    assert difference["inner_largest"] <= 2 and 0 < difference["inner_mean"] < 0.25


def test_differences_are_counted_in_levels():
    lq = torch.full((1, 1, 10, 10), 7)
    other = lq.clone()
    other[..., 0, 0], other[..., 5, 5] = 2, 8
    found = differences_of(lq, other)
    assert found["largest"] == 5 and found["inner_largest"] == 1
    assert (found["differing"], found["values"]) == (2, 100)
    np.testing.assert_allclose([found["mean"], found["inner_mean"]], [0.06, 1 / 36])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--scales", "4"], "no image is as large as an HR crop, 256×256"),
        (["--scales", "2", "--repeats", "0"], "--repeats must be at least 1, got 0"),
    ],
)
def test_mistakes_are_told(photos, given, message):
    args = arguments("--photos", photos, *given)
    if "--repeats" in given:
        args.repeats = 0
    with pytest.raises(UserError, match=message):
        compare_loaders.run(args)
