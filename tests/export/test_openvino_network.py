import pytest

openvino = pytest.importorskip("openvino")

from esc_basicsr.export.openvino_network import core, read_openvino, write_openvino  # noqa: E402

NETWORKS = {
    "ESC": {},
    "layer norm": {"use_ln": True, "window_size": 5, "conv_blocks": 1},
    "ESC-FP": {"type": "ESCFP"},
    "ESCReal": {"type": "ESCReal", "upscaling_factor": 4},
    "ESCRealM": {"type": "ESCRealM", "upscaling_factor": 3, "upsampler": "transpose+conv"},
}


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 5e-3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_openvino_gives_what_the_network_gives_at_any_size(
    lively_network, name, half, tolerance, differences
):
    net = lively_network(**NETWORKS[name])
    assert max(differences(net, read_openvino(write_openvino(net, half, {})))) < tolerance


def test_model_names_input_and_output_and_says_what_it_is(lively_network):
    model = core().read_model(*write_openvino(lively_network(), False, {"scale": "2", "network_g": "{}"}))
    assert (model.input().any_name, model.output().any_name) == ("lr", "sr")
    assert model.get_rt_info(["esc_basicsr", "scale"]).astype(str) == "2"
    assert model.get_rt_info(["esc_basicsr", "network_g"]).astype(str) == "{}"


def test_half_precision_halves_the_weights(lively_network):
    net = lively_network()
    assert len(write_openvino(net, True, {})[1]) < 0.75 * len(write_openvino(net, False, {})[1])
