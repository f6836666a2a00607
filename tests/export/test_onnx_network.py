import onnx
import pytest
import torch

from esc_basicsr.common.errors import UserError
from esc_basicsr.export.onnx_network import read_onnx, write_onnx

NETWORKS = {
    "ESC": {},
    "ESC ×3": {"upscaling_factor": 3, "window_size": 5, "use_ln": True, "conv_blocks": 1},
    "ESC-FP": {"type": "ESCFP"},
    "attention": {"token_mixer": "attention"},
    "conv_attention": {"token_mixer": "conv_attention"},
    "unshared": {"share_large_kernel": False},
    "ESCReal": {"type": "ESCReal", "upscaling_factor": 4},
    "pixelshuffle": {"type": "ESCRealM", "upscaling_factor": 3, "upsampler": "pixelshuffle"},
    "transpose+conv": {"type": "ESCRealM", "upscaling_factor": 4, "upsampler": "transpose+conv"},
    "conv": {"type": "ESCRealM", "upscaling_factor": 1, "upsampler": "conv", "unshuffle_mod": False},
    "static kernels": {"dynamic_kernel": False, "upscaling_factor": 1},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_gives_what_the_network_gives_at_any_size(lively_network, name, differences):
    net = lively_network(**NETWORKS[name])
    run = read_onnx(write_onnx(net, False, {}, 18))
    assert max(differences(net, run)) < 1e-5


@pytest.mark.parametrize("name", ["ESC", "ESC-FP", "ESCReal"])
def test_no_operator_has_more_inputs_and_outputs_than_webgpu_takes(lively_network, name):
    net = lively_network(**NETWORKS[name] | {"num_heads": 4})
    model = onnx.load_from_string(write_onnx(net, False, {}, 18))
    for node in model.graph.node:
        inputs = len(node.input) - (node.op_type == "Split")  # without the sizes, which stay on the CPU
        assert inputs + len(node.output) <= 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "ESCReal", "upscaling_factor": 4, "use_dysample": True}, "ESCReal with dysample"),
        ({"type": "ESCRealM"}, "ESCRealM with unshuffle_mod"),
    ],
)
def test_what_is_not_converted_is_named(lively_network, options, message):
    with pytest.raises(UserError, match=message):
        write_onnx(lively_network(**options), False, {}, 18)


def test_other_networks_are_refused():
    with pytest.raises(UserError, match="Conv2d cannot be written as ONNX"):
        write_onnx(torch.nn.Conv2d(3, 3, 1), False, {}, 18)


@pytest.mark.parametrize("kind", ["ESC", "ESCFP", "ESCReal"])
def test_half_precision_is_inside_alone(lively_network, kind, differences):
    net = lively_network(type=kind, upscaling_factor=4 if kind == "ESCReal" else 2)
    content = write_onnx(net, True, {}, 18)
    assert 1e-6 < max(differences(net, read_onnx(content))) < 5e-3
    assert len(content) < 0.75 * len(write_onnx(net, False, {}, 18))


@pytest.mark.parametrize("opset", [17, 20, 24])
def test_opset_is_what_was_asked_for(lively_network, opset, differences):
    net = lively_network()
    content = write_onnx(net, False, {}, opset)
    assert [(o.domain, o.version) for o in onnx.load_from_string(content).opset_import] == [("", opset)]
    assert max(differences(net, read_onnx(content))) < 1e-5


def test_model_is_of_standard_operators_and_says_what_it_is(lively_network):
    content = write_onnx(lively_network(), False, {"scale": "2", "network_g": "{}"}, 18)
    model = onnx.load_from_string(content)
    assert {node.domain for node in model.graph.node} == {""}
    assert not {"Loop", "Scan", "If"} & {node.op_type for node in model.graph.node}
    assert {entry.key: entry.value for entry in model.metadata_props} == {"scale": "2", "network_g": "{}"}
    assert model.ir_version == 8  # what came with opset 18, for runtimes as old as that
    (value,) = model.graph.input
    assert [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] == [
        *("batch", 3),
        *("height", "width"),
    ]


def test_images_of_a_batch_do_not_see_each_other(lively_network):
    net = lively_network()
    run = read_onnx(write_onnx(net, False, {}, 18))
    lr = torch.rand(3, 3, 6, 7)
    together = run(lr)
    for image, sr in zip(lr, together, strict=True):
        assert torch.allclose(run(image[None])[0], sr, atol=1e-6)


def test_position_bias_is_not_laid_out_in_the_file(lively_network):
    net = lively_network(window_size=32, dim=16)
    content = write_onnx(net, False, {}, 18)
    weights = sum(parameter.nbytes for parameter in net.parameters())
    assert len(content) < weights + 100_000
