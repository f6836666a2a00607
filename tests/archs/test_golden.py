"""The networks reproduce the release's outputs and gradients, by every backend."""

import pytest
import torch

from esc_basicsr.archs import VARIANTS
from esc_basicsr.archs.attention import ATTN_TYPES
from esc_basicsr.weights.fit import rescale_to_img

FILES = ["esc_x2", "esc_x3", "esc_x4", "esc_ln_x2", "escfp_x2", "escfp_x3", "escfp_x4"]
# float32 sums in another order already give 7e-6
OUTPUT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-3


@pytest.fixture(params=[(file, attn_type) for file in FILES for attn_type in ATTN_TYPES], ids="-".join)
def case(request, golden, build_network):
    file, attn_type = request.param
    arrays = golden(file)
    net = build_network(arrays["config"], attn_type=attn_type)
    net.load_state_dict(arrays["weights"], strict=True)
    return net, arrays


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_equal_the_release(case, mode):
    net, arrays = case
    net.train(mode == "train")
    inputs = [key for key in arrays if key.endswith("/lq")]
    assert len(inputs) == 4
    for key in inputs:
        with torch.no_grad():
            sr = net(torch.from_numpy(arrays[key]))
        expected = torch.from_numpy(arrays[key.replace("/lq", "/sr")])
        assert (sr - expected).abs().max() <= OUTPUT_TOLERANCE, key


def test_gradient_norms_equal_the_release(case):
    net, arrays = case
    loss = torch.nn.functional.l1_loss(
        net(torch.from_numpy(arrays["batch2/lq"])), torch.from_numpy(arrays["batch2/gt"])
    )
    assert loss.item() == pytest.approx(float(arrays["batch2/l1"]), abs=OUTPUT_TOLERANCE)
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in net.named_parameters()}
    assert sorted(norms) == sorted(arrays["batch2/grad_names"].tolist())
    for name, expected in zip(arrays["batch2/grad_names"], arrays["batch2/grad_norms"], strict=True):
        assert norms[name] == pytest.approx(float(expected), rel=GRADIENT_TOLERANCE), name


def test_to_img_of_another_scale_equals_the_release(golden):
    arrays = golden("rescale")
    for old, new in ((2, 3), (2, 4)):
        for name in ("to_img.weight", "to_img.bias"):
            converted = rescale_to_img(torch.from_numpy(arrays[f"x{old}/{name}"]), new)
            assert torch.allclose(converted, torch.from_numpy(arrays[f"x{new}/{name}"]), atol=1e-6)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_published_variant_has_the_released_keys_and_shapes(published, build_network, variant, scale):
    released = published[f"{variant}_x{scale}"]
    assert {**VARIANTS[variant], "upscaling_factor": scale} == released["network_g"]
    state = build_network(released["network_g"]).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == released["state_dict"]
