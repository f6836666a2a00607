"""Names give the networks that they say, and a name that gives none says why."""

import subprocess
import sys

import pytest
import torch
import yaml

from esc_basicsr.archs.variants import NETWORKS, build_variant, scales_of
from esc_basicsr.common.errors import UserError
from esc_basicsr.export.torch_formats import write_torchscript
from esc_basicsr.fast import kernels
from esc_basicsr.lab.networks import baselines
from esc_basicsr.lab.networks.by_name import (
    build_network,
    check_implementations,
    network_of,
    scale_of,
    weights_of,
)
from esc_basicsr.training.shared_validation import published_variant
from esc_basicsr.weights.shipped import model_list


def test_forms_of_a_variant_share_weights_that_matter():
    ours, release = build_network("ESC", 2), build_network("ESC:release", 2)
    for a, b in zip(ours.parameters(), release.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(p.any() for p in ours.parameters() if p.ndim == 4)


def test_kernels_give_what_the_network_gives():
    lq = torch.rand(1, 3, 33, 40)
    with torch.inference_mode():
        difference = build_network("ESC-light:kernels", 2)(lq) - build_network("ESC-light", 2)(lq)
    assert difference.abs().max() < 1e-5


def test_kernels_in_bfloat16_come_close_or_are_refused(monkeypatch):
    lq = torch.rand(1, 3, 33, 40)
    if kernels.load().has_bf16:
        with torch.inference_mode():
            expected = build_network("ESC-light", 2)(lq)
            difference = build_network("ESC-light:kernels-bf16", 2)(lq) - expected
        assert 1e-5 < difference.abs().max() < 0.1 * expected.abs().max()
    library = kernels.load()._replace(has_bf16=False)
    monkeypatch.setattr(kernels, "load", lambda: library)
    with pytest.raises(UserError, match="bfloat16 would be slower than float32 on this CPU"):
        build_network("ESC-light:kernels-bf16", 2)


@pytest.mark.parametrize("implementation", ["kernels", "graphs"])
def test_no_kernel_is_compiled_for_another_device(implementation, monkeypatch):
    def load():
        raise AssertionError("the C++ kernels were compiled")

    monkeypatch.setattr(kernels, "load", load)
    net = build_network(f"ESC-FP:{implementation}", 2, "meta")
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}


def test_kernels_are_refused_where_they_would_not_be_used():
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        check_implementations(["ESC:kernels", "ESC"], torch.device(device), dtype)
    with pytest.raises(UserError, match="in bfloat16 as 'ESC:kernels-bf16', without --precision"):
        check_implementations(["ESC:kernels"], torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_of_onnx_files_give_what_the_network_gives(runtime):
    pytest.importorskip(runtime)
    net = build_network(f"ESC-FP:{runtime}", 2).eval()
    for size in ((1, 3, 20, 33), (2, 3, 9, 12)):
        lq = torch.rand(size)
        with torch.inference_mode():
            torch.testing.assert_close(net(lq), build_network("ESC-FP", 2).eval()(lq), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="has no gradients"):
        net(lq)


# By what came before them networks end in another order than they began.
TWO_BY_OPENVINO = """
import faulthandler, signal, subprocess, sys, torch
from esc_basicsr.lab.networks.by_name import build_network
faulthandler.enable()  # gives the thread a stack for signals
signal.signal(signal.SIGCHLD, lambda *_: None)
with torch.inference_mode():
    nets = [build_network("ESC-FP:openvino", 2).eval() for _ in range(2)]
    for net in nets:
        net(torch.rand(1, 3, 9, 12))
    del net, nets[0]
    nets.clear()
subprocess.run([sys.executable, "-c", "pass"], check=True)
"""


def test_signals_arrive_after_openvino():
    pytest.importorskip("openvino")
    subprocess.run([sys.executable, "-c", TWO_BY_OPENVINO], check=True)


def test_a_runtime_that_is_missing_is_named(monkeypatch):
    net = build_network("ESC-FP:openvino", 2)
    monkeypatch.setitem(baselines.importlib.sys.modules, "openvino", None)
    with torch.inference_mode(), pytest.raises(UserError, match=r"needs the package openvino, .*pip install"):
        net(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float32), ("cpu", torch.bfloat16)])
