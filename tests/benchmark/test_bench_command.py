"""The bench compares like with like, and writes what it measured."""

import functools
import json

import cv2
import pytest
import torch

from esc_basicsr.__main__ import main
from esc_basicsr.benchmark.bench_command import build
from esc_basicsr.benchmark.measure import median_times, peak_memory_growth


def test_bench_measures_ours_against_the_release_and_writes_it_down(tmp_path, capsys):
    arguments = ["--network", "ESC-FP:release", "ESC-FP", "--input-size", "33", "40", "--repeats", "1"]
    assert main(["bench", *arguments, "--warmup", "0", "--device", "cpu", "-o", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    reference, ours = result["rows"]
    assert result["settings"]["input"] == [33, 40]
    assert ours["params"] == reference["params"] == 539_263
    assert 0 < ours["difference"] < 2e-5 and reference["difference"] is None
    assert ours["seconds"] > 0 and reference["seconds"] > 0
    assert ours["flops"] > 1e9
    table = (tmp_path / "bench.md").read_text()
    assert table in capsys.readouterr().out
    assert "| ESC-FP:release |" in table
    assert cv2.imread(str(tmp_path / "bench.png")) is not None


def test_networks_of_an_option_file_are_measured(tmp_path, capsys):
    file = tmp_path / "srresnet.yml"
    file.write_text("network_g: {type: MSRResNet, num_feat: 4, num_block: 1, upscale: 4}")
    assert (
        main(["bench", "--network", str(file), "--input-size", "8", "8", "--repeats", "1", "--device=cpu"])
        == 0
    )
    assert f"| {file} |" in capsys.readouterr().out


def test_calls_are_timed_in_turn():
    order = []
    calls = {name: functools.partial(order.append, name) for name in "ab"}
    times = median_times(calls, repeats=2, warmup=1, device=torch.device("cpu"))
    assert order == ["a", "b"] * 3
    assert set(times) == {"a", "b"}


class Hungry(torch.nn.Module):
    """Touches 200 MB for a large image."""

    def forward(self, x):
        if x.shape[-1] > 64:
            torch.ones(50_000_000).sum()
        return x


def test_memory_growth_is_what_a_pass_touches():
    growth = peak_memory_growth(Hungry, torch.rand(1, 3, 8, 100))
    assert growth == pytest.approx(200e6, rel=0.1)


def test_forms_of_a_variant_share_weights_that_matter():
    ours, release = build("ESC", 2), build("ESC:release", 2)
    for a, b in zip(ours.parameters(), release.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(p.any() for p in ours.parameters() if p.ndim == 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--network", "EDSR"], "'EDSR' is no network: expected ESC, ESC-light, ESC-FP"),
        (["--network", "ESC:fast"], "'ESC:fast' is no network"),
        (["--network", "absent.yml"], "absent.yml"),
        (["--repeats", "0"], "--repeats must be at least 1"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert main(["bench", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
