"""Checkpoints load unchanged, of another scale too, or say why they do not."""

import pytest
import torch

from esc_basicsr.archs import VARIANTS
from esc_basicsr.archs.checkpoint import check_fit, infer_network_options, load_weights, read_weights
from esc_basicsr.errors import UserError

ABLATIONS = [
    {},
    {"use_ln": True},
    {"dynamic_kernel": False},
    {"share_large_kernel": False, "dynamic_kernel": False},
    {"share_large_kernel": False},
    {"token_mixer": "attention"},
    {"token_mixer": "conv_attention"},
    {"exp_ratio": 1.7},
]


@pytest.fixture
def saved(tmp_path, tiny_network, build_network):
    """A checkpoint as BasicSR saves it, and its network."""
    net = build_network(tiny_network)
    ema = build_network(tiny_network)
    path = tmp_path / "net_g_latest.pth"
    torch.save({"params": net.state_dict(), "params_ema": ema.state_dict()}, path)
    return path, net, ema


def test_params_and_params_ema_load_strictly_and_unchanged(saved, tiny_network, build_network):
    path, net, ema = saved
    for key, source in (("params", net), ("params_ema", ema)):
        fresh = build_network(tiny_network)
        load_weights(fresh, read_weights(path, key), path)
        assert all(
            torch.equal(value, source.state_dict()[name]) for name, value in fresh.state_dict().items()
        )


def test_bare_state_dict_and_module_prefix_are_read(tmp_path, saved):
    _, net, _ = saved
    torch.save({f"module.{key}": value for key, value in net.state_dict().items()}, tmp_path / "bare.pth")
    weights = read_weights(tmp_path / "bare.pth", None)
    assert list(weights) == list(net.state_dict())


def test_missing_ema_falls_back_to_params_and_says_so(tmp_path, saved, esc_log):
    _, net, _ = saved
    torch.save({"params": net.state_dict()}, tmp_path / "no_ema.pth")
    weights = read_weights(tmp_path / "no_ema.pth", "params_ema")
    assert torch.equal(weights["proj.weight"], net.proj.weight)
    assert "holds no params_ema; params is loaded" in "".join(esc_log)


def test_another_scale_changes_to_img_alone_and_says_so(saved, tiny_network, build_network, esc_log):
    path, net, _ = saved
    other = build_network(tiny_network, upscaling_factor=4)
    load_weights(other, read_weights(path), path)
    assert "is of scale ×2; to_img is converted to ×4" in "".join(esc_log)
    for name, value in other.state_dict().items():
        if not name.startswith("to_img"):
            assert torch.equal(value, net.state_dict()[name])
    # Bilinear resizing keeps the mean of each filter's image.
    old, new = (
        state.to_img.weight.view(3, -1, *state.to_img.weight.shape[1:]).mean(1) for state in (net, other)
    )
    assert torch.allclose(old, new, atol=1e-6)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"n_blocks": 2}, [r"missing from the file \(43\):", "blocks.1.", r"n_blocks: 1 \(here 2\)"]),
        (
            {"dim": 32},
            [
                "of another shape",
                r"proj.weight: \[16, 3, 3, 3\], expected \[32, 3, 3, 3\]",
                r"dim: 16 \(here 32\)",
            ],
        ),
        ({"conv_blocks": 1}, ["unknown to the network", "blocks.0.convffns.1.", "and 6 more"]),
    ],
)
def test_checkpoint_that_does_not_fit_says_keys_shapes_and_remedy(
    saved, tiny_network, build_network, options, expected
):
    path, _, _ = saved
    net = build_network(tiny_network, **options)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(net, read_weights(path), path)
    for pattern in expected:
        assert caught.match(pattern)
    assert caught.match("net_g_latest.pth does not fit ESC")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_fit_is_told_of_a_network_without_memory_as_of_one_that_loads(saved, tiny_network, build_network):
    path, _, _ = saved
    weights = read_weights(path)
    with torch.device("meta"):
        same, other_scale, deeper = (
            build_network(tiny_network, **options)
            for options in ({}, {"upscaling_factor": 4}, {"n_blocks": 2})
        )
    check_fit(same, weights, path)
    check_fit(other_scale, weights, path)
    with pytest.raises(UserError) as checked:
        check_fit(deeper, weights, path)
    with pytest.raises(UserError) as loaded:
        load_weights(build_network(tiny_network, n_blocks=2), weights, path)
    assert str(checked.value) == str(loaded.value)
    assert all(parameter.is_meta for parameter in same.parameters())


def test_incomplete_checkpoint_of_the_same_network_is_told(saved, tiny_network, build_network):
    path, _, _ = saved
    weights = read_weights(path)
    del weights["last.bias"]
    with pytest.raises(UserError, match=r"missing from the file \(1\):\n    last.bias\n.*incomplete"):
        load_weights(build_network(tiny_network), weights, path)


def test_weights_of_something_else_are_told(tiny_network, build_network):
    with pytest.raises(UserError, match="not weights of an ESC network"):
        load_weights(build_network(tiny_network), {"conv_first.weight": torch.zeros(1)}, "edsr.pth")


def test_without_strict_the_rest_is_loaded_and_listed(saved, tiny_network, build_network, esc_log):
    path, net, _ = saved
    wider = build_network(tiny_network, kernel_size=7)
    load_weights(wider, read_weights(path), path, strict=False)
    assert torch.equal(wider.proj.weight, net.proj.weight)
    assert "plk_filter" in "".join(esc_log) and "strict loading is off" in "".join(esc_log)


def test_unreadable_files_are_told(tmp_path, saved):
    path, _, _ = saved
    with pytest.raises(UserError, match="there is no such checkpoint"):
        read_weights(tmp_path / "absent.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"cut\.pth: not a readable checkpoint: it is cut short"):
        read_weights(cut)
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match=r"text\.pth: not a PyTorch checkpoint"):
        read_weights(tmp_path / "text.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.pth: not a readable checkpoint"):
        read_weights(tmp_path / "empty.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="expected a dict of weights, got list"):
        read_weights(tmp_path / "list.pth")
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no weights under 'params'; it holds 'state_dict', 'epoch'"):
        read_weights(tmp_path / "other.pth")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_checkpoint_that_would_execute_code_is_refused(tmp_path, capsys):
    torch.save({"params": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="holds more than weights"):
        read_weights(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_published_network_is_recognised_from_its_weights(build_network, variant, scale):
    network_g = {**VARIANTS[variant], "upscaling_factor": scale}
    assert infer_network_options(build_network(network_g).state_dict()) == network_g


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_network_built_from_recognised_options_takes_the_weights(tiny_network, build_network, ablation):
    state = build_network(tiny_network, **ablation).state_dict()
    build_network(infer_network_options(state) | {"pdim": 4, "num_heads": 2}).load_state_dict(
        state, strict=True
    )


def test_weights_of_another_network_are_not_recognised():
    assert infer_network_options({"conv.weight": torch.zeros(3, 3)}) is None
    assert infer_network_options({"proj.weight": torch.zeros(3, 3)}) is None
    assert infer_network_options({}) is None
