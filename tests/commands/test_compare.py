"""The paper's table: networks take turns, and each figure stands beside the published one."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from esc_basicsr.__main__ import main
from esc_basicsr.archs.variants import NETWORKS, VARIANTS, build_variant
from esc_basicsr.commands import compare as compare_command
from esc_basicsr.commands.benchmark_set import lay_out_benchmark
from esc_basicsr.data.photos import load_photograph
from esc_basicsr.lab.measure.benchmark import Row
from esc_basicsr.metrics.published import ABLATION_FIGURES, published_costs, published_figures
from esc_basicsr.options.baselines import BASELINES
from esc_basicsr.options.recipes import ABLATION


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a few pixels."""
    monkeypatch.setattr(compare_command, "OUTPUT_HEIGHT", 72)
    monkeypatch.setattr(compare_command, "OUTPUT_WIDTH", 128)
    monkeypatch.setattr("esc_basicsr.lab.measure.benchmark.peak_memory_growth", lambda build, lq: 2**20)


def lay_out(data: Path, name: str) -> None:
    """A test set of one photograph, at every scale."""
    (data / "originals").mkdir(parents=True)
    Image.fromarray(load_photograph("coffee")[:64, :80]).save(data / "originals" / "coffee.png")
    lay_out_benchmark(data / "originals", data / name, [2, 3, 4])


