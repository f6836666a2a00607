"""Networks of any origin, by name, to measure and to look into: ESC, BasicSR's, spandrel's, files."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import yaml
from torch import Tensor

from esc_basicsr import fast
from esc_basicsr.archs.variants import RELEASED, build_variant, scales_of
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.suggestion import hint
from esc_basicsr.lab.networks.baselines import build_baseline, imported
from esc_basicsr.lab.networks.release import attend_as_released
from esc_basicsr.lab.networks.runtimes import ExportedNetwork, run_by_onnxruntime, run_by_openvino
from esc_basicsr.lab.networks.spandrel_arch import SpandrelNetwork, spandrel_architecture
from esc_basicsr.options.baselines import BASELINES
from esc_basicsr.options.loader import load_options
from esc_basicsr.weights.fit import load_weights
from esc_basicsr.weights.infer import infer_network_options
from esc_basicsr.weights.read import is_exported, read_weights
from esc_basicsr.weights.shipped import load_network, model_list, weights_file

# what follows a variant's name -> what it is
IMPLEMENTATIONS = {
    "": "ours",
    "plain": "ours, as the paper writes it",
    "release": "the release's",
    "release-flex": "the release's, compiled Flex",
    "kernels": "ours, C++ or Triton kernels",
    "kernels-bf16": "ours, C++ kernels in bfloat16",
    "compiled": "ours, torch.compile",
    "graphs": "ours, kernels in CUDA graphs",
    "onnxruntime": "our ONNX file, ONNX Runtime",
    "openvino": "our ONNX file, OpenVINO",
    "openvino-bf16": "our ONNX file, OpenVINO in bfloat16",
}
# those that compute in bfloat16 whatever their input is
IN_BF16 = ("kernels-bf16", "openvino-bf16")
_ON_CPU = ("kernels-bf16", "onnxruntime", "openvino", "openvino-bf16")

_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".safetensors")
_TORCHSCRIPT = "torchscript:"  # before a file whose code may run
_OPTION_FILES = (".yml", ".yaml")
_SCALE_OPTIONS = ("upscaling_factor", "upscale", "scale", "up_scale", "upscale_factor")
_PROBE = 64  # side of an image that any network should take


def _implementation(net: nn.Module, name: str) -> nn.Module:
    """Give an implementation of a network, whose weights it shares; of other networks than ESC's, itself."""
    match name:
        case "":
            return fast.prepare(net)
        case "kernels":
            fast.train_by_kernels(net)  # with gradients, too
            return fast.prepare(net, kernels=True)
        case "kernels-bf16":
            fast.require_bf16()
            fast.train_by_kernels(net)
            return fast.prepare(net, kernels=True, mode="eager+bf16")
        case "compiled":
            return fast.prepare(net, mode="compiled")
        case "graphs":
            return fast.prepare(net, kernels=True, mode="graphs")
        case "release" | "release-flex":
            return attend_as_released(net, compile_flex=name == "release-flex")
        case "onnxruntime":
            return ExportedNetwork(net, run_by_onnxruntime)
        case "openvino" | "openvino-bf16":
            return ExportedNetwork(net, functools.partial(run_by_openvino, bf16=name in IN_BF16))
    return net


class _Name(NamedTuple):
    network: str
    implementation: str  # a key of `IMPLEMENTATIONS`
    weights: str | None  # a file, or the name of what ships


def _parsed(name: str) -> _Name:
    """Split 'NETWORK:IMPLEMENTATION,weights=FILE'; variants alone have implementations."""
    network, separator, weights = name.rpartition(",weights=")
    if not separator:
        network, weights = name, ""
    variant, _, implementation = network.partition(":")
    if variant not in RELEASED or implementation not in IMPLEMENTATIONS:
        variant, implementation = network, ""
    return _Name(variant, implementation, weights or None)


def network_of(name: str) -> str:
    """Return what implementations of one network have in common."""
    network, _, weights = _parsed(name)
    return f"{network},weights={weights}" if weights else network


def implementation_of(name: str) -> str:
    """Return the implementation that a name asks for, a key of `IMPLEMENTATIONS`."""
    return _parsed(name).implementation


def weights_of(name: str) -> str | None:
    """Return where weights come from: a file, the name of a network that ships; None if nowhere."""
    network, _, weights = _parsed(name)
    comes_with_weights = network in model_list() or Path(network).suffix.lower() in _CHECKPOINTS
    return weights or (network.removeprefix(_TORCHSCRIPT) if comes_with_weights else None)


