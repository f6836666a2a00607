"""Training that is ended at the worst moments, and ends as one that was not."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import checkpoint, live, paired, same, training_options, write, write_images

RESUME = ["--auto_resume"]
ITERATIONS = 12
# An epoch is four iterations; checkpoints every two, validations every three.
ENDS: list[dict[str, Any]] = [
    {"at": "weights", "count": 1, "signal": "SIGKILL"},  # of iteration 2, the first checkpoint
    {"at": "step", "count": 4, "signal": "SIGKILL"},  # in iteration 4, begun anew
    {"at": "state", "count": 1, "signal": "SIGKILL"},  # iteration 4 has weights and no state
    {"at": "weights", "count": 2, "signal": "SIGKILL"},  # in the state of iteration 4
    {"at": "test", "count": 2, "signal": "SIGKILL"},  # in the validation of iteration 3
    {"at": "step", "count": 3, "signal": "SIGTERM"},
    {"at": "test", "count": 1, "signal": "SIGTERM"},  # in the validation of iteration 6, its state written
    {"at": "step", "count": 1, "signal": "SIGKILL"},  # after that validation, made up for
    {"at": "step", "count": 1, "signal": "SIGINT"},
    {
        "at": "test",
        "count": 2,
        "signal": "SIGTERM",
    },  # in that of iteration 9, which has no checkpoint
]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("data")
    write_images(data / "train", count=9, height=32, width=40)
    write_images(data / "val", count=2, height=24, width=32)
    crops = {"gt_size": 16, "use_hflip": True, "use_rot": True}
    options = training_options(paired("Train", data / "train", ".lmdb", **crops), paired("Val", data / "val"))
    options["train"] |= {"total_iter": ITERATIONS, "warmup_iter": 5}
    options["train"]["optim_g"] |= {"betas": [0.9, 0.9], "eps": 1e-8}
    options["val"] |= {"val_freq": 3}
    return options


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> Path:
    work = tmp_path_factory.mktemp("uninterrupted")
    write(work / "train.yml", options)
    (life,) = live(work, [{"arguments": []}])
    assert life["codes"] == [0], life["output"]
    return work / "experiments" / "single"


def assert_same_end(folder: Path, expected: Path) -> None:
    """Same weights, EMA, optimizer, schedule, random numbers, metrics and best records at the end."""
    ours, theirs = checkpoint(folder, ITERATIONS), checkpoint(expected, ITERATIONS)
    assert ours["state"]["sha256"].keys() == {f"net_g_{ITERATIONS}.pth"}
    for part in ours:
        for key in theirs[part]:
            assert same(ours[part][key], theirs[part][key]), (part, key)
    for name in ("latest", ITERATIONS):
        files = [root / "models" / f"net_g_{name}.pth" for root in (folder, expected)]
        assert same(*(torch.load(file, weights_only=True) for file in files))
    assert (folder / "metrics" / "history.csv").read_text() == (
        expected / "metrics" / "history.csv"
    ).read_text()


def test_run_that_is_killed_again_and_again_ends_as_one_that_was_not(
    tmp_path: Path, options: dict[str, Any], uninterrupted: Path
) -> None:
    write(tmp_path / "train.yml", options)
    lives = live(tmp_path, [{"arguments": RESUME, **end} for end in ENDS] + [{"arguments": RESUME}])
    for end, life in zip(ENDS, lives, strict=False):
        number = signal.Signals[end["signal"]]
        code = -number if end["signal"] == "SIGKILL" else 128 + number
        assert life["codes"] == [code], (end, life["output"])
        assert "Traceback" not in life["output"]
        if end["signal"] != "SIGKILL":
            assert re.search(
                rf"Stopped at iteration \d+ by {end['signal']}\. Its state is saved", life["output"]
            )
    assert lives[-1]["codes"] == [0], lives[-1]["output"]
    assert_same_end(tmp_path / "experiments" / "single", uninterrupted)
    assert not list((tmp_path / "experiments").glob("*_archived*/training_states/*"))


def test_state_that_was_not_written_whole_is_passed_over(
    tmp_path: Path, options: dict[str, Any], uninterrupted: Path
) -> None:
    """As a failing disk leaves it: truncated, or a bit of weights or state another."""
    write(tmp_path / "train.yml", options)
    end = {"at": "step", "count": 9, "signal": "SIGKILL"}
    assert live(tmp_path, [{"arguments": [], **end}])[0]["codes"] == [-signal.SIGKILL]
    folder = tmp_path / "experiments" / "single"
    newest = folder / "training_states" / "8.state"
    newest.write_bytes(newest.read_bytes()[:-100])
    for file in (folder / "training_states" / "6.state", folder / "models" / "net_g_4.pth"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    (life,) = live(tmp_path, [{"arguments": RESUME}])
    assert life["codes"] == [0], life["output"]
    passed_over = re.findall(r"passes over a state: \S+/(\d+)\.state", life["output"])
    assert passed_over == ["8", "6", "4"]
    assert "net_g_4.pth, are damaged" in life["output"]
    assert_same_end(folder, uninterrupted)


def test_starting_anew_over_an_experiment_with_states_is_refused(
    options: dict[str, Any], uninterrupted: Path
) -> None:
    """BasicSR archives the folder: the next --auto_resume finds nothing, and starts at 0."""
    (life,) = live(uninterrupted.parents[1], [{"arguments": []}])
    assert life["codes"] == [2]
    assert "at iteration 12. Add --auto_resume" in life["output"]
    assert uninterrupted.is_dir()


def test_only_as_many_checkpoints_are_kept_as_asked_for(tmp_path: Path, options: dict[str, Any]) -> None:
    write(tmp_path / "train.yml", {**options, "logger": {**options["logger"], "keep_checkpoints": 2}})
    (life,) = live(tmp_path, [{"arguments": []}])
    assert life["codes"] == [0], life["output"]
    folder = tmp_path / "experiments" / "single"
    assert {file.name for file in (folder / "training_states").iterdir()} == {"10.state", "12.state"}
    assert {file.name for file in (folder / "models").iterdir()} == {
        f"net_g_{name}.pth" for name in (10, 12, "latest")
    }


def test_two_processes_stop_together_and_resume_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    write(tmp_path / "train.yml", options)
    peaceful = ["--force_yml", "name=peaceful", "datasets:train:num_worker_per_gpu=0"]
    interrupted = ["--auto_resume", "--force_yml", "datasets:train:num_worker_per_gpu=0"]
    end = {"at": "step", "count": 5, "signal": "SIGTERM", "rank": 1}
    lives = live(
        tmp_path,
        [
            {"arguments": peaceful, "ranks": 2},
            {"arguments": interrupted, "ranks": 2, **end},
            {"arguments": interrupted, "ranks": 2},
        ],
    )
    assert [life["codes"] for life in lives] == [[0, 0], [143, 143], [0, 0]], lives
    assert lives[1]["output"].count("Stopped at iteration 5") == 1
    assert_same_end(tmp_path / "experiments" / "single", tmp_path / "experiments" / "peaceful")
