"""The entry points as users call them: train, resume, test; one process and several; BasicSR's own script."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import basicsr.train
import cv2
import numpy as np
import pytest
import torch
from tiny_training import paired, start_python, training_options, write, write_images

from esc_basicsr.__main__ import main
from esc_basicsr.basicsr_host import parse, patches
from esc_basicsr.common.version import __version__
from esc_basicsr.options.schema import filled

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def succeed(process: "subprocess.Popen[str]") -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Complete train options over four images of one crop's size, without augmentation."""
    data = tmp_path_factory.mktemp("data")
    write_images(data / "train", count=4, height=32, width=32)
    write_images(data / "val", count=2, height=24, width=32)
    augmentation = {"gt_size": 32, "use_hflip": False, "use_rot": False}
    return training_options(
        paired("Train", data / "train", ".lmdb", **augmentation), paired("Val", data / "val")
    )


def options_for_testing(options: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    keys = ("model_type", "scale", "num_gpu", "manual_seed", "network_g", "dist_params")
    return {
        "name": "tested",
        **{key: options[key] for key in keys},
        "datasets": {"test_1": options["datasets"]["val"]},
        "path": {"pretrain_network_g": checkpoint, "param_key_g": "params_ema", "strict_load_g": True},
        "val": {**options["val"], "save_img": True, "suffix": None},
    }


class Runs:
    """What was trained, where, and what was said."""

    def __init__(self, work: Path, options: dict[str, Any]) -> None:
        self.work = work
        file = write(work / "train.yml", options)
        two = ["name=two", "datasets:train:batch_size_per_gpu=1"]
        single = start_python("-m", "esc_basicsr.train", "-opt", file, cwd=work)
        double = start_python(
            *(
                *TORCHRUN,
                2,
                "-m",
                "esc_basicsr.train",
                "-opt",
                file,
                "--launcher",
                "pytorch",
                "--force_yml",
                *two,
            ),
            cwd=work,
        )
        self.single, self.double = succeed(single), succeed(double)

        # The state after two iterations, to go on from: as a command, and by BasicSR's own script elsewhere.
        self.copy_of_first_half(work / "experiments" / "resumed")
        # and one that a full disk, or a process killed without our mends, cut short
        whole = (work / "experiments" / "single" / "training_states" / "2.state").read_bytes()
        (work / "experiments" / "resumed" / "training_states" / "3.state").write_bytes(whole[:1000])
        self.stock = work / "stock"
        self.copy_of_first_half(self.stock / "experiments" / "single")
        (self.stock / "basicsr").mkdir()
        script = self.stock / "basicsr" / "train.py"
        script.write_text("import esc_basicsr\n" + Path(str(basicsr.train.__file__)).read_text())
        (self.stock / "elsewhere").mkdir()
        test_file = write(
            work / "test.yml", options_for_testing(options, "experiments/single/models/net_g_latest.pth")
        )
        resumed = start_python(
            *("-m", "esc_basicsr", "train", "-opt", file, "--auto_resume", "--force_yml", "name=resumed"),
            cwd=work,
        )
        stock = start_python(
            *(script, "-opt", file, "--auto_resume", "--local-rank=0"), cwd=self.stock / "elsewhere"
        )
        tested = start_python(
            *(*TORCHRUN, 1, "-m", "esc_basicsr.test", "-opt", test_file, "--launcher", "pytorch"), cwd=work
        )
        self.resumed, self.stock_output, self.tested = succeed(resumed), succeed(stock), succeed(tested)

    def copy_of_first_half(self, target: Path) -> None:
        shutil.copytree(self.work / "experiments" / "single", target)
        for file in target.glob("*/*"):
            if "2" not in file.name:
                file.unlink()

    def weights(self, name: str, iteration: int | str, root: Path | None = None) -> dict[str, Any]:
        folder = (root or self.work) / "experiments" / name / "models"
        return torch.load(folder / f"net_g_{iteration}.pth", weights_only=True)

    def state(self, name: str, iteration: int, root: Path | None = None) -> dict[str, Any]:
        folder = (root or self.work) / "experiments" / name / "training_states"
        return torch.load(folder / f"{iteration}.state", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> Runs:
    return Runs(tmp_path_factory.mktemp("work"), options)


def losses(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"l_pix: (\S+)", output)]


def psnr(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"# psnr: (\S+)", output)]