def check_implementations(names: list[str], device: torch.device, dtype: torch.dtype) -> None:
    """Refuse implementations that would run as another one.

    Raises:
        UserError: ':kernels' in half precision on a CPU; an implementation for CPUs on a GPU, or in another
            precision than its name says.
    """
    for name in names:
        implementation = implementation_of(name)
        if implementation in ("kernels", "graphs") and device.type == "cpu" and dtype != torch.float32:
            raise UserError(
                f"{name}: measure the C++ kernels in bfloat16 as '{network_of(name)}:kernels-bf16', without "
                "--precision; leave it out here."
            )
        if implementation in _ON_CPU and (device.type != "cpu" or dtype != torch.float32):
            raise UserError(f"{name}: runs on a CPU, its input in float32; leave it out here.")


def scale_of(name: str, scale: int) -> int:
    """Return the scale of a network if ``scale`` is asked for: its own, if it has one, as a checkpoint does.

    Raises:
        UserError: There is no such network, or it does not upscale an image.
    """
    network, _, weights = _parsed(name)
    if weights and (own := _scale_of_weights(weights)) is not None:
        return own
    if network in RELEASED and scale not in scales_of(network):
        (own,) = scales_of(network)
        raise UserError(f"{network} is for ×{own} alone: ask for that scale, or for ESC-RealM.")
    if network in (*RELEASED, *BASELINES):
        return scale
    net = build_network(name, scale).eval()
    size = (1, 3, _PROBE, _PROBE)
    try:
        with torch.inference_mode():
            sr = net(torch.rand(size))
    except Exception as error:  # whatever a network raises that is made for something else
        raise UserError(
            f"{name}: cannot be measured: given an image of {size}, it fails ({described(error)})."
        ) from error
    shape = tuple(sr.shape) if isinstance(sr, Tensor) else type(sr).__name__
    own = sr.shape[-1] // _PROBE if isinstance(sr, Tensor) else 0
    if own > 1 and shape == (1, 3, _PROBE * own, _PROBE * own):
        return own
    raise UserError(f"{name}: does not upscale an image: given one of {size}, it returns {shape}.")


def build_network(name: str, scale: int, device: torch.device | str = "cpu") -> nn.Module:
    """Build a network by its name, on a device.

    Weights are random but for those of files and of what ships, and the same for each implementation.

    Raises:
        UserError: There is no such network, or it cannot be built.
    """
    network, implementation, weights = _parsed(name)
    net = _build(network, scale)
    if weights is not None:
        _load(net, network, weights, scale)
    if network.startswith("spandrel."):
        net = _described_by_spandrel(network, lambda spandrel: spandrel.MAIN_REGISTRY.load(net.state_dict()))
    return _implementation(net.to(device), implementation)


def _build(name: str, scale: int) -> nn.Module:
    torch.manual_seed(0)
    suffix = Path(name).suffix.lower()
    if name in model_list():
        return load_network(name).network
    if name in RELEASED:
        net = build_variant(name, scale)
        give_predictors_weights(net)
        return net
    if name in BASELINES:
        return build_baseline(name, scale)
    if name.startswith(_TORCHSCRIPT):
        path = name.removeprefix(_TORCHSCRIPT)
        try:
            script: nn.Module = torch.jit.load(path, map_location="cpu")
        except Exception as error:  # what PyTorch raises depends on the bytes
            raise UserError(f"{path}: cannot be read as TorchScript ({described(error)}).") from error
        return script
    if suffix in _CHECKPOINTS:
        return _read_checkpoint(Path(name))
    if suffix in _OPTION_FILES:
        options = load_options(name)
        if "network_g" not in options:
            raise UserError(f"{name}: there is no network_g section.")
        network = {**options["network_g"]}
        return _construct(name, _registered(name, str(network.pop("type", None))), network)
    kind, given = _kind_and_options(name)
    constructor: Callable[..., nn.Module]
    if kind.startswith("spandrel."):
        constructor = spandrel_architecture(kind.removeprefix("spandrel."))
    else:
        constructor = _registered(name, kind)
    scales = {key: scale for key in _SCALE_OPTIONS if key in inspect.signature(constructor).parameters}
    return _construct(name, constructor, scales | given)