def test_runtimes_are_refused_where_they_would_not_be_used(device, dtype):
    for name in ("ESC:openvino", "ESC:openvino-bf16", "ESC:onnxruntime", "ESC:kernels-bf16"):
        check_implementations([name], torch.device("cpu"), torch.float32)
        with pytest.raises(UserError, match=f"{name}: runs on a CPU"):
            check_implementations([name], torch.device(device), dtype)


def test_implementations_of_the_network_for_photographs_agree():
    lq = torch.rand(1, 3, 9, 12)
    with torch.inference_mode():
        ours, release, kernels = (
            build_network(f"ESC-Real{form}", 4).eval()(lq) for form in ("", ":release", ":kernels")
        )
    assert ours.shape == (1, 3, 36, 48)
    for other in (release, kernels):
        torch.testing.assert_close(other, ours, rtol=0, atol=1e-5)
    assert [scale_of("ESC-RealM", scale) for scale in (2, 3)] == [2, 3]
    with pytest.raises(UserError, match="ESC-Real is for ×4 alone: ask for that scale, or for ESC-RealM"):
        scale_of("ESC-Real", 2)


@pytest.mark.parametrize("name", ["ESC-XL", "ESC-Real", "ESC-RealM"])
def test_released_variants_are_recognized_by_their_weights(name):
    assert published_variant(build_variant(name, scales_of(name)[0])) == name


def test_a_network_is_what_its_forms_have_in_common():
    assert network_of("ESC-light:kernels") == network_of("ESC-light") == "ESC-light"
    assert network_of("MSRResNet") == "MSRResNet"


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize(
    "name", ["ESC", "MSRResNet", "SRVGGNetCompact,num_feat=8", "EDSR,num_in_ch=3,num_out_ch=3,num_block=1"]
)
def test_a_network_of_the_registry_takes_the_scale_and_options(name, scale):
    assert scale_of(name, scale) == scale


def test_an_option_file_has_a_scale_of_its_own(tmp_path):
    file = tmp_path / "net.yml"
    file.write_text("network_g: {type: MSRResNet, num_feat: 4, num_block: 1, upscale: 3}")
    assert scale_of(str(file), 4) == 3


@pytest.mark.parametrize(
    "name, message",
    [
        ("MSRResNe", r"is no network: .* Did you mean 'MSRResNet'\?"),
        ("EDSR", "EDSR: this network needs num_in_ch, num_out_ch as well: write 'EDSR,num_in_ch=...,num_out"),
        ("MSRResNet,num_feet=3", r"there is no option 'num_feet'. Did you mean 'num_feat'\?"),
        ("MSRResNet,upscale=5", r"cannot be (built|measured)"),
        ("MSRResNet,num_feat=[1", "'.1' is no value for num_feat"),
        ("MSRResNet,num_feat=-1", "cannot be built with these options"),
        ("EDVR", r"EDVR: cannot be measured: given an image of \(1, 3, 64, 64\), it fails \(ValueError"),
        ("UNetDiscriminatorSN,num_in_ch=3,num_feat=4", "does not upscale an image: given one of"),
        ("VGGStyleDiscriminator,num_in_ch=3,num_feat=4,input_size=64", "cannot be"),
    ],
)
def test_what_is_no_network_for_this_says_why(name, message):
    with pytest.raises(UserError, match=message):
        scale_of(name, 4)