def test_training_writes_checkpoints_states_and_logs_under_the_working_directory(runs: Runs) -> None:
    root = runs.work / "experiments" / "single"
    assert {file.name for file in (root / "models").iterdir()} == {f"net_g_{n}.pth" for n in (2, 4, "latest")}
    assert {file.name for file in (root / "training_states").iterdir()} == {"2.state", "4.state"}
    assert list((runs.work / "tb_logger" / "single").glob("events.*"))
    assert "esc_basicsr/train.py -opt" in (root / "train.yml").read_text()  # the command
    # the schedule: halved after three iterations
    assert re.findall(r"lr:\((\S+?),", runs.single) == ["1.000e-02"] * 3 + ["5.000e-03"]
    # an epoch is two iterations: each sees every image once
    seen = losses(runs.single)
    assert sum(seen[2:]) < sum(seen[:2])


def test_log_says_once_what_was_patched(runs: Runs) -> None:
    names = ", ".join(patch.name for patch in patches.active())
    line = f"INFO: esc_basicsr {__version__} patches of this BasicSR: {names}\n"
    for output in (runs.single, runs.double, runs.resumed, runs.tested):
        assert output.count(line) == 1
    (log,) = (runs.work / "experiments" / "two").glob("train_two_*.log")
    assert log.read_text().count(line) == 1


def test_testing_offers_no_resumption(capsys: pytest.CaptureFixture[str]) -> None:
    for name, offered in (("train", True), ("test", False)):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert ("--auto_resume" in capsys.readouterr().out) is offered


def test_two_processes_agree_with_one_on_the_same_global_batch(runs: Runs) -> None:
    start = runs.weights("single", 2)["params"]
    for iteration in (2, 4):
        one, two = runs.weights("single", iteration), runs.weights("two", iteration)
        for kind in ("params", "params_ema"):
            torch.testing.assert_close(two[kind], one[kind], rtol=1e-4, atol=1e-6)
    end = runs.weights("single", 4)["params"]
    assert max(float((end[key] - start[key]).abs().max()) for key in end) > 1e-4  # far beyond the tolerance
    np.testing.assert_allclose(losses(runs.double), losses(runs.single), rtol=1e-3)
    np.testing.assert_allclose(psnr(runs.double), psnr(runs.single), atol=2e-3)


def test_auto_resume_goes_on_from_the_newest_whole_state_with_its_optimizer(runs: Runs) -> None:
    assert runs.resumed.count("3.state: not a readable training state") == 1
    assert "Resuming training from epoch: 0, iter: 2." in runs.resumed
    assert len(losses(runs.resumed)) == 2
    assert not list((runs.work / "experiments").glob("resumed_archived*"))
    state = runs.state("resumed", 4)
    assert {int(entry["step"]) for entry in state["optimizers"][0]["state"].values()} == {4}
    assert state["schedulers"][0]["last_epoch"] == runs.state("single", 4)["schedulers"][0]["last_epoch"]


def test_stock_train_script_needs_only_the_import(runs: Runs) -> None:
    """It resumes under its own root, though run from elsewhere, and ends as the command does."""
    assert "Resuming training from epoch: 0, iter: 2." in runs.stock_output
    assert not list((runs.stock / "elsewhere").iterdir())
    by_script, by_command = runs.weights("single", 4, runs.stock), runs.weights("resumed", 4)
    for kind in ("params", "params_ema"):
        torch.testing.assert_close(by_script[kind], by_command[kind], rtol=0, atol=0)


def test_testing_a_checkpoint_measures_what_training_last_validated(runs: Runs) -> None:
    assert psnr(runs.tested) == psnr(runs.single)[-1:]
    pictures = runs.work / "results" / "tested" / "visualization" / "Val"
    assert sorted(file.name for file in pictures.iterdir()) == ["0_tested.png", "1_tested.png"]
    assert cv2.imread(str(pictures / "0_tested.png")).shape == (24, 32, 3)


