"""The bench compares like with like, and writes what it measured."""

import json

import cv2
import pytest
import torch

from esc_basicsr.__main__ import main
from esc_basicsr.archs.variants import build_variant
from esc_basicsr.lab.measure import benchmark
from esc_basicsr.lab.measure.benchmark import Row, draw, markdown
from esc_basicsr.lab.measure.measure import NotEnoughMemoryError

QUICK = ["--repeats", "1", "--warmup", "0", "--device", "cpu"]


def test_bench_measures_ours_against_the_release_and_writes_it_down(tmp_path, capsys):
    arguments = ["--network", "ESC-FP:release", "ESC-FP", "--input-size", "33", "40", "--repeats", "2"]
    assert main(["bench", *arguments, "--warmup", "0", "--device", "cpu", "-o", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    reference, ours = result["rows"]
    assert result["settings"]["machine"]["torch"] == torch.__version__
    assert ours["params"] == reference["params"] == 539_263
    assert ours["multiply_adds"] == reference["multiply_adds"] > 1e9
    assert ours["input"] == [33, 40] and ours["scale"] == 4
    assert 0 < ours["difference"] < 2e-5 and reference["difference"] is None
    assert ours["psnr"] is None
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in result["rows"])
    table = (tmp_path / "bench.md").read_text()
    assert table in capsys.readouterr().out
    assert "| ESC-FP:release | ×4 |" in table
    assert cv2.imread(str(tmp_path / "bench.png")) is not None


def test_a_network_with_a_scale_of_its_own_is_measured_once_at_that_scale(tmp_path, monkeypatch):
    file = tmp_path / "srresnet.yml"
    file.write_text("network_g: {type: MSRResNet, num_feat: 4, num_block: 1, upscale: 3}")
    monkeypatch.setattr(benchmark, "peak_memory_growth", lambda build, lq: 0)
    networks = [str(file), "MSRResNet,num_feat=4,num_block=1"]
    arguments = ["--network", *networks, "--scale", "2", "4", "--input-size", "8", "8", "-o", str(tmp_path)]
    assert main(["bench", *arguments, *QUICK]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {(row["network"], row["scale"]) for row in rows} == {
        (str(file), 3),
        (networks[1], 2),
        (networks[1], 4),
    }


def test_half_precision_is_compared_with_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "peak_memory_growth", lambda build, lq: 0)
    arguments = ["--network", "ESC-FP", "--scale", "2", "--input-size", "20", "20", "--precision", "bf16"]
    assert main(["bench", *arguments, *QUICK, "-o", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert 20 < row["psnr"] < 100
    assert f"| {row['psnr']:.1f} dB |" in (tmp_path / "bench.md").read_text()


def test_a_form_in_bfloat16_is_compared_with_float32_in_a_run_of_float32(tmp_path, monkeypatch):
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    monkeypatch.setattr(benchmark, "peak_memory_growth", lambda build, lq: 0)
    networks = ["--network", "ESC-FP", "ESC-FP:openvino", "ESC-FP:openvino-bf16"]
    size = ["--scale", "2", "--input-size", "20", "20"]
    assert main(["bench", *networks, *size, *QUICK, "-o", str(tmp_path)]) == 0
    ours, exact, half = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert ours["psnr"] is exact["psnr"] is None
    assert exact["difference"] < 1e-5 and half["params"] == ours["params"]
    assert half["psnr"] > 30


def test_a_network_that_lacks_memory_is_left_out_with_a_warning(tmp_path, monkeypatch, esc_log):
    def time_networks(nets, lq, repeats, warmup):
        if "ESC" in nets:
            raise NotEnoughMemoryError("ESC", lq)
        return time_the_others(nets, lq, repeats, warmup)

    time_the_others = benchmark.time_networks
    monkeypatch.setattr(benchmark, "time_networks", time_networks)
    monkeypatch.setattr(benchmark, "peak_memory_growth", lambda build, lq: 0)
    small = ["--scale", "2", "--input-size", "8", "8", *QUICK, "-o", str(tmp_path)]
    assert main(["bench", "--network", "ESC", "ESC-FP", *small]) == 0
    assert "ESC: the memory is not enough for an input of 8×8" in "\n".join(esc_log)
    assert [row["network"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == ["ESC-FP"]
    assert main(["bench", "--network", "ESC", *small]) == 2


def test_numbers_that_are_not_finite_are_told(tmp_path, monkeypatch, esc_log):
    network = build_variant("ESC-FP", 2)
    with torch.no_grad():
        next(network.parameters()).fill_(1e38)
    torch.save({"params": network.state_dict()}, tmp_path / "net.pth")
    monkeypatch.setattr(benchmark, "peak_memory_growth", lambda build, lq: 0)
    call = ["bench", "--network", f"ESC-FP,weights={tmp_path / 'net.pth'}", "--scale", "2"]
    assert main([*call, "--input-size", "8", "8", *QUICK]) == 0
    assert "in torch.float32 gives numbers that are not finite" in "\n".join(esc_log)


def test_a_network_that_cannot_be_traced_has_no_multiply_adds(esc_log, monkeypatch):
    def fail(*args):
        raise RuntimeError("no graph")

    monkeypatch.setattr(benchmark, "measure_complexity", fail)
    assert benchmark.count_multiply_adds("ESC", 2, torch.rand(1, 3, 8, 8)) is None
    assert esc_log == ["ESC: multiply-adds are not counted (RuntimeError: no graph)."]


def row(network: str, scale: int, seconds: float, memory: int) -> Row:
    return Row(network, scale, (8, 8), [9.0, seconds, 0.0], memory, 10**9, 1000, None, None)


ROWS = [
    row("ESC:release", 2, 4.0, 8 << 20),
    row("ESC", 2, 1.0, 2 << 20),
    row("ESC:release", 4, 3.0, 6 << 20),
    row("ESC", 4, 1.0, 3 << 20),
    row("MSRResNet", 4, 1.0, 1 << 20),
]


def test_table_relates_each_form_to_the_first_of_its_network_and_scale():
    cells = [line.split("|")[3:7] for line in markdown(ROWS).splitlines()[2:]]
    assert [[cell.strip() for cell in line] for line in cells] == [
        ["4,000.0 ms", "", "8 MiB", ""],
        ["1,000.0 ms", "4.00", "2 MiB", "0.25"],
        ["3,000.0 ms", "", "6 MiB", ""],
        ["1,000.0 ms", "3.00", "3 MiB", "0.50"],
        ["1,000.0 ms", "", "1 MiB", ""],
    ]


def test_picture_has_a_panel_for_each_scale_and_names_networks_and_forms():
    figure = draw(ROWS)
    assert [axis.get_title() for axis in figure.axes] == ["×2", "×4"]
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["ESC", "MSRResNet", "ours", "the release's"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--network", "Nothing"], "'Nothing' is no network: expected ESC, ESC-light, ESC-FP"),
        (["--network", "ESC:fast"], "'ESC:fast' is no network"),
        (["--network", "ESC:kernels", "--precision", "bf16"], "ESC:kernels-bf16"),
        (["--network", "absent.yml"], "absent.yml"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--input-size", "0", "8"], "--input-size must be at least 1"),
        (["--device", "abacus"], "--device abacus: expected cpu"),
        (["--output", __file__], "cannot be made: File exists"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert main(["bench", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
