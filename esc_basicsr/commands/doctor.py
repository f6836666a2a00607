"""Tell what is installed, what works on this machine, and what is wrong, to be read or sent with a question.

  python -m esc_basicsr doctor

Ends with 1 where something is wrong that ESC cannot do without, else with 0.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from esc_basicsr.archs.esc_arch import ESC
from esc_basicsr.basicsr_host.copies import copies
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.version import __version__
from esc_basicsr.fast import kernels

_PACKAGES = (
    *("torch", "torchvision", "basicsr", "mmengine", "lmdb", "opencv-python", "numpy", "scipy", "pillow"),
    *("safetensors", "pyyaml", "addict", "tifffile", "imagecodecs", "psutil", "filelock", "tqdm", "wrapt"),
)
# without them there is training alone that does not work, and BasicSR needs torchvision
_OF_TRAINING = ("basicsr", "torchvision")
# package -> what for
_EXTRAS = {
    "onnx": "export --format onnx",
    "onnxruntime": "checking an ONNX file",
    "openvino": "export --format openvino, bench of OpenVINO",
    "pnnx": "export --format ncnn",
    "ncnn": "checking an ncnn model",
    "av": "films",
    "pillow-heif": "HEIC",
    "pillow-jxl-plugin": "JPEG XL",
    "matplotlib": "pictures of bench, compare and analyze",
    "spandrel": "ATD-light and OmniSR, bench of its architectures, ESC in its programs",
    "mamba-ssm": "MambaIRv2's scan by its kernel, on a GPU; ours in PyTorch needs nothing",
    "tensorboard": "logger.use_tb_logger",
}
_REGISTERED = {
    **{"arch": ("ESC", "ESCFP", "ESCReal", "ESCRealM"), "model": ("ESCModel",)},
    **{"dataset": ("DFLIPDataset", "DegradedDataset"), "loss": ("YChannelL1Loss",)},
}
_GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing: the command has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print all findings; those that are wrong once more at the end."""
    problems: list[str] = []
    for title, examine in (
        ("Versions", _versions),
        ("Devices", _devices),
        ("Attention", _backends),
        ("BasicSR", _basicsr),
    ):
        print(f"{title}")
        for name, message, is_wrong in examine():
            print(f"  {name:<16} {message}")
            if is_wrong:
                problems.append(f"{name}: {message}")
        print()
    print("\n  ".join(["Wrong:", *problems]) if problems else "All is well.")
    return 1 if problems else 0


# Each gives (name, finding, whether it is wrong).
Findings = Iterator[tuple[str, str, bool]]


def _versions() -> Findings:
    yield "esc_basicsr", f"{__version__}, {Path(__file__).parents[1]}", False
    yield "python", f"{platform.python_version()}, {platform.platform()}", False
    for name in _PACKAGES:
        version = _version(name)
        yield name, version or "is not installed", version is None and name not in _OF_TRAINING
    for name, purpose in _EXTRAS.items():
        yield name, _version(name) or f"is not installed: {purpose} needs it", False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # under another distribution's name, such as opencv-python-headless or tb-nightly
        modules = {"opencv-python": "cv2", "pillow": "PIL", "pyyaml": "yaml", "mamba-ssm": "mamba_ssm"}
        module = modules.get(package, package)
        if importlib.util.find_spec(module) is None:
            return None
        return str(getattr(importlib.import_module(module), "__version__", "of unknown version"))


def _devices() -> Findings:
    yield "CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", False
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ": this PyTorch is built without CUDA"
        yield "GPU", f"none that PyTorch can use{built}", False
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield f"cuda:{number}", f"{properties.name}, {properties.total_memory / _GIB:.1f} GiB", False
    try:
        library = kernels.load()
    except UserError as error:
        yield "C++ kernels", f"do not work, networks run without: {error}", False
    else:
        multiplier = "AMX" if library.has_amx else "AVX-512 BF16"
        half = f"bfloat16 by {multiplier}" if library.has_bf16 else "no instructions for bfloat16"
        yield "C++ kernels", f"work, {half}", False


def _backends() -> Findings:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: Any = {"dim": 16, "pdim": 4, "n_blocks": 1, "conv_blocks": 1, "window_size": 16, "num_heads": 1}
    for name in ("Naive", "SDPA", "Flex"):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ESC(2, attn_type=name, **options).to(device)(torch.rand(1, 3, 16, 16, device=device))
        except Exception as error:  # whatever it is, it is reported
            reason, _, _ = str(error).partition("\n")
            # of the fused ones, one is enough; `auto` takes what there is
            yield name, f"fails: {type(error).__name__}: {reason}", name == "Naive"
        else:
            yield name, "works", False


def _basicsr() -> Findings:
    found = copies()
    if not found:
        yield "installed", "no: the networks work, training and testing do not (pip install basicsr)", False
        return
    yield "imported from", str(found[0]), False
    for other in found[1:]:
        yield (
            "another one",
            f"{other}: it is shadowed by the first. What is registered with one is unknown to the other "
            "('No object named ... found'): remove one of them, or start in another folder",
            True,
        )
    try:
        patches = importlib.import_module("esc_basicsr.basicsr_host.patches")
        registry = importlib.import_module("basicsr.utils.registry")
    except ImportError as error:
        yield "import", f"fails: {error}", True
        return
    for kind, names in _REGISTERED.items():
        own = getattr(registry, f"{kind.upper()}_REGISTRY")
        missing = [name for name in names if name not in own]
        message = f"without {', '.join(missing)}" if missing else ", ".join(names)
        yield f"{kind} registry", message, bool(missing)
    for patch in patches.active():
        yield "patched", f"{patch.name}: {patch.purpose}", False