def test_trained_weights_come_from_files(tmp_path, tiny_network):
    options = tmp_path / "tiny.yml"
    options.write_text(yaml.safe_dump({"network_g": tiny_network}))
    trained = NETWORKS[tiny_network.pop("type")](**tiny_network).eval()
    torch.nn.init.normal_(trained.to_img.weight, std=0.1)
    checkpoint, script = tmp_path / "tiny.pth", tmp_path / "tiny.pt"
    torch.save({"params": trained.state_dict()}, checkpoint)
    lq = torch.rand(1, 3, 9, 12)
    script.write_bytes(write_torchscript(trained, half=False, metadata={}))
    with torch.inference_mode():
        expected = trained(lq)
        for name in (str(checkpoint), f"torchscript:{script}", f"{options},weights={checkpoint}"):
            torch.testing.assert_close(build_network(name, 2).eval()(lq), expected, rtol=0, atol=1e-6)
            assert scale_of(name, 4) == 2
            assert weights_of(name) == str(script if name.startswith("torchscript:") else checkpoint)
        assert not torch.equal(build_network(str(options), 2)(lq), expected)
    assert weights_of(str(options)) is None
    # nothing is converted to another scale, as it is for trainings
    with pytest.raises(UserError, match="holds weights of scale ×2, not ×4"):
        build_network(f"ESC,weights={checkpoint}", 4)
    with pytest.raises(UserError, match="cannot be loaded into MSRResNet ×2: "):
        build_network(f"MSRResNet,weights={checkpoint}", 2)
    script.write_bytes(script.read_bytes()[:-30])
    with pytest.raises(UserError, match="does not know these weights"):
        build_network(str(script), 4)
    with pytest.raises(UserError, match="cannot be read as TorchScript"):
        build_network(f"torchscript:{script}", 4)


def test_code_in_a_file_runs_when_asked_for_in_so_many_words_alone(tmp_path, capfd):
    class Loud(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            print("the file's code runs")
            return torch.nn.functional.interpolate(x, scale_factor=2.0)

    file = tmp_path / "loud.pth"
    torch.jit.script(Loud()).save(file)
    with pytest.raises(UserError, match=r"holds code, which would run here.*torchscript:"):
        scale_of(str(file), 4)
    assert "runs" not in capfd.readouterr().out
    assert scale_of(f"torchscript:{file}", 4) == 2
    assert "runs" in capfd.readouterr().out


def test_forms_take_trained_weights_and_what_ships_by_its_name():
    name = next(iter(model_list()))
    listed = model_list()[name]
    lq = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        expected = build_network(name, listed.scale).eval()(lq)
        for form in ("", ":kernels", ":release"):
            with_weights = f"{listed.variant}{form},weights={name}"
            assert scale_of(with_weights, 4) == listed.scale
            difference = build_network(with_weights, listed.scale).eval()(lq) - expected
            assert difference.abs().max() < 1e-4


def test_an_option_file_needs_a_network(tmp_path):
    file = tmp_path / "empty.yml"
    file.write_text("scale: 4")
    with pytest.raises(UserError, match="there is no network_g section"):
        build_network(str(file), 4)


def test_spandrel_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(baselines.importlib.sys.modules, "spandrel", None)
    with pytest.raises(UserError, match=r"needs the package spandrel, .*: pip install spandrel"):
        build_network("spandrel.DAT", 4)


def test_a_checkpoint_that_is_not_there_is_told():
    with pytest.raises(UserError, match=r"absent.pth: there is no such file"):
        build_network("absent.pth", 4)


def test_spandrel_gives_architectures_and_reads_checkpoints(tmp_path):
    name = "spandrel.Compact,num_feat=8,num_conv=1"
    assert scale_of(name, 3) == 3
    file = tmp_path / "compact_x3.pth"
    torch.save(build_network(name, 3).model.state_dict(), file)
    assert scale_of(str(file), 4) == 3
    lq = torch.rand(1, 3, 9, 10)
    assert torch.equal(build_network(str(file), 4)(lq), build_network(name, 3)(lq))


def test_what_spandrel_does_not_know_is_told(tmp_path):
    file = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"other.pth: spandrel does not know these weights"):
        build_network(str(file), 4)
    with pytest.raises(UserError, match=r"spandrel has no network 'Dat'. Did you mean 'DAT'\?"):
        build_network("spandrel.Dat", 4)