def read(folder: Path, stem: str) -> tuple[list[dict[str, str]], str]:
    with (folder / f"{stem}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (folder / f"{stem}.png").stat().st_size > 10_000
    return rows, (folder / f"{stem}.md").read_text()


def test_networks_are_measured_in_turn_beside_the_papers_figures(
    tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["compare", "--scale", "4", "--network", "ESC", "ESC-light", "HiT-SRF", "MambaIRv2-light"]
    assert main([*call, "--repeats", "1", "--warmup", "0", "--device", "cpu", "-o", str(tmp_path)]) == 0
    rows, text = read(tmp_path, "comparison")
    assert text.strip() == capsys.readouterr().out.strip()
    assert [row["network"] for row in rows] == ["ESC", "ESC-light", "HiT-SRF", "MambaIRv2-light"]
    light = rows[1]
    assert float(light["ratio"]) == pytest.approx(float(light["ms"]) / float(rows[0]["ms"]))
    assert float(light["paper ratio"]) == pytest.approx(13.3 / 21.9)
    assert (light["parameters"], light["paper K"]) == ("624372", "624.0")
    assert (light["Set5 psnr"], light["paper Set5 psnr"]) == ("", "32.52")
    assert "MambaIRv2's selective scan is that of PyTorch." in text
    assert "ESC ×4: multiply-adds differ from the paper's by" in text  # the image is smaller
    assert "parameters differ" not in text
    results = json.loads((tmp_path / "comparison.json").read_text())
    assert results["settings"]["selective_scan"] == "PyTorch"
    assert len(results["rows"][0]["seconds"]) == 1


def test_quality_is_measured_where_weights_are_at_hand(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path / "data", "Set5")
    network = build_variant("ESC-FP", 2)
    torch.save({"params": network.state_dict()}, tmp_path / "fp.pth")
    call = ["compare", "--scale", "2", "--network", "ESC-FP", "ESC-light", "--repeats", "1", "--warmup", "0"]
    monkeypatch.setattr(compare_command, "model_list", dict)  # what ships is not meant
    call += ["--weights", f"ESC-FP_x2={tmp_path / 'fp.pth'}", "--data", str(tmp_path / "data")]
    assert main([*call, "--device", "cpu", "-o", str(tmp_path / "out")]) == 0
    (measured, random), text = read(tmp_path / "out", "comparison")
    assert 0 < float(measured["Set5 psnr"]) < 40
    assert measured["ratio"] == ""  # without ESC
    assert random["Set5 psnr"] == ""
    assert f"{float(measured['Set5 psnr']):.2f} / " in text
    assert "| Set5 |" in text
    assert "Urban100" not in text.partition("\n")[0]


def test_ablation_is_built_from_its_option_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    (tmp_path / "elsewhere").mkdir()

    def measure(names: list[str], scale: int, lq: torch.Tensor, repeats: int, warmup: int) -> list[Row]:
        seen.extend(yaml.safe_load(Path(name).read_text())["name"] for name in names)
        size = (lq.shape[-2], lq.shape[-1])
        return [
            Row(name, scale, size, [1.0 + 0.1 * n], 2**20, 10**9, 10**6, None, None)
            for n, name in enumerate(names)
        ]

    monkeypatch.setattr(compare_command, "measure", measure)
    assert main(["compare", "--ablation", "--device", "cpu", "-o", str(tmp_path)]) == 0
    assert seen == ["ESC_x2_DIV2K", *(f"ESC_x2_DIV2K_{row}" for row in ABLATION)]
    rows, text = read(tmp_path, "ablation")
    assert {row["network"] for row in rows} == {"ESC", *ABLATION}
    by_name = {row["network"]: row for row in rows}
    assert float(by_name["attention_only"]["paper ratio"]) == pytest.approx(128.2 / 120.9)
    assert float(by_name["kernel9"]["paper Urban100 psnr"]) == 33.42
    assert "— (38.18)" in text
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["compare", "--ablation", "--device", "cpu"]) == 0
    assert not list(Path().iterdir())


def test_trained_rows_of_the_ablation_are_measured_and_what_lacks_memory_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(names: list[str], scale: int, lq: torch.Tensor, repeats: int, warmup: int) -> list[Row]:
        return [Row(name, scale, (8, 8), [1.0], None, None, 1, None, None) for name in names[1:]]

    monkeypatch.setattr(compare_command, "measure", measure)
    lay_out(tmp_path / "sets", "Urban100")
    network = {**VARIANTS["ESC"], "kernel_size": 9, "upscaling_factor": 2}
    weights = NETWORKS[network.pop("type")](**network).state_dict()
    torch.save({"params": weights}, tmp_path / "kernel9.pth")
    call = ["compare", "--ablation", "--weights", f"kernel9_x2={tmp_path / 'kernel9.pth'}"]
    call += ["--data", str(tmp_path / "sets"), "--device", "cpu", "-o", str(tmp_path / "out")]
    assert main(call) == 0
    rows, text = read(tmp_path / "out", "ablation")
    assert "Left out, as the memory was not enough: ESC ×2." in text
    by_name = {row["network"]: row for row in rows}
    assert set(by_name) == {*ABLATION}
    assert 0 < float(by_name["kernel9"]["Urban100 psnr"]) < 40
    assert by_name["kernel17"]["Urban100 psnr"] == ""
    assert f"kernel9 ×2: PSNR and SSIM by {tmp_path / 'kernel9.pth'}." in text


def test_what_lacked_memory_is_named_below_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(names: list[str], scale: int, lq: torch.Tensor, repeats: int, warmup: int) -> list[Row]:
        return [Row(name, scale, (8, 8), [1.0], 0, None, 1, None, None) for name in names if name != "RCAN"]

    monkeypatch.setattr(compare_command, "measure", measure)
    assert main(["compare", "--network", "ESC", "RCAN", "--scale", "2", "4", "--device", "cpu"]) == 0
    assert "Left out, as the memory was not enough: RCAN ×2, RCAN ×4." in capsys.readouterr().out


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets, wrong = tmp_path / "sets", tmp_path / "x4.pth"
    lay_out(sets, "Set5")
    data = ("--data", str(sets))
    damaged = tmp_path / "damaged"
    lay_out(damaged, "Set5")
    hr = damaged / "Set5/HR/X2/coffee.png"
    hr.write_bytes(hr.read_bytes()[:2000])
    torch.save({"params": build_variant("ESC-light", 4).state_dict()}, wrong)
    for arguments, message in (
        (["--weights", "ESC=a.pth", *data], "expected NETWORK_xSCALE=FILE"),
        (["--weights", "EDSR_x2=a.pth", *data], "expected NETWORK_xSCALE=FILE"),
        (["--weights", f"ESC_x2={tmp_path / 'a.pth'}", *data], "a.pth"),
        (
            ["--weights", f"ESC_x3={__file__}", "--scale", "2", *data],
            "of what is measured: ESC_x2, ESC",
        ),
        (["--weights", f"ESC-light_x2={wrong}", "--scale", "2", *data], "holds weights of scale ×4, not ×2"),
        (["--weights", f"kernel9_x2={wrong}", "--ablation", *data], "holds weights of scale ×4, not ×2"),
        (["--weights", f"HiT-SRF_x4={wrong}", "--scale", "4", *data], "missing from the file ("),
        (["--scale", "2", "--data", str(damaged)], "coffee.png"),
        (["--ablation", "--scale", "4"], "--ablation takes no --network and no --scale"),
        (["--data", str(tmp_path)], "none of Set5, Set14, B100, Urban100, Manga109 exists at ×2"),
        (["--weights", f"ESC_x2={__file__}"], "give their folder by --data"),
    ):
        assert main(["compare", *arguments, "-o", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_published_figures_are_complete() -> None:
    assert set(ABLATION_FIGURES) == {"", *ABLATION}
    for scale in (2, 3, 4):
        assert published_costs(scale).keys() == published_figures("DIV2K", scale).keys()
    assert {*BASELINES} <= published_costs(4).keys()
