"""One training on one process or several: the same batch, the same steps, the same decisions."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import checkpoint, live, paired, training_options, write, write_images


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Steps of plain gradient descent, which do not magnify rounding."""
    data = tmp_path_factory.mktemp("data")
    write_images(data / "train", count=9, height=32, width=40)
    write_images(data / "val", count=3, height=24, width=32)
    crops = {"gt_size": 16, "use_hflip": True, "use_rot": True, "global_batch_size": 4}
    options = training_options(paired("Train", data / "train", ".lmdb", **crops), paired("Val", data / "val"))
    options["datasets"]["train"] |= {"batch_size_per_gpu": 1, "num_worker_per_gpu": 0}
    options["train"]["max_skipped"] = 2
    return options


def losses(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"l_pix: (\S+)", output)]


def test_global_batch_makes_the_same_steps_on_1_2_and_4_processes(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    write(tmp_path / "train.yml", options)
    counts = (1, 2, 4)
    lives = live(
        tmp_path,
        [
            {"arguments": ["--force_yml", f"name=on{ranks}"], **({"ranks": ranks} if ranks > 1 else {})}
            for ranks in counts
        ],
    )
    assert [life["codes"] for life in lives] == [[0] * ranks for ranks in counts], lives
    for ranks, life in zip(counts, lives, strict=True):
        assert f"Batch: 4 = {ranks} processes × {4 // ranks}, in {4 // ranks} passes each" in life["output"]
        assert len(losses(life["output"])) == 4
        np.testing.assert_allclose(losses(life["output"]), losses(lives[0]["output"]), rtol=1e-4)
    one, *others = (checkpoint(tmp_path / "experiments" / f"on{ranks}", 4) for ranks in counts)
    start = checkpoint(tmp_path / "experiments" / "on1", 2)
    for other in others:
        for kind in ("params", "params_ema"):
            weights = one["weights"][kind]
            torch.testing.assert_close(other["weights"][kind], weights, rtol=1e-5, atol=1e-6)
            moved = max(float((weights[key] - start["weights"][kind][key]).abs().max()) for key in weights)
            assert moved > 1e-4  # far beyond the tolerance
        assert other["state"]["data"] == one["state"]["data"]
        for ours, theirs in zip(
            other["state"]["metrics"]["history"], one["state"]["metrics"]["history"], strict=True
        ):
            assert ours == pytest.approx(theirs, abs=2e-3)  # the images are rounded to 8 bits


def test_step_of_a_loss_that_is_no_number_on_one_rank_is_skipped_on_all(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    write(tmp_path / "train.yml", options)
    spoilt = {"at": "loss", "count": [3], "rank": 1}  # of two passes an iteration
    (life,) = live(tmp_path, [{"arguments": [], "ranks": 2, **spoilt}])
    assert life["codes"] == [0, 0], life["output"]
    (warning,) = re.findall(
        r"Iteration (\d): the loss is not finite; .*\((.*)\)\. Samples: (.*)", life["output"]
    )
    assert warning[:2] == ("2", "1 in a row, 1 in all")
    assert len(warning[2].split(", ")) == 4
    logged = losses(life["output"])
    assert [np.isfinite(loss) for loss in logged] == [True, False, True, True]
    assert life["output"].count("skipped: 1.0000e+00") == 3
    state = checkpoint(tmp_path / "experiments" / "single", 4)["state"]
    assert state["skipped"] == {"in_all": 1, "in_a_row": 0}
    assert {int(entry["step"]) for entry in state["optimizers"][0]["state"].values()} == {3}


def test_too_many_such_steps_in_a_row_end_training_and_name_the_last_good_state(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    write(tmp_path / "train.yml", options)
    spoilt = {"at": "loss", "count": [5, 7], "rank": 1}
    (life,) = live(tmp_path, [{"arguments": [], "ranks": 2, **spoilt}])
    assert life["codes"] == [2, 2], life["output"]
    assert "Traceback" not in life["output"]
    assert (
        "Iteration 4: the loss was not finite for 2 steps in a row (train.max_skipped: 2)." in life["output"]
    )
    assert "training_states/2.state" in life["output"]
    weights = checkpoint(tmp_path / "experiments" / "single", 2)["weights"]["params"]
    assert all(value.isfinite().all() for value in weights.values())
