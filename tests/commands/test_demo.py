"""The demonstration runs from photographs to pictures, and is honest about its result."""

import json

import pytest
import yaml

from esc_basicsr.__main__ import main
from esc_basicsr.commands import demo


def test_a_sixth_of_the_demo_ends_above_bicubic_with_a_table_pictures_and_a_checkpoint(
    tmp_path, capfd, monkeypatch
):
    stock = demo.write_option_files

    def write_option_files(folder, iterations):
        train, test = stock(folder, iterations)
        train.write_text(train.read_text().replace("ema_decay: 0.99", "ema_decay: 0.95"))  # of fewer steps
        return train, test

    monkeypatch.setattr(demo, "write_option_files", write_option_files)
    folder = tmp_path / "esc_demo"
    assert main(["demo", "--iterations", "100", "-o", str(folder)]) == 0
    output = capfd.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert set(results["photographs"]) == set(demo.HELD_OUT_PHOTOGRAPHS)
    for name, row in results["photographs"].items():
        psnr = [f"{row[method]['psnr']:.2f} dB" for method in demo.METHODS]
        line = next(line for line in output.splitlines() if line.startswith(f"| {name} |"))
        assert all(value in line for value in psnr)
        assert (folder / "pictures" / f"{name}.png").stat().st_size > 10_000
    assert results["mean"]["ESC"]["psnr"] > results["mean"]["bicubic"]["psnr"] + 0.1
    assert "above bicubic in PSNR" in output and "NOT" not in output
    assert (folder / "experiments" / demo.NAME / "models" / "net_g_latest.pth").is_file()
    assert str(folder / "experiments" / demo.NAME / "models" / "net_g_latest.pth") in output

    # BasicSR's own validation, at the end of training, measured the same
    log = next((folder / "experiments" / demo.NAME).glob("train_*.log")).read_text()
    assert f"# psnr: {results['mean']['ESC']['psnr']:.4f}" in log

    # what is there is not written over
    assert main(["demo", "-o", str(folder)]) == 2
    assert "is not an empty folder" in capfd.readouterr().err


def test_training_and_held_out_photographs_differ():
    assert not set(demo.TRAINING_PHOTOGRAPHS) & set(demo.HELD_OUT_PHOTOGRAPHS)


def test_option_files_are_the_shipped_recipe_but_for_size(tmp_path):
    train, test = (yaml.safe_load(path.read_text()) for path in demo.write_option_files(tmp_path, 100))
    assert train["train"]["pixel_opt"]["type"] == "YChannelL1Loss"
    assert train["train"]["optim_g"]["type"] == "AdamW"
    assert train["network_g"] == {**train["network_g"], **demo.NETWORK}
    assert test["network_g"] == train["network_g"]
    assert list(test["datasets"]) == ["test_1"]


def test_a_gain_ends_well_and_a_loss_does_not(tmp_path, capsys):
    def figures(esc):
        psnr = dict(zip(demo.METHODS, (30.0, esc, 31.0), strict=True))
        return {"coffee": {method: {"psnr": value, "ssim": 0.9} for method, value in psnr.items()}}

    assert demo.report(tmp_path, 7, figures(30.5), []) == 0
    assert "0.50 dB above bicubic" in capsys.readouterr().out
    assert demo.report(tmp_path, 7, figures(29.0), []) == 1
    assert "NOT above bicubic: 1.00 dB below" in capsys.readouterr().out


@pytest.mark.parametrize("iterations", ["0", "19", "-3"])
def test_too_few_iterations_are_refused(tmp_path, capsys, iterations):
    assert main(["demo", f"--iterations={iterations}", "-o", str(tmp_path / "new")]) == 2
    assert "--iterations must be at least 20" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_failing_pipeline_tells_its_last_lines(tmp_path):
    options, _ = demo.write_option_files(tmp_path, 20)  # there are no data
    with pytest.raises(demo.UserError, match=r"esc_basicsr.train failed(.|\n)*photographs_HR_sub.lmdb"):
        demo.run_pipeline("train", options, 20)
