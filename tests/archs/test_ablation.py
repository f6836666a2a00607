"""The ablation's options build what the paper's rows are, and refuse what cannot be."""

import pytest
import torch

from esc_basicsr.archs import ESC, ESCFP

# counts of the ×2 networks; those of ESC and ESC-light are the paper's
ROWS = {
    "ESC": ({}, 946_728),
    "kernel 9": ({"kernel_size": 9}, 924_200),
    "kernel 17": ({"kernel_size": 17}, 977_448),
    "no DK": ({"dynamic_kernel": False}, 910_928),
    "no LK sharing, no DK": ({"share_large_kernel": False, "dynamic_kernel": False}, 1_949_264),
    "SA only": ({"token_mixer": "attention", "conv_blocks": 2}, 922_344),
    "ConvAttn only": ({"token_mixer": "conv_attention", "conv_blocks": 7}, 951_268),
    "window 16, more layers": ({"window_size": 16, "conv_blocks": 6}, 970_448),
}


@pytest.mark.parametrize("row", ROWS)
def test_ablation_row_has_its_parameter_count(row):
    options, params = ROWS[row]
    assert sum(p.numel() for p in ESC(2, **options).parameters()) == params


@pytest.mark.parametrize("row", ROWS)
def test_ablation_row_trains_every_parameter(row, tiny_network):
    tiny_network.pop("type")
    options = {
        k: v for k, v in ROWS[row][0].items() if k in ("token_mixer", "share_large_kernel", "dynamic_kernel")
    }
    net = ESC(**tiny_network, **options)
    for parameter in net.parameters():  # the predicted kernel starts at zero, which stops gradients before it
        torch.nn.init.normal_(parameter, std=0.2)
    net(torch.rand(2, 3, 7, 9)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_unshared_large_kernels_that_are_equal_act_as_a_shared_one(tiny_network):
    tiny_network.pop("type")
    shared = ESC(**tiny_network)
    unshared = ESC(**tiny_network, share_large_kernel=False)
    state = unshared.state_dict()
    unshared.load_state_dict(
        {key: shared.plk_filter if key.endswith("plk_filter") else shared.state_dict()[key] for key in state}
    )
    lq = torch.rand(1, 3, 8, 8)
    assert torch.allclose(shared(lq), unshared(lq), atol=1e-6)


def test_network_without_dynamic_kernel_equals_one_whose_predictor_is_zero(tiny_network):
    tiny_network.pop("type")
    full = ESC(**tiny_network)  # the predictor's last layer starts at zero
    static = ESC(**tiny_network, dynamic_kernel=False)
    static.load_state_dict({key: full.state_dict()[key] for key in static.state_dict()})
    lq = torch.rand(1, 3, 8, 8)
    assert torch.allclose(full(lq), static(lq), atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"token_mixer": "conv"}, "token_mixer must be one of hybrid, attention, conv_attention, got 'conv'"),
        ({"token_mixer": "attention", "dynamic_kernel": False}, "must be true with token_mixer attention"),
        ({"attn_type": "flash"}, "attn_type must be one of auto, Naive, SDPA, Flex, got 'flash'"),
        ({"kernel_size": 12}, "kernel_size must be odd and at least 3, got 12"),
        ({"kernel_size": 1}, "kernel_size must be odd and at least 3, got 1"),
        ({"dim": 30}, "dim must be a multiple of num_heads, got dim 30 and num_heads 4"),
        ({"pdim": 65}, r"pdim must be at most dim \(64\), got 65"),
        ({"pdim": 1}, "pdim must be at least 2 for a dynamic kernel, got 1"),
        ({"n_blocks": 0}, "n_blocks must be an integer of at least 1, got 0"),
        ({"window_size": 32.0}, "window_size must be an integer of at least 1, got 32.0"),
        ({"conv_blocks": True}, "conv_blocks must be an integer of at least 1, got True"),
        ({"upscaling_factor": "4"}, "upscaling_factor must be an integer of at least 1, got '4'"),
        ({"share_large_kernel": "no"}, "share_large_kernel must be true or false, got 'no'"),
        ({"use_ln": 1}, "use_ln must be true or false, got 1"),
        ({"exp_ratio": 0.01}, "exp_ratio must leave at least one channel, got 0.01"),
        ({"exp_ratio": "1.25"}, "exp_ratio must leave at least one channel, got '1.25'"),
    ],
)
def test_impossible_option_is_refused_with_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        ESC(**({"upscaling_factor": 2} | options))


def test_too_few_channels_for_esc_fp_are_refused():
    with pytest.raises(ValueError, match="pdim must be at least 4 for ESCFP's dynamic kernel, got 3"):
        ESCFP(2, pdim=3)


def test_mistyped_option_is_refused():
    with pytest.raises(TypeError, match="windowsize"):
        ESC(2, windowsize=32)


@pytest.mark.parametrize("network", [ESC, ESCFP])
@pytest.mark.parametrize("scale", [1, 2, 3, 5])
def test_any_integer_scale_works(network, scale):
    net = network(scale, dim=16, pdim=4, kernel_size=5, n_blocks=1, conv_blocks=1, window_size=4, num_heads=2)
    assert net(torch.rand(1, 3, 6, 5)).shape == (1, 3, 6 * scale, 5 * scale)
