import io
import json

import pytest
import torch

from esc_basicsr.common.errors import UserError
from esc_basicsr.export.torch_formats import (
    METADATA_FILE,
    read_exported,
    read_torchscript,
    write_exported,
    write_torchscript,
)

SIZES = [(1, 3, 2), (1, 4, 8), (2, 13, 11), (3, 1, 9), (2, 9, 2)]
FORMATS = {"torchscript": (write_torchscript, read_torchscript), "export": (write_exported, read_exported)}


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("torchscript", {}),
        ("torchscript", {"type": "ESCFP"}),
        ("torchscript", {"type": "ESCReal", "upscaling_factor": 4}),
        ("torchscript", {"type": "ESCRealM", "upsampler": "dysample"}),
        ("export", {}),
        ("export", {"type": "ESCReal", "upscaling_factor": 4, "use_dysample": True}),
    ],
)
def test_recorded_network_gives_the_same_at_any_size(lively_network, form, options):
    write, read = FORMATS[form]
    net = lively_network(**options, attn_type="Flex", conv_blocks=1)
    program = read(write(net, False, {}))
    for batch, height, width in SIZES:
        lr = torch.rand(batch, 3, height, width)
        expected = net(lr)
        assert torch.allclose(program(lr), expected, atol=1e-5 * float(expected.abs().max()))
    assert net.blocks[0].attn.attn_type == "Flex"  # the caller's network is as it was


def test_torchscript_takes_a_single_pixel_and_holds_no_device(lively_network):
    net = lively_network()
    content = write_torchscript(net, False, {"scale": "2"})
    program = read_torchscript(content)
    lr = torch.rand(2, 3, 1, 1)
    assert torch.allclose(program(lr), net(lr), atol=1e-5)
    assert 'prim::Constant[value="cpu"]' not in str(program.inlined_graph)
    about = {METADATA_FILE: ""}
    torch.jit.load(io.BytesIO(content), _extra_files=about)
    assert json.loads(about[METADATA_FILE]) == {"scale": "2"}


def test_half_precision_has_float32_in_and_out(lively_network):
    net = lively_network()
    program = read_torchscript(write_torchscript(net, True, {}))
    lr = torch.rand(1, 3, 9, 6)
    sr = program(lr)
    assert sr.dtype == torch.float32
    assert {parameter.dtype for parameter in program.parameters()} == {torch.float16}
    assert 1e-6 < (sr - net(lr)).abs().max() < 2e-2


def test_pytorch_that_cannot_record_is_told(lively_network, monkeypatch):
    def older_export(mod, args, *, dynamic_shapes=None, strict=True):
        raise AssertionError("not to be called")

    def failing_trace(*args, **kwargs):
        raise RuntimeError("no tracer here")

    monkeypatch.setattr(torch.export, "export", older_export)
    monkeypatch.setattr(torch.jit, "trace", failing_trace)
    with pytest.raises(UserError, match="update PyTorch, or use --format torchscript"):
        write_exported(lively_network(), False, {})
    with pytest.raises(UserError, match=r"cannot write TorchScript .RuntimeError: no tracer here"):
        write_torchscript(lively_network(), False, {})
