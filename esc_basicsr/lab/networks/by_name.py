"""Networks of any origin, by name, to measure and to look into: ESC, BasicSR's, spandrel's, files."""

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import yaml
from torch import Tensor

from esc_basicsr import fast
from esc_basicsr.archs.variants import VARIANTS, build_variant
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.suggestion import hint
from esc_basicsr.lab.networks.reference import ReferenceNetwork
from esc_basicsr.lab.networks.variants import RIVALS, build_rival
from esc_basicsr.options.loader import load_options
from esc_basicsr.weights.checkpoint import infer_network_options, is_exported, load_weights, read_weights
from esc_basicsr.weights.shipped import load_network, model_list, weights_file

__all__ = [
    "FORMS",
    "build",
    "check_forms",
    "give_predictors_weights",
    "network_of",
    "scale_of",
    "weights_of",
]

# what follows a variant's name -> what it is
FORMS = {
    "": "ours",
    "plain": "ours, as archs has it",
    "release": "the release's form",
    "release-flex": "the release's form, compiled Flex",
    "kernels": "ours, C++ kernels",
    "compiled": "ours, torch.compile",
}

_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".safetensors")
_OPTION_FILES = (".yml", ".yaml")
_WITH_WEIGHTS = re.compile(r"(?P<network>.+),weights=(?P<file>.+)")
_SCALE_OPTIONS = ("upscaling_factor", "upscale", "scale", "up_scale", "upscale_factor")
_PROBE = 64  # side of an image that any network should take


