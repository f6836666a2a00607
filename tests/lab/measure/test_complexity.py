"""Parameters and multiply-adds are the published ones."""

import pytest
import torch

from esc_basicsr.__main__ import main
from esc_basicsr.archs import ESC
from esc_basicsr.archs.variants import SCALES, VARIANTS, build_variant
from esc_basicsr.commands import complexity as complexity_command
from esc_basicsr.lab.measure.complexity import measure_complexity
from esc_basicsr.metrics.published import published_costs

# to the digit, as fvcore counts what arXiv:2503.06671 publishes
EXACT = {("ESC", 4): 149.19, ("ESC-light", 3): 162.78, ("ESC-FP", 4): 60.84}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", VARIANTS)
def test_published_variants_have_their_parameters_and_multiply_adds(name, scale):
    result = measure_complexity(build_variant(name, scale), 720 // scale, 1280 // scale)
    paper = published_costs(scale)[name]
    assert result.multiply_adds / 1e9 == pytest.approx(paper.giga, abs=0.051)
    assert result.params / 1e3 == pytest.approx(paper.thousands, abs=0.76)  # 603.6 is printed as 603
    if (name, scale) in EXACT:
        assert result.multiply_adds / 1e9 == pytest.approx(EXACT[name, scale], abs=0.005)


def test_what_cannot_run_without_values_is_counted_where_it_runs():
    class Picky(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.conv2d(x, x.new_ones(3, 3, 1, 1)) if x.sum() == 0 else x

    with pytest.raises((RuntimeError, NotImplementedError)):
        measure_complexity(Picky(), 4, 5)
    assert measure_complexity(Picky(), 4, 5, "cpu").multiply_adds == 4 * 5 * 9


@pytest.mark.parametrize("attn_type", ["Naive", "SDPA", "Flex", "auto"])
def test_count_does_not_depend_on_the_attention_backend(tiny_network, build_network, attn_type):
    net = build_network(tiny_network, attn_type=attn_type)
    assert measure_complexity(net, 8, 8) == measure_complexity(build_network(tiny_network), 8, 8)
    assert net.blocks[0].attn.attn_type == attn_type


def test_attention_products_are_counted():
    window, dim = 8, 16
    options = {"dim": dim, "pdim": 4, "n_blocks": 1, "conv_blocks": 1, "window_size": window, "num_heads": 2}
    both = measure_complexity(ESC(2, **options), window, window).multiply_adds
    without = measure_complexity(
        ESC(2, **options, token_mixer="conv_attention"), window, window
    ).multiply_adds
    pixels = window**2
    projections = pixels * 4 * dim * dim
    products = 2 * pixels * pixels * dim
    norm = 5 * pixels * dim
    assert both - without == projections + products + norm


def test_command_prints_a_table(capsys):
    assert main(["complexity", "--variant", "ESC-FP", "--scale", "4"]) == 0
    assert "| ESC-FP | ×4 | 539,263 | 60.84 G |" in capsys.readouterr().out


def test_command_counts_the_networks_for_photographs_at_their_scales(capsys):
    assert main(["complexity", "--variant", "ESC-Real", "ESC-RealM", "--scale", "2", "4"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    counted = {tuple(row[:2]): row[2] for row in rows}
    assert counted.keys() == {("| ESC-Real", "×4"), ("| ESC-RealM", "×2"), ("| ESC-RealM", "×4")}
    assert counted["| ESC-Real", "×4"] == "2,265,307"  # published


def test_command_lists_modules_where_it_is_asked_to(capsys, monkeypatch):
    monkeypatch.setattr(complexity_command, "OUTPUT_HEIGHT", 96)
    monkeypatch.setattr(complexity_command, "OUTPUT_WIDTH", 128)
    assert main(["complexity", "--variant", "ESC-light", "--scale", "2", "--modules"]) == 0
    out = capsys.readouterr().out
    assert "ESC-light ×2" in out and "blocks.0.attn" in out and "#parameters" in out


def test_counting_leaves_the_network_as_it_was(tiny_network, build_network):
    net = build_network(tiny_network).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    measure_complexity(net, 4, 4)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
