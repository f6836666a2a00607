"""MambaIRv2-light equals its authors' release."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from esc_basicsr.lab.measure.complexity import measure_complexity
from esc_basicsr.lab.networks import mambairv2_arch
from esc_basicsr.lab.networks.mambairv2_arch import MambaIRv2Light

KEYS = json.loads((Path(__file__).parents[2] / "golden" / "mambairv2_keys.json").read_text())
OUTPUT_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 1e-3
# ×4, of the release, deterministic
SET5_PSNR = 32.513


def build(network_g, **options):
    return MambaIRv2Light(**{key: value for key, value in network_g.items() if key != "type"}, **options)


def published(scale, **options):
    return build(KEYS[f"MambaIRv2Light_x{scale}"]["network_g"], **options)


@pytest.fixture
def tiny():
    def make(**options):
        sizes = {"embed_dim": 8, "d_state": 2, "depths": [2], "num_heads": [2], "window_size": 4}
        sizes |= {"inner_rank": 3, "num_tokens": 5, "upsampler": "pixelshuffledirect", "mlp_ratio": 1.0}
        torch.manual_seed(0)
        net = MambaIRv2Light(**(sizes | options))
        for scale in (p for name, p in net.named_parameters() if "route" in name):
            scale.data.normal_()  # so that tokens differ
        return net

    return make


@pytest.fixture
def golden_case(golden):
    arrays = golden("mambairv2_small")
    net = build(arrays["config"])
    net.load_state_dict(arrays["weights"], strict=True)
    return net, arrays


@pytest.mark.parametrize("gradients", [False, True])
def test_outputs_equal_the_release(golden_case, gradients):
    net, arrays = golden_case
    net.eval()
    for i in range(3):
        with torch.set_grad_enabled(gradients):
            sr = net(torch.from_numpy(arrays[f"eval{i}/lq"]))
        assert (sr - torch.from_numpy(arrays[f"eval{i}/sr"])).abs().max() <= OUTPUT_TOLERANCE


def test_a_sampled_run_and_its_gradients_equal_the_release(golden_case, monkeypatch):
    net, arrays = golden_case
    noise = (torch.from_numpy(arrays[f"sampled/gumbel{m}"]) for m in range(5))
    monkeypatch.setattr(mambairv2_arch, "_gumbel_noise", lambda scores: next(noise))
    sr = net.train()(torch.from_numpy(arrays["sampled/lq"]))
    assert (sr - torch.from_numpy(arrays["sampled/sr"])).abs().max() <= OUTPUT_TOLERANCE
    loss = F.l1_loss(sr, torch.from_numpy(arrays["sampled/gt"]))
    assert loss.item() == pytest.approx(float(arrays["sampled/l1"]), abs=OUTPUT_TOLERANCE)
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in net.named_parameters()}
    expected = dict(zip(arrays["sampled/grad_names"].tolist(), arrays["sampled/grad_norms"], strict=True))
    assert norms == pytest.approx(expected, rel=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_published_variant_has_the_released_keys_and_parameters(scale):
    released, net = KEYS[f"MambaIRv2Light_x{scale}"], published(scale)
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == released["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == released["params"]


def test_index_of_a_new_network_is_the_released_one(golden):
    arrays = golden("mambairv2_small")
    index = build(arrays["config"]).relative_position_index_SA
    assert torch.equal(index, arrays["weights"]["relative_position_index_SA"])


def test_multiply_adds_are_the_published_ones():
    """On a map small enough for a test: each operation is in proportion to the padded map."""
    released, net = KEYS["MambaIRv2Light_x4"], published(4)
    share = 32**2 / (192 * 320)
    counted = measure_complexity(net, 32, 32).multiply_adds
    # A token's row is looked up, where the release multiplies a one-hot vector: 0.8 % less.
    assert counted == pytest.approx(released["flops"] * share, rel=0.01)


def test_published_weights_reach_the_published_psnr(data_root):
    file = data_root.parent / "rivals" / "weights" / "MambaIRv2-light_x4.pth"
    if not file.is_file():
        pytest.skip(f"there is no {file}")
    import cv2
    from basicsr.metrics import calculate_psnr

    net = published(4).eval()
    net.load_state_dict(torch.load(file, weights_only=True)["params"], strict=True)
    values = []
    for path in sorted((data_root / "Set5" / "HR" / "X4").iterdir()):
        gt = cv2.imread(str(path))
        lq = cv2.imread(str(data_root / "Set5" / "LR_bicubic" / "X4" / f"{path.stem}x4.png"))
        with torch.inference_mode():
            sr = net(torch.from_numpy(lq[..., ::-1] / np.float32(255)).permute(2, 0, 1)[None])
        sr = (sr[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()[..., ::-1]
        values.append(calculate_psnr(sr, gt, crop_border=4, test_y_channel=True))
    assert len(values) == 5
    assert np.mean(values) == pytest.approx(SET5_PSNR, abs=0.005)


# less than the padding, a window, shorter than its mirror image, several windows
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (1, 7), (13, 2), (9, 10)])
def test_any_size_is_mirrored_on(tiny, size):
    net = tiny(upscale=3).eval()
    lq = torch.rand(1, 3, *size)
    padding = [(0, 0), (0, 0), *((0, -side % 4) for side in size)]
    padded = torch.from_numpy(np.pad(lq.numpy(), padding, mode="symmetric"))
    with torch.no_grad():
        sr, whole = net(lq), net(padded)
    assert sr.shape == (1, 3, 3 * size[0], 3 * size[1])
    torch.testing.assert_close(sr, whole[..., : 3 * size[0], : 3 * size[1]])


def test_a_batch_equals_its_images_alone(tiny):
    net = tiny().eval()
    lq = torch.rand(3, 3, 8, 12)
    with torch.no_grad():
        torch.testing.assert_close(net(lq), torch.cat([net(image[None]) for image in lq]))


@pytest.mark.parametrize(
    ("routing", "training", "is_random"),
    [
        ("auto", False, False),
        ("auto", True, True),
        ("sampled", False, True),
        ("sampled", True, True),
        ("deterministic", False, False),
        ("deterministic", True, False),
    ],
)
def test_routing_draws_where_it_should(tiny, routing, training, is_random):
    net = tiny(routing=routing).train(training)
    lq = torch.rand(1, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(net(lq), net(lq)) is not is_random


def test_tokens_are_drawn_by_their_probability(tiny):
    module = tiny(routing="sampled").layers[0].residual_group["layers"][0].assm
    x = torch.randn(1, 1, 8).expand(1, 20000, 8)
    tokens, _ = module._choose(x, torch.zeros(5, 2))
    share = tokens.flatten().bincount(minlength=5) / 20000
    torch.testing.assert_close(share, module.route(x[0, 0]).softmax(-1), atol=0.02, rtol=0)


def test_autocast_and_half_precision_stay_close(tiny):
    net = tiny().eval()
    lq = torch.rand(1, 3, 12, 12)
    with torch.no_grad():
        sr = net(lq)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(net(lq).float(), sr, atol=0.05, rtol=0)
        half = net.bfloat16()(lq.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), sr, atol=0.05, rtol=0)


def test_gradients_reach_the_image_and_each_parameter(tiny):
    net = tiny().eval()
    lq = torch.rand(1, 3, 9, 9, requires_grad=True)
    net(lq).square().sum().backward()
    assert lq.grad.abs().min() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_images_of_other_than_three_channels_have_no_mean(tiny):
    net = tiny(in_chans=1)
    assert not net.mean.any()
    assert net(torch.rand(1, 1, 4, 4)).shape == (1, 1, 8, 8)


def test_a_new_network_starts_as_the_release_does():
    state = published(2).state_dict()
    layer = "layers.0.residual_group.layers.1."
    steps = F.softplus(state[f"{layer}assm.selectiveScan.dt_projs_bias"])
    assert 0.99e-3 <= steps.min() <= steps.max() <= 0.101
    rates = state[f"{layer}assm.selectiveScan.A_logs"].exp()
    torch.testing.assert_close(rates, torch.arange(1.0, 9).repeat(48, 1))
    assert state[f"{layer}wqkv.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state[f"{layer}embeddingA.weight"].abs().max() <= 1 / 32
    assert (state[f"{layer}scale1"] == 1e-4).all()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("routing", "random"),
        ("upsampler", ""),
        ("resi_connection", "3conv"),
        ("window_size", 5),
        ("mlp_ratio", 1.2),
        ("num_heads", [3]),
        ("depths", [2, 2]),
        ("depths", 2),
        ("upscale", 0),
        ("ape", True),
    ],
)
def test_options_that_do_not_fit_are_refused(tiny, option, value):
    with pytest.raises(ValueError, match=r"must .*, got"):
        tiny(**{option: value})