def _load(net: nn.Module, network: str, file: str, scale: int) -> None:
    """Load weights of this network and this scale; others are converted for trainings alone."""
    own = _scale_of_weights(file)
    if own not in (None, scale):
        raise UserError(f"{file} holds weights of scale ×{own}, not ×{scale}.")
    try:
        load_weights(net, read_weights(weights_file(file), "params_ema"), file)
    except UserError as error:
        # which keys do not fit takes many lines: the first few tell a wrong file
        reason = " ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UserError(f"{file} cannot be loaded into {network} ×{scale}: {reason}") from error


def _scale_of_weights(file: str) -> int | None:
    """Return the scale that weights of ESC are of; None of others, whose file does not tell."""
    options = infer_network_options(read_weights(weights_file(file), "params_ema"))
    return None if options is None else int(options["upscaling_factor"])


def give_predictors_weights(net: nn.Module) -> None:
    """Give ESC's kernel predictors weights: at first they are 0, and no measurement would notice them."""
    for parameter in net.parameters():
        if parameter.ndim == 4 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def _kind_and_options(name: str) -> tuple[str, dict[str, Any]]:
    """Split 'KIND,key=value,key=value'; values are YAML."""
    kind, *pairs = re.split(r",(?=\w+=)", name)
    options = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{name}: {value!r} is no value for {key}.") from error
    return kind, options


def _registered(name: str, kind: str) -> Callable[..., nn.Module]:
    """Find a class of BasicSR's registry."""
    import basicsr.archs  # noqa: F401 - fills the registry
    from basicsr.utils.registry import ARCH_REGISTRY

    known = dict(iter(ARCH_REGISTRY))  # else dict() takes it for a mapping
    for key in (kind, f"{kind}_basicsr"):  # as BasicSR itself looks them up
        if key in known:
            return known[key]
    implementations = ", ".join(f"':{key}'" for key in IMPLEMENTATIONS if key)
    raise UserError(
        f"{name!r} is no network: expected {', '.join(RELEASED)}, with {implementations} or without; a "
        f"baseline of the paper's, {', '.join(BASELINES)}; a network of "
        "BasicSR's registry, or of spandrel as spandrel.NAME, with ',option=value' where it needs options; a "
        "YAML file with a network_g section; each with ',weights=FILE' for trained weights; or a checkpoint "
        "of ESC, one that spandrel reads, or a TorchScript file as torchscript:FILE. "
        f"{hint(kind, [*RELEASED, *BASELINES, *known])}".rstrip()
    )


def _construct(name: str, constructor: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """Build by options, after checking that they are given and no others.

    Raises:
        UserError: They are not, or the constructor does not take their values.
    """
    parameters = inspect.signature(constructor).parameters
    takes = [key for key, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    if unknown := [key for key in options if key not in takes and not takes_any]:
        raise UserError(f"{name}: there is no option {unknown[0]!r}. {hint(unknown[0], takes)}".rstrip())
    missing = [
        key for key in takes if parameters[key].default is inspect.Parameter.empty and key not in options
    ]
    if missing:
        needed = "".join(f",{key}=..." for key in missing)
        raise UserError(f"{name}: this network needs {', '.join(missing)} as well: write '{name}{needed}'.")
    try:
        return constructor(**options)
    except Exception as error:  # whatever a foreign constructor makes of values that do not fit
        raise UserError(f"{name}: cannot be built with these options ({described(error)}).") from error


def described(error: Exception) -> str:
    """Describe an error of foreign code: its type, and what it says."""
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _read_checkpoint(path: Path) -> nn.Module:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    if is_exported(path):
        raise UserError(
            f"{path}: an exported network holds code, which would run here and can do whatever you can. If "
            f"you trust the file, write '{_TORCHSCRIPT}{path}'."
        )
    try:
        is_ours = infer_network_options(read_weights(path, "params_ema")) is not None
    except UserError:  # of a form that spandrel may read
        is_ours = False
    if is_ours:
        return load_network(path).network
    return _described_by_spandrel(str(path), lambda spandrel: spandrel.ModelLoader().load_from_file(path))


def _described_by_spandrel(name: str, load: Callable[[Any], Any]) -> nn.Module:
    """Give the network that spandrel finds in weights: with it come its scale and the sizes it takes."""
    spandrel = imported("spandrel", "this network")
    try:
        descriptor = load(spandrel)
    except Exception as error:  # what spandrel raises depends on the bytes
        raise UserError(f"{name}: spandrel does not know these weights ({described(error)}).") from error
    if not isinstance(descriptor, spandrel.ImageModelDescriptor):
        raise UserError(f"{name}: this network takes more than an image.")
    return SpandrelNetwork(descriptor)
