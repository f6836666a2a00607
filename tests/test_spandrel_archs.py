import subprocess
import sys
from importlib import import_module

import pytest
import spandrel
import torch

from esc_basicsr import spandrel_archs
from esc_basicsr.archs.variants import NETWORKS, VARIANTS, build_variant
from esc_basicsr.export.torch_formats import write_torchscript
from esc_basicsr.weights.write import write_safetensors


@pytest.fixture(scope="module", autouse=True)
def installed():
    spandrel_archs.install()


@pytest.fixture
def net(tiny_network):
    keys = {key: value for key, value in tiny_network.items() if key != "type"}
    net = NETWORKS["ESC"](**keys).eval().requires_grad_(False)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def test_install_adds_both_once():
    before = len(spandrel.MAIN_REGISTRY)
    spandrel_archs.install()
    assert len(spandrel.MAIN_REGISTRY) == before
    assert "ESC" in spandrel.MAIN_REGISTRY and "ESCFP" in spandrel.MAIN_REGISTRY
    own = spandrel.ArchRegistry()
    spandrel_archs.install(own)
    assert len(own) == len(NETWORKS)


@pytest.mark.parametrize("kind", ["params", "params_ema", "both", "bare", "module.", "safetensors", "pt"])
def test_loader_reads_files_of_every_kind(net, tmp_path, kind):
    weights = net.state_dict()
    path = tmp_path / "ESC_x2.pth"
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        write_safetensors(path, weights, {"scale": "2"})
    elif kind == "pt":
        path = path.with_suffix(".pt")
        path.write_bytes(write_torchscript(net, False, {}))
    else:
        zeros = {key: torch.zeros_like(value) for key, value in weights.items()}
        contents = {
            "both": {"params": zeros, "params_ema": weights},
            "bare": weights,
            "module.": {f"module.{key}": value for key, value in weights.items()},
        }
        torch.save(contents.get(kind, {kind: weights}), path)
    model = spandrel.ModelLoader().load_from_file(path)
    assert isinstance(model, spandrel.ImageModelDescriptor)
    assert (model.architecture.id, model.architecture.name) == ("ESC", "ESC")
    assert (model.scale, model.purpose, model.input_channels, model.output_channels) == (2, "SR", 3, 3)
    assert model.size_requirements.none and model.tiling is spandrel.ModelTiling.DISCOURAGED
    lr = torch.rand(1, 3, 5, 9)
    assert torch.allclose(model(lr), net(lr).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [2, 4])
def test_published_networks_are_described(variant, scale):
    net = build_variant(variant, scale)
    model = spandrel.MAIN_REGISTRY.load(net.state_dict())
    assert model.scale == scale and model.tags[0] == variant
    assert model.architecture.id == ("ESCFP" if variant == "ESC-FP" else "ESC")
    assert type(model.model) is type(net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ESC", "ESCFP"])
def test_half_precision_that_is_promised_works(tiny_network, kind, dtype):
    tiny_network.pop("type")
    model = spandrel.MAIN_REGISTRY.load(NETWORKS[kind](**tiny_network).state_dict())
    lr = torch.rand(1, 3, 9, 6)
    exact = model(lr)
    sr = model.to(dtype)(lr.to(dtype))
    assert sr.dtype == dtype
    assert (sr.float() - exact).abs().max() < (5e-3 if dtype == torch.float16 else 4e-2)


def test_ours_are_not_taken_for_others(net, tiny_network):
    tiny_network.pop("type")
    for kind, weights in (
        ("ESC", net.state_dict()),
        ("ESCFP", NETWORKS["ESCFP"](**tiny_network).state_dict()),
    ):
        found = [support.architecture.id for support in spandrel.MAIN_REGISTRY if support.detect(weights)]
        assert found == [kind]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SPAN", {"num_in_ch": 3, "num_out_ch": 3}),
        ("PLKSR", {}),
        ("DAT", {"depth": [1], "num_heads": [2], "embed_dim": 16}),
        ("SwinIR", {"depths": [1], "num_heads": [2], "embed_dim": 16}),
        ("SAFMN", {"dim": 16, "n_blocks": 1}),
        ("OmniSR", {}),
    ],
)
def test_others_are_not_taken_for_ours(name, options):
    constructor = getattr(import_module(f"spandrel.architectures.{name}"), name)
    assert spandrel.MAIN_REGISTRY.load(constructor(**options).state_dict()).architecture.id == name


def test_what_is_no_network_is_not_ours():
    for weights in (
        {},
        {"proj.weight": None},
        {"proj.weight": torch.zeros(3), "to_img.bias": torch.zeros(12)},
    ):
        assert not any(spandrel.MAIN_REGISTRY[kind].detect(weights) for kind in ("ESC", "ESCFP"))


def test_install_needs_torch_and_spandrel_alone():
    script = """
import importlib.abc, importlib.util, sys
import spandrel

ABSENT = {"basicsr", "mmengine", "lmdb", "cv2", "yaml", "addict", "tqdm", "psutil", "tifffile", "onnx"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "basicsr" else real(name, *a)
from esc_basicsr import spandrel_archs
from esc_basicsr.archs import ESC
spandrel_archs.install()
net = ESC(2, dim=16, pdim=4, n_blocks=1, window_size=8, num_heads=2)
print(spandrel.MAIN_REGISTRY.load(net.state_dict()).architecture.id)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "ESC\n"), result.stderr