class CompiledNetwork(nn.Module):
    """A network that runs by torch.compile, whole; sizes that vary are compiled for once.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.compiled = torch.compile(net.forward)

    def forward(self, x: Tensor) -> Tensor:
        """Upscale a batch of images."""
        try:
            sr: Tensor = self.compiled(x)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, no Triton, an operation that it does not take
            raise UserError(f"torch.compile failed: {_described(error)}") from error
        return sr


class SpandrelNetwork(nn.Module):
    """A network as spandrel runs it: padded to the size that it requires, and cropped.

    Args:
        descriptor: spandrel's ImageModelDescriptor.
    """

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.model = descriptor.model
        self.descriptor = descriptor

    def forward(self, x: Tensor) -> Tensor:
        """Upscale an image."""
        return self.descriptor(x)


def network_of(name: str) -> str:
    """What forms of one network have in common: the name without its form."""
    variant, _, form = name.partition(":")
    return variant if variant in VARIANTS and form in FORMS else name


def check_forms(names: list[str], device: torch.device, dtype: torch.dtype) -> None:
    """Refuse forms that would run as another one.

    Raises:
        UserError: ':kernels' anywhere but on a CPU, in float32.
    """
    for name in names:
        if name.endswith(":kernels") and (device.type != "cpu" or dtype != torch.float32):
            raise UserError(f"{name}: the C++ kernels are for float32 on a CPU; leave this form out here.")


def scale_of(name: str, scale: int) -> int:
    """The scale of a network if ``scale`` is asked for: its own, if it has one, as a checkpoint does.

    Raises:
        UserError: There is no such network, or it does not upscale an image.
    """
    with_weights = _WITH_WEIGHTS.fullmatch(name)
    if with_weights is not None and (own := _scale_of_weights(with_weights["file"])) is not None:
        return own
    if network_of(name) in VARIANTS or name in RIVALS:
        return scale
    net = build(name, scale).eval()
    size = (1, 3, _PROBE, _PROBE)
    try:
        with torch.inference_mode():
            sr = net(torch.rand(size))
    except Exception as error:  # whatever a network raises that is made for something else
        raise UserError(
            f"{name}: cannot be measured: given an image of {size}, it fails ({_described(error)})."
        ) from error
    if isinstance(sr, Tensor):
        found = sr.shape[-1] // _PROBE
        if found > 1 and sr.shape == (1, 3, _PROBE * found, _PROBE * found):
            return found
    shape = tuple(sr.shape) if isinstance(sr, Tensor) else type(sr).__name__
    raise UserError(f"{name}: does not upscale an image: given one of {size}, it returns {shape}.")


def build(name: str, scale: int) -> nn.Module:
    """Build a network by its name.

    Weights are random but for those of files and of what ships, and the same for each form of a variant.

    Raises:
        UserError: There is no such network, or it cannot be built.
    """
    if with_weights := _WITH_WEIGHTS.fullmatch(name):
        load = functools.partial(_load, with_weights["network"], with_weights["file"], scale)
        return _build(with_weights["network"], scale, load)
    return _build(name, scale, _keep)


# Gives a network, not wrapped yet, the weights that it is to have.
Load = Callable[[nn.Module], nn.Module]


def _build(name: str, scale: int, load: Load) -> nn.Module:
    if name in model_list():
        return load(load_network(name).network)
    variant = network_of(name)
    if variant in VARIANTS:
        return _build_form(variant, name.partition(":")[2], scale, load)
    if name in RIVALS:
        torch.manual_seed(0)
        return load(build_rival(name, scale))
    suffix = Path(name).suffix.lower()
    if suffix in _CHECKPOINTS:
        return load(_read_checkpoint(Path(name)))
    if suffix in _OPTION_FILES:
        options = load_options(name)
        if "network_g" not in options:
            raise UserError(f"{name}: there is no network_g section.")
        kind, network = str(options["network_g"].get("type")), dict(options["network_g"])
        network.pop("type", None)
        return load(_construct(name, _registered(name, kind), network))
    kind, given = _parse(name)
    if kind.startswith("spandrel."):
        constructor = _spandrel_architecture(name, kind.removeprefix("spandrel."))
        net = load(_construct(name, constructor, _scale_option(constructor, scale) | given))
        return _described_by_spandrel(name, lambda spandrel: spandrel.MAIN_REGISTRY.load(net.state_dict()))
    constructor = _registered(name, kind)
    return load(_construct(name, constructor, _scale_option(constructor, scale) | given))


def _keep(net: nn.Module) -> nn.Module:
    return net


def _load(network: str, file: str, scale: int, net: nn.Module) -> nn.Module:
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
    return net


def _scale_of_weights(file: str) -> int | None:
    """The scale that weights of ESC are of; None of others, whose file does not tell."""
    options = infer_network_options(read_weights(weights_file(file), "params_ema"))
    return None if options is None else int(options["upscaling_factor"])


def weights_of(name: str) -> str | None:
    """Where a network's weights come from: a file, the name of a network that ships; None if nowhere."""
    if with_weights := _WITH_WEIGHTS.fullmatch(name):
        return with_weights["file"]
    return name if name in model_list() or Path(name).suffix.lower() in _CHECKPOINTS else None


def _build_form(variant: str, form: str, scale: int, load: Load) -> nn.Module:
    torch.manual_seed(0)
    net = build_variant(variant, scale)
    give_predictors_weights(net)
    load(net)
    if form == "kernels":
        fast.attend_by_kernels(net)  # with gradients, too
        return fast.prepare(net, kernels=True)
    if form == "compiled":
        return CompiledNetwork(net)
    if form == "plain":
        return net
    return ReferenceNetwork(net, compile_flex=form == "release-flex") if form else fast.prepare(net)


def give_predictors_weights(net: nn.Module) -> None:
    """Give ESC's kernel predictors weights: at first they are 0, and no measurement would notice them."""
    for parameter in net.parameters():
        if parameter.ndim == 4 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def _parse(name: str) -> tuple[str, dict[str, Any]]:
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
    """A class of BasicSR's registry."""
    import basicsr.archs  # noqa: F401 - fills the registry
    from basicsr.utils.registry import ARCH_REGISTRY

    known = dict(iter(ARCH_REGISTRY))  # else dict() takes it for a mapping
    for key in (kind, f"{kind}_basicsr"):  # as BasicSR itself looks them up
        if key in known:
            return known[key]
    forms = ", ".join(f"':{form}'" for form in FORMS if form)
    raise UserError(
        f"{name!r} is no network: expected {', '.join(VARIANTS)}, with {forms} or without; a rival of the "
        f"paper's, {', '.join(RIVALS)}; a network of "
        "BasicSR's registry, or of spandrel as spandrel.NAME, with ',option=value' where it needs options; a "
        "YAML file with a network_g section; each with ',weights=FILE' for trained weights; or a checkpoint "
        "of ESC, one that spandrel reads, or a TorchScript file. "
        f"{hint(kind, [*VARIANTS, *RIVALS, *known])}".rstrip()
    )


