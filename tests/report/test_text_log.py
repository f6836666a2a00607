"""BasicSR's text logs: what can be read from them alone."""

import time
from pathlib import Path

import pytest
from basicsr.utils.options import dict2str

from esc_basicsr.report.text_log import TextLog, read_logs

OPTIONS = {
    "name": "run",
    "dist": True,
    "world_size": 4,
    "num_gpu": 1,
    "datasets": {"train": {"batch_size_per_gpu": 8}},
    "train": {"total_iter": 100, "optim_g": {"betas": [0.9, 0.99]}},
    "val": {"val_freq": 30},
}


def said(*messages: str) -> str:
    return "".join(f"2026-01-02 03:04:05,678 INFO: {message}\n" for message in messages)


def progress(iteration: int, rest: str = "l_pix: 1.0000e-02 ", time: float = 0.5) -> str:
    timing = f"[eta: 1 day, 0:01:02, time (data): {time:.3f} (0.001)] "
    return f"[run..][epoch:  0, iter:{iteration:8,d}, lr:(2.000e-04,)] {timing}{rest}"


def validation(name: str, psnr: float) -> str:
    return f"Validation {name}\n\t # psnr: {psnr:.4f}\tBest: 30.0000 @ 10 iter\n\t # ssim: 0.9000\n"


def start(iteration: int) -> str:
    return f"Start training from epoch: 0, iter: {iteration}"


def read(folder: Path, *logs: str) -> TextLog:
    paths = [folder / f"train_run_{number}.log" for number in range(len(logs))]
    for path, text in zip(paths, logs, strict=True):
        path.write_text(text)
    return read_logs(paths)


def test_options_are_read_under_their_full_names(tmp_path: Path) -> None:
    options = read(
        tmp_path, said("\nVersion Information: \n\tBasicSR: 1.4.2", dict2str(OPTIONS), start(0))
    ).options
    assert options["train.total_iter"] == "100"
    assert options["train.optim_g.betas"] == "[0.9, 0.99]"
    assert options["val.val_freq"] == "30"
    assert len(options) == 8


def test_losses_rate_and_throughput_are_read(tmp_path: Path) -> None:
    lines = [progress(1_010, "l_pix: 1.5000e-02 skipped: 2.0000e+00 "), progress(1_020, "l_pix: nan ", 0.25)]
    curves = read(tmp_path, said(dict2str(OPTIONS), start(0), *lines)).curves
    assert curves == {
        "losses/l_pix": {1010: 0.015},
        "skipped": {1010: 2.0},
        "lr": {1010: 2e-4, 1020: 2e-4},
        "images_per_second": {1010: 64.0, 1020: 128.0},
    }


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({"datasets": {"train": {"global_batch_size": 64, "batch_size_per_gpu": 8}}}, 64),
        ({"dist": False, "world_size": 1, "num_gpu": 2}, 16),
        ({"dist": False, "world_size": 1, "num_gpu": 0}, 8),
    ],
)
def test_batch_is_that_of_all_processes(tmp_path: Path, options: dict[str, object], batch: int) -> None:
    curves = read(tmp_path, said(dict2str(OPTIONS | options), start(0), progress(10, time=1))).curves
    assert curves["images_per_second"] == {10: batch}


def test_a_throughput_that_was_logged_is_kept(tmp_path: Path) -> None:
    line = progress(10, "l_pix: 1.0000e-02 images_per_second: 7.0000e+00 ")
    assert read(tmp_path, said(dict2str(OPTIONS), start(0), line)).curves["images_per_second"] == {10: 7.0}


def test_validations_have_the_iterations_that_val_freq_says(tmp_path: Path) -> None:
    messages = [start(0), progress(20), validation("a b", 1), validation("Set14", 2), progress(40)]
    messages += [validation("a b", 3), validation("Set14", 4), validation("a b", 5), progress(100)]
    messages += ["End of training. Time consumed: 0:00:01", validation("a b", 6), validation("Set14", 7)]
    curves = read(tmp_path, said(dict2str(OPTIONS), *messages)).curves
    assert curves["metrics/a b/psnr"] == {30: 1, 60: 3, 90: 5, 100: 6}
    assert curves["metrics/Set14/psnr"] == {30: 2, 60: 4, 100: 7}
    assert curves["metrics/Set14/ssim"][30] == 0.9


def test_resumed_run_takes_the_place_of_what_it_repeats(tmp_path: Path) -> None:
    first = said(dict2str(OPTIONS), start(0), *(progress(n, f"l_pix: {n} ") for n in (10, 20, 30, 40, 50)))
    second = said(
        dict2str(OPTIONS), validation("Set5", 9), start(30), *(progress(n, f"l_pix: -{n} ") for n in (40, 60))
    )
    curves = read(tmp_path, first, second + said(progress(80))[:60]).curves  # the last line was cut short
    assert curves["losses/l_pix"] == {10: 10, 20: 20, 30: 30, 40: -40, 60: -60}
    assert curves["metrics/Set5/psnr"] == {30: 9}


def test_a_clock_that_was_set_back_loses_nothing(tmp_path: Path) -> None:
    """The resumed run's log is then the first by name."""
    first = said(start(0), *(progress(n, f"l_pix: {n} ") for n in (10, 20, 30)))
    resumed = said(start(30), *(progress(n, f"l_pix: {n} ") for n in (40, 50)))
    curves = read(tmp_path, resumed, first).curves
    assert curves["losses/l_pix"] == {10: 10, 20: 20, 30: 30, 40: 40, 50: 50}


HOSTILE = {
    "an iteration of commas": progress(10).replace("iter:      10", "iter: ,,,"),
    "an iteration of 5,000 digits": progress(10).replace("iter:      10", f"iter: {'9' * 5000}"),
    "a time that is none": progress(10, "l_pix: 0.5 ", time=0.5).replace("0.500", "1.2.3"),
    "no number": progress(10, "l_pix: nan l_a: inf l_b: -inf "),
    "a start of 5,000 digits": f"Start training from epoch: 0, iter: {'9' * 5000}",
    "a word of 200,000 letters": "w" * 200_000,
    "progress with a word of 200,000 letters": progress(10, "w" * 200_000),
    "200,000 brackets": "[" * 200_000,
    "200,000 blanks": progress(10, " " * 200_000),
    "entries without end": progress(10, "a: 1 " * 40_000),
    "a validation of nothing": "Validation ",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_odd_lines_are_passed_over_in_no_time(tmp_path: Path, kind: str) -> None:
    sound = said(start(0), progress(10, "l_pix: 0.5 "))
    began = time.process_time()
    curves = read(tmp_path, sound + said(HOSTILE[kind]) + said(progress(20, "l_pix: 0.25 "))).curves
    assert time.process_time() - began < 20  # minutes, if time grew with the square
    assert {n: v for n, v in curves["losses/l_pix"].items() if n in (10, 20)} == {10: 0.5, 20: 0.25}
