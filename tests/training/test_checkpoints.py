"""Checkpoints: written whole, found, verified, kept as many as asked for."""

import errno
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esc_basicsr.common.errors import UserError
from esc_basicsr.training import checkpoints


@pytest.fixture
def experiment(tmp_path: Path) -> dict[str, Any]:
    """Options of an experiment with states and weights of iterations 5, 10 and 100, to be resumed."""
    path = {name: str(tmp_path / name) for name in ("models", "training_states")}
    for folder in path.values():
        Path(folder).mkdir()
    for iteration in (5, 10, 100):
        state = {"epoch": 0, "iter": iteration, "optimizers": [], "schedulers": []}
        torch.save(state, tmp_path / "training_states" / f"{iteration}.state")
        torch.save({"params": {"weight": torch.ones(9)}}, tmp_path / "models" / f"net_g_{iteration}.pth")
    (tmp_path / "training_states" / "notes.state").touch()
    return {"network_g": {}, "auto_resume": True, "name": "run", "path": {**path, "resume_state": None}}


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop_optimizers(file: Path) -> None:
    torch.save({"epoch": 0, "iter": 100}, file)


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("training_states/100.state", cut_short, r"100.state: not a readable training state: it is cut short"),
    ("training_states/100.state", lambda file: file.write_bytes(b""), "100.state: not a readable training"),
    (
        "training_states/100.state",
        drop_optimizers,
        "100.state: not a training state, which holds epoch, iter",
    ),
    ("models/net_g_100.pth", cut_short, r"100.state: the weights .* cannot be used: .*net_g_100.pth: not a"),
    ("models/net_g_100.pth", Path.unlink, r"100.state: the weights .*net_g_100.pth, are missing"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_auto_resume_passes_over_a_damaged_state_and_names_it(
    experiment: dict[str, Any],
    tmp_path: Path,
    esc_log: list[str],
    name: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    damage(tmp_path / name)
    assert checkpoints.load_resume_state(experiment)["iter"] == 10
    assert experiment["path"]["resume_state"] == str(tmp_path / "training_states" / "10.state")
    assert experiment["path"]["pretrain_network_g"] == str(tmp_path / "models" / "net_g_10.pth")
    assert re.search(message, esc_log[0])
    # what the abandoned run would be resumed from does not stand in the way
    is_there = (tmp_path / "training_states" / "100.state").exists()
    assert not is_there
    assert (tmp_path / "training_states" / "100.state.abandoned").exists()


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damaged_state_of_the_options_is_refused(
    experiment: dict[str, Any], tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(tmp_path / name)
    experiment["auto_resume"] = False
    experiment["path"]["resume_state"] = str(tmp_path / "training_states" / "100.state")
    with pytest.raises(UserError, match=message):
        checkpoints.load_resume_state(experiment)


def test_missing_state_of_the_options_is_refused(experiment: dict[str, Any]) -> None:
    experiment |= {"auto_resume": False, "path": {**experiment["path"], "resume_state": "none.state"}}
    with pytest.raises(UserError, match=r"none.state: there is no such training state"):
        checkpoints.load_resume_state(experiment)


def test_auto_resume_takes_the_newest_state(experiment: dict[str, Any], esc_log: list[str]) -> None:
    assert checkpoints.load_resume_state(experiment)["iter"] == 100
    assert experiment["resume"] == {"epoch": 0, "iter": 100}
    assert esc_log == []


def test_auto_resume_does_not_start_anew_where_every_state_is_damaged(
    experiment: dict[str, Any], tmp_path: Path, esc_log: list[str]
) -> None:
    for iteration in (5, 10, 100):
        cut_short(tmp_path / "training_states" / f"{iteration}.state")
    with pytest.raises(UserError, match=r"none of the 3 training states in .*training_states can be resumed"):
        checkpoints.load_resume_state(experiment)
    assert [re.findall(r"\d+.state", message) for message in esc_log] == [
        [f"{iteration}.state"] for iteration in (100, 10, 5)
    ]


def test_auto_resume_of_an_experiment_without_states_takes_the_one_of_the_options(
    experiment: dict[str, Any], tmp_path: Path
) -> None:
    other = str(tmp_path / "training_states" / "5.state")
    experiment["path"] |= {"training_states": str(tmp_path / "none"), "resume_state": other}
    assert checkpoints.load_resume_state(experiment)["iter"] == 5
    experiment["path"]["resume_state"] = None
    assert checkpoints.load_resume_state(experiment) is None


def test_weights_that_are_not_to_be_resumed_may_be_missing(
    experiment: dict[str, Any], tmp_path: Path
) -> None:
    experiment["network_identity"] = {}
    experiment["path"]["ignore_resume_networks"] = ["network_identity"]
    assert checkpoints.load_resume_state(experiment)["iter"] == 100


def test_full_disk_is_reported_and_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "1.state"
    checkpoints.write_torch(file, {"iter": 1})
    before = file.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"1\.state cannot be written: No space left on device"):
        checkpoints.write_torch(file, {"iter": 2})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["1.state"]


def test_new_experiment_is_not_begun_over_one_with_states(experiment: dict[str, Any]) -> None:
    """BasicSR archives the folder: the next --auto_resume finds nothing, and starts at 0."""
    experiment |= {"auto_resume": False}
    experiment["path"]["experiments_root"] = "experiments/run"
    with pytest.raises(UserError, match=r"experiments/run .* at iteration 100. Add --auto_resume"):
        checkpoints.load_resume_state(experiment)
    experiment["name"] = "debug_run"
    assert checkpoints.load_resume_state(experiment) is None


@pytest.mark.parametrize(
    "state",
    [
        {"epoch": 0, "iter": "../100", "optimizers": [], "schedulers": []},
        {"epoch": 0, "iter": True, "optimizers": [], "schedulers": []},
        {"epoch": "a", "iter": 100, "optimizers": [], "schedulers": []},
        {"epoch": 0, "iter": 100, "optimizers": 1, "schedulers": []},
        {"epoch": 0, "iter": 100, "optimizers": [], "schedulers": [], "data": {"samples": 3}},
        {"epoch": 0, "iter": 100, "optimizers": [], "schedulers": [], "data": []},
        {"epoch": 0, "iter": 100, "optimizers": [], "schedulers": [], "sha256": {"net_identity_100.pth": 1}},
        {"epoch": 1 << 70, "iter": 100, "optimizers": [], "schedulers": []},
        {"epoch": 0, "iter": 100, "optimizers": [], "schedulers": [], "skipped": {"in_all": "x"}},
        {
            "epoch": 0,
            "iter": 100,
            "optimizers": [],
            "schedulers": [],
            "metrics": {"history": [], "best": 1.0},
        },
        {
            "epoch": 0,
            "iter": 100,
            "optimizers": [],
            "schedulers": [],
            "metrics": {"history": [{}], "best": {}},
        },
        [],
    ],
)
def test_state_of_another_content_is_passed_over(
    experiment: dict[str, Any], tmp_path: Path, esc_log: list[str], state: Any
) -> None:
    torch.save(state, tmp_path / "training_states" / "100.state")
    assert checkpoints.load_resume_state(experiment)["iter"] == 10
    assert "100.state: not a training state" in esc_log[0]


@pytest.mark.parametrize(
    ("found", "own", "where"),
    [
        ({"a": [1, {"b": "x"}]}, {"a": [1, {"b": 2}]}, "state.a.1"),
        ({"a": float("nan")}, {"a": 0.5, "b": "x"}, "state.a"),
        ({"a": torch.zeros(2)}, {"a": 1.0, "b": "x"}, "state.a"),
        ([True, None], [False, 1], "state.1"),
        ([1, 2, "x"], [1, 2], "state"),
        ([[], []], [[]], "state"),
        ({"a": 1, "b": "x"}, {"a": 1}, "state"),
        (7, {}, "state"),
    ],
)
def test_part_of_a_state_of_another_form_is_reported_with_its_position(
    found: Any, own: Any, where: str
) -> None:
    with pytest.raises(ValueError, match=f"^{where} is not what it should be$"):
        checkpoints.check_form(found, own, "state")


def test_part_of_a_state_may_differ_in_numbers() -> None:
    own = {"lr": 1, "betas": (0.9, 0.9), "milestones": [5], "counts": {3: 1}, "foreach": None, "more": {}}
    found = {
        "lr": 0.5,
        "betas": [0.5, 0],
        "milestones": [5, 9],
        "counts": {8: 2, 9: 1},
        "foreach": None,
        "x": "y",
    }
    checkpoints.check_form(found, own, "state")


def test_position_beyond_the_random_numbers_is_refused() -> None:
    state = checkpoints.random_state()
    state["numpy"][2] = 10**6
    with pytest.raises(ValueError, match="random numbers at 1000000 of 624"):
        checkpoints.restore_random_state(state)


def test_random_state_brings_the_same_numbers_again() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    np.random.randn()  # an odd number of normals: NumPy keeps the next one
    state = checkpoints.random_state()
    drawn = draw()
    checkpoints.restore_random_state(state)
    assert draw() == drawn
