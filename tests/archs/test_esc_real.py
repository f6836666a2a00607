"""ESCReal and ESCRealM reproduce the release and the community's trainer, at every upsampler and size."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from esc_basicsr.archs import ESCReal, ESCRealM
from esc_basicsr.archs.layers import reflect_border
from esc_basicsr.archs.upsamplers import UPSAMPLERS, DySample

FOLDER = Path(__file__).parents[1] / "golden" / "esc_real"
FILES = sorted(file.stem for file in FOLDER.glob("*.npz"))
TINY = {
    "dim": 16,
    "pdim": 4,
    "kernel_size": 5,
    "n_blocks": 1,
    "conv_blocks": 1,
    "window_size": 4,
    "num_heads": 2,
}
BUILT = UPSAMPLERS[:-2]


@pytest.fixture(params=FILES)
def case(request, golden, build_network):
    arrays = golden(f"esc_real/{request.param}")
    net = build_network(arrays["config"])
    net.load_state_dict(arrays["weights"], strict=True)
    return net, arrays


def test_there_is_a_file_for_each_upsampler():
    assert len(FILES) == 8


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_equal_the_release(case, mode):
    net, arrays = case
    net.train(mode == "train")
    inputs = [key for key in arrays if key.endswith("/lq")]
    assert len(inputs) >= 2
    for key in inputs:
        with torch.no_grad():
            sr = net(torch.from_numpy(arrays[key]))
        expected = torch.from_numpy(arrays[key.replace("/lq", "/sr")])
        assert sr.shape == expected.shape
        assert (sr - expected).abs().max() <= 2e-5, key


def test_gradient_norms_equal_the_release(case):
    net, arrays = case
    loss = F.l1_loss(net(torch.from_numpy(arrays["batch2/lq"])), torch.from_numpy(arrays["batch2/gt"]))
    assert loss.item() == pytest.approx(float(arrays["batch2/l1"]), abs=2e-5)
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in net.named_parameters()}
    assert sorted(norms) == sorted(arrays["batch2/grad_names"].tolist())
    for name, expected in zip(arrays["batch2/grad_names"], arrays["batch2/grad_norms"], strict=True):
        assert norms[name] == pytest.approx(float(expected), rel=1e-3), name


def test_keys_and_shapes_equal_the_release(case):
    net, arrays = case
    state = {key: list(value.shape) for key, value in net.state_dict().items()}
    buffers = {key.removeprefix("buffer/") for key in arrays if key.startswith("buffer/")}
    assert {key: shape for key, shape in state.items() if key not in buffers} == {
        key: shape for key, shape in json.loads(str(arrays["keys"])).items() if key not in buffers
    }


def test_buffers_equal_the_release(case):
    net, arrays = case
    fresh = type(net)(**{key: value for key, value in arrays["config"].items() if key != "type"})
    for key in arrays:
        if key.startswith("buffer/"):
            own = fresh.get_buffer(key.removeprefix("buffer/"))
            assert torch.equal(own, torch.from_numpy(arrays[key])), key


def test_published_network_has_the_released_keys_and_size():
    released = json.loads((FOLDER / "escreal_keys.json").read_text())["ESC-Real_x4"]
    net = ESCReal()
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == released
    assert sum(p.numel() for p in net.parameters()) == 2_265_307


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("upsampler", BUILT)
def test_every_scale_and_upsampler_either_runs_or_is_refused(upsampler, scale):
    has = {"conv": [1], "transpose+conv": [1, 2, 3, 4]}.get(upsampler, [1, 2, 3, 4, 8])
    options = {**TINY, "upsampler": upsampler, "unshuffle_mod": False}
    if scale not in has:
        with pytest.raises(ValueError, match="scale"):
            ESCRealM(scale, **options)
        return
    net = ESCRealM(scale, **options)
    for height, width in ((1, 1), (5, 3)):
        sr = net(torch.rand(2, 3, height, width))
        assert sr.shape == (2, 3, scale * height, scale * width)
        assert sr.isfinite().all()


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 5), (9, 16)])
def test_unshuffled_input_of_any_size_gives_the_scaled_size(scale, height, width):
    net = ESCRealM(scale, **TINY).eval()
    lq = torch.rand(1, 3, height, width)
    with torch.no_grad():
        sr = net(lq)
        assert sr.shape == (1, 3, scale * height, scale * width)
        assert torch.equal(sr, net.train()(lq))


@pytest.mark.parametrize("options", [{"upsampler": "lda"}, {"upsampler": "pa_up"}, {"upsampler": "bilinear"}])
def test_upsamplers_that_are_not_built_are_refused_by_name(options):
    with pytest.raises(ValueError, match=options["upsampler"]):
        ESCRealM(4, **TINY, **options)


def test_values_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="unshuffle_mod"):
        ESCRealM(1, **TINY, upsampler="conv")
    with pytest.raises(ValueError, match="ESCRealM"):
        ESCReal(2)
    with pytest.raises(ValueError, match="multiple of 4"):
        ESCRealM(4, **TINY, upsampler="dysample", mid_dim=18)


def test_loading_keeps_the_networks_own_record_of_its_upsampler():
    net = ESCRealM(4, **TINY)
    weights = net.state_dict()
    weights["to_img.MetaUpsample"] = torch.zeros(7, dtype=torch.uint8)
    net.load_state_dict(weights, strict=True)
    assert net.to_img.MetaUpsample.tolist() == [2, 3, 4, 16, 3, 48, 4]
    del weights["to_img.MetaUpsample"]
    net.load_state_dict(weights, strict=True)


@pytest.mark.parametrize("size", [4, 7, 20])
def test_border_reflects_as_torch_does_where_torch_can(size):
    x = torch.rand(2, 3, size, size + 1)
    assert torch.equal(reflect_border(x, 3), F.pad(x, [3] * 4, mode="reflect"))


def test_fresh_dysample_is_bilinear_sampling_at_its_points():
    """With offsets of zero each output pixel lies at the centre of its part of an input pixel."""
    sampler = DySample(4, 4, 3)
    torch.nn.init.zeros_(sampler.offset.weight)
    torch.nn.init.zeros_(sampler.offset.bias)
    torch.nn.init.dirac_(sampler.end_conv.weight)
    torch.nn.init.zeros_(sampler.end_conv.bias)
    x = torch.rand(2, 4, 5, 7)
    expected = F.interpolate(x, scale_factor=3, mode="bilinear", align_corners=False)
    assert torch.allclose(sampler(x), expected, atol=1e-6)


def test_half_precision_samples_where_single_does():
    sampler = DySample(4, 3, 2)
    x = torch.rand(1, 4, 2, 600)
    single, half = sampler(x), sampler.to(torch.bfloat16)(x.to(torch.bfloat16)).float()
    assert (single - half).abs().max() < 0.05