def test_options_mistake_under_torchrun_is_told_once_and_ends_every_rank(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    file = write(tmp_path / "train.yml", options)
    process = start_python(
        *(*TORCHRUN, 2, "-m", "esc_basicsr.train", "-opt", file, "--launcher", "pytorch"),
        *("--force_yml", "train:ema_dekay=0.9"),
        cwd=tmp_path,
    )
    output = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert output.count("train.ema_dekay: unknown key") == 1
    assert "ema_decay" in output
    # each rank exits with 2 by itself, unless torchrun, seeing the first one end, is quicker to end it
    assert {"2"} <= set(re.findall(r"exitcode\s*: (-?\d+)", output)) <= {"2", "-15"}
    assert "esc_basicsr/basicsr_host" not in output  # no traceback of ours
    assert not (tmp_path / "experiments").exists()


@pytest.fixture
def command(
    tmp_path: Path,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Call a command that fails before training; gives what it prints."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.yml", options)

    def call(name: str, *arguments: str) -> str:
        argv = [*sys.argv]
        with pytest.raises(SystemExit) as ended:
            main([name, *arguments])
        assert ended.value.code == 2
        assert sys.argv == argv
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert "Traceback" not in captured.err
        assert not (tmp_path / "experiments").exists()
        return captured.err

    return call


def test_missing_option_file_is_named(command: Callable[..., str]) -> None:
    assert "trian.yml: no such option file" in command("train", "-opt", "trian.yml")


def test_mistake_in_the_options_is_told_with_file_and_key(
    command: Callable[..., str], tmp_path: Path
) -> None:
    text = (tmp_path / "train.yml").read_text().replace("ema_decay", "ema_dekay")
    (tmp_path / "train.yml").write_text(text)
    message = command("train", "-opt", "train.yml")
    assert "train.yml" in message
    assert "train.ema_dekay" in message
    assert "ema_decay" in message


def test_launcher_pytorch_without_torchrun_says_to_use_it(
    command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    message = command("train", "-opt", "train.yml", "--launcher", "pytorch")
    assert "RANK is not set" in message
    assert "torchrun --nproc_per_node=N -m esc_basicsr.train" in message


def test_launcher_slurm_outside_a_job_says_to_use_srun(
    command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    assert "Start it with srun" in command("train", "-opt", "train.yml", "--launcher", "slurm")


def test_torchrun_with_several_processes_and_no_launcher_is_refused(
    command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parse, "_join", lambda launcher, options: joined.append(launcher))
    monkeypatch.setattr(parse.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(parse.dist, "get_rank", lambda: 0)

    def all_gather_object(gathered: list[Any], own: Any) -> None:
        gathered[:] = [own, own]

    monkeypatch.setattr(parse.dist, "all_gather_object", all_gather_object)
    message = command("train", "-opt", "train.yml")
    assert joined == ["pytorch"]
    assert "torchrun started 2 processes, but --launcher is none" in message
    assert message.count("error:") == 1


def test_ranks_with_other_options_are_refused_with_what_differs(
    command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait for one another for ever, at the first validation that one of them has alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parse, "_join", lambda launcher, options: None)
    monkeypatch.setattr(parse.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(parse.dist, "get_rank", lambda: 0)

    def all_gather_object(gathered: list[Any], own: Any) -> None:
        gathered[:] = [own, (None, own[1].replace("val_freq: 2", "val_freq: 3"))]

    monkeypatch.setattr(parse.dist, "all_gather_object", all_gather_object)
    message = command("train", "-opt", "train.yml", "--launcher", "pytorch")
    assert "the options of rank 0 and rank 1 differ: 'val_freq: 2' and 'val_freq: 3'" in message


def test_basicsr_sees_the_checked_options_exactly(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small numbers, lists, empty values and text that looks like a number come through; overrides are in."""
    from basicsr.utils.options import parse_options

    expected = deepcopy(options)
    expected["train"]["optim_g"] |= {"lr": 5.0e-4, "weight_decay": 1e-08}
    expected["name"] = "007"
    expected["network_g"] = {**expected["network_g"], "exp_ratio": 1.25}
    file = write(tmp_path / "train.yml", expected)
    overrides = ["train:total_iter=5e5", "train:scheduler:milestones=[1,2]", "network_g:exp_ratio=1.5"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-opt", str(file), "--force_yml", *overrides])
    opt, args = parse_options(str(tmp_path), is_train=True)
    assert args.opt == str(file)
    assert args.force_yml == overrides
    assert (opt["train"]["total_iter"], opt["network_g"]["exp_ratio"]) == (5e5, 1.5)
    expected["train"]["total_iter"] = 5e5
    expected["train"]["scheduler"]["milestones"] = [1, 2]
    expected["network_g"]["exp_ratio"] = 1.5
    for key in ("name", "train", "network_g", "logger", "val", "dist_params"):
        assert opt[key] == filled(expected)[key]
    assert list(opt)[: len(expected)] == list(expected)  # in the file's order
    assert opt["path"]["models"] == str(tmp_path / "experiments" / "007" / "models")
    assert (opt["rank"], opt["world_size"], opt["dist"]) == (0, 1, False)


def test_debug_is_basicsrs(tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from basicsr.utils.options import parse_options

    file = write(tmp_path / "train.yml", options)
    monkeypatch.setattr(sys, "argv", ["train.py", "-opt", str(file), "--debug"])
    opt, _ = parse_options(str(tmp_path), is_train=True)
    assert (opt["name"], opt["val"]["val_freq"], opt["logger"]["print_freq"]) == ("debug_single", 8, 1)
