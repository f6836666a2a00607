from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("ncnn")
pytest.importorskip("pnnx")

from esc_basicsr.common.errors import UserError
from esc_basicsr.export.ncnn_network import _reflect, read_ncnn, write_ncnn

NETWORKS = {
    "ESC": {"conv_blocks": 1},
    "layer norm": {"use_ln": True, "window_size": 5, "conv_blocks": 1},
    "ESC-FP": {"type": "ESCFP", "conv_blocks": 1},
    "attention": {"token_mixer": "attention", "conv_blocks": 1},
    "ESCReal": {"type": "ESCReal", "upscaling_factor": 4, "conv_blocks": 1},
    "transpose+conv": {"type": "ESCRealM", "upscaling_factor": 3, "upsampler": "transpose+conv"},
    "unshuffled": {"type": "ESCRealM", "upscaling_factor": 1, "conv_blocks": 1},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_ncnn_gives_what_the_network_gives_at_any_size(lively_network, name, differences):
    net = lively_network(**NETWORKS[name])
    assert max(differences(net, read_ncnn(write_ncnn(net, False, {})))) < 1e-5


@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 3000), (torch.bfloat16, 700)])
def test_reflection_counts_far_enough_in_half_precision(dtype, width):
    wide = torch.rand(1, 2, 9, width, dtype=dtype)
    expected = F.pad(wide.float(), (5, 7, 5, 7), mode="reflect")
    assert torch.equal(_reflect(wide, 5, 7).float(), expected)


def test_half_precision_is_the_weights_alone(lively_network, differences):
    net = lively_network(conv_blocks=1)
    content = write_ncnn(net, True, {})
    assert 1e-6 < max(differences(net, read_ncnn(content))) < 5e-3
    assert len(content[1]) < 0.75 * len(write_ncnn(net, False, {})[1])


def test_position_bias_is_not_laid_out_in_the_file(lively_network):
    net = lively_network(window_size=12, conv_blocks=1)
    laid_out = 4 * net.blocks[0].attn.num_heads * 12**4
    assert len(write_ncnn(net, False, {})[1]) < laid_out


def test_operators_without_a_layer_are_named(lively_network):
    net = lively_network(type="ESCReal", upscaling_factor=4, use_dysample=True, conv_blocks=1)
    with pytest.raises(UserError, match=r"ESCReal .* no layer for .*pnnx.Expression.*write TorchScript"):
        write_ncnn(net, False, {})


def test_what_pnnx_cannot_read_is_told(lively_network, monkeypatch):
    monkeypatch.setattr(torch.jit.ScriptModule, "save", lambda self, file: Path(file).write_bytes(b"no"))
    with pytest.raises(UserError, match=r"pnnx .* cannot convert this network \("):
        write_ncnn(lively_network(), False, {})


def test_what_ncnn_does_not_take_is_told():
    with pytest.raises(UserError, match=r"ncnn .* does not take this network"):
        read_ncnn((b"no", b""))