def _scale_option(constructor: Callable[..., nn.Module], scale: int) -> dict[str, Any]:
    return {key: scale for key in _SCALE_OPTIONS if key in inspect.signature(constructor).parameters}


def _construct(name: str, constructor: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """Build by options, after checking that they are there and no others.

    Raises:
        UserError: They are not, or the constructor does not take their values.
    """
    parameters = inspect.signature(constructor).parameters.values()
    takes = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        for key in options:
            if key not in takes:
                raise UserError(f"{name}: there is no option {key!r}. {hint(key, takes)}".rstrip())
    missing = [
        p.name for p in parameters if p.name in takes and p.default is p.empty and p.name not in options
    ]
    if missing:
        ways = "".join(f",{key}=..." for key in missing)
        raise UserError(f"{name}: this network needs {', '.join(missing)} as well: write '{name}{ways}'.")
    torch.manual_seed(0)
    try:
        return constructor(**options)
    except Exception as error:  # whatever a foreign constructor makes of values that do not fit
        raise UserError(f"{name}: cannot be built with these options ({_described(error)}).") from error


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _import_spandrel() -> Any:
    try:
        return importlib.import_module("spandrel")
    except ModuleNotFoundError as error:
        raise UserError(
            "this network needs spandrel, which is not installed: pip install 'esc-basicsr[spandrel]', or "
            "pip install spandrel."
        ) from error


def _spandrel_architecture(name: str, kind: str) -> Callable[..., nn.Module]:
    """A class that one of spandrel's modules of architectures offers."""
    _import_spandrel()
    architectures = importlib.import_module("spandrel.architectures")
    known: dict[str, Any] = {}
    for found in pkgutil.iter_modules(architectures.__path__, "spandrel.architectures."):
        module = importlib.import_module(found.name)
        offered = {key: getattr(module, key) for key in getattr(module, "__all__", ())}
        known |= {key: value for key, value in offered.items() if _is_network(value)}
    if kind not in known:
        raise UserError(f"{name}: spandrel has no network {kind!r}. {hint(kind, known)}".rstrip())
    return known[kind]


def _is_network(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _read_checkpoint(path: Path) -> nn.Module:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    if is_exported(path):
        return _read_torchscript(path)
    try:
        is_ours = infer_network_options(read_weights(path, "params_ema")) is not None
    except UserError:  # of a form that spandrel may read
        is_ours = False
    if is_ours:
        return load_network(path).network
    return _described_by_spandrel(str(path), lambda spandrel: spandrel.ModelLoader().load_from_file(path))


def _read_torchscript(path: Path) -> nn.Module:
    try:
        net: nn.Module = torch.jit.load(path, map_location="cpu")
    except Exception as error:  # what PyTorch raises depends on the bytes
        raise UserError(f"{path}: cannot be read as TorchScript ({_described(error)}).") from error
    return net


def _described_by_spandrel(name: str, load: Callable[[Any], Any]) -> nn.Module:
    """The network that spandrel finds in weights: with it come the scale, and the sizes that it takes."""
    spandrel = _import_spandrel()
    try:
        descriptor = load(spandrel)
    except Exception as error:  # what spandrel raises depends on the bytes
        raise UserError(f"{name}: spandrel does not know these weights ({_described(error)}).") from error
    if not isinstance(descriptor, spandrel.ImageModelDescriptor):
        raise UserError(f"{name}: this network takes more than an image.")
    return SpandrelNetwork(descriptor)
