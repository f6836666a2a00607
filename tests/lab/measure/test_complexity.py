"""Parameters and multiply-adds are the published ones."""

import pytest
import torch

from esc_basicsr.__main__ import main
from esc_basicsr.archs import ESC
from esc_basicsr.archs.variants import build_variant
from esc_basicsr.lab.measure.complexity import measure_complexity

# arXiv:2503.06671: multiply-adds in G at 1280×720 output. One scale each: a count runs the network once at
# full size. `python -m esc_basicsr complexity` prints all nine.
PUBLISHED = [("ESC", 4, 967_500, 149.19), ("ESC-light", 3, 612_255, 162.78), ("ESC-FP", 4, 539_263, 60.84)]


@pytest.mark.parametrize("name, scale, params, giga", PUBLISHED)
def test_published_variant_has_its_parameters_and_multiply_adds(name, scale, params, giga):
    result = measure_complexity(build_variant(name, scale), 720 // scale, 1280 // scale)
    assert result.params == params
    assert result.flops / 1e9 == pytest.approx(giga, abs=0.005)


@pytest.mark.parametrize("attn_type", ["Naive", "SDPA", "Flex", "auto"])
def test_count_does_not_depend_on_the_attention_backend(tiny_network, build_network, attn_type):
    net = build_network(tiny_network, attn_type=attn_type)
    assert measure_complexity(net, 8, 8) == measure_complexity(build_network(tiny_network), 8, 8)
    assert net.blocks[0].attn.attn_type == attn_type


def test_attention_products_are_counted():
    window, dim = 8, 16
    options = {"dim": dim, "pdim": 4, "n_blocks": 1, "conv_blocks": 1, "window_size": window, "num_heads": 2}
    both = measure_complexity(ESC(2, **options), window, window).flops
    without = measure_complexity(ESC(2, **options, token_mixer="conv_attention"), window, window).flops
    pixels = window**2
    projections = pixels * 4 * dim * dim
    products = 2 * pixels * pixels * dim
    norm = 5 * pixels * dim
    assert both - without == projections + products + norm


def test_command_prints_a_table(capsys):
    assert main(["complexity", "--variant", "ESC-FP", "--scale", "4"]) == 0
    assert "| ESC-FP | ×4 | 539,263 | 60.84 G |" in capsys.readouterr().out


def test_counting_leaves_the_network_as_it_was(tiny_network, build_network):
    net = build_network(tiny_network).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    measure_complexity(net, 4, 4)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
