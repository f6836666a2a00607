"""The networks that the paper compares ESC with, built by their names; packages that they alone need."""

import importlib
from types import ModuleType

import torch.nn as nn

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.suggestion import hint
from esc_basicsr.options.baselines import BASELINES

# type -> its module, which offers it under that name
_MODULES = {
    "PaddedSwinIR": "esc_basicsr.lab.networks.swinir_arch",
    "RCAN": "basicsr.archs.rcan_arch",
    "HiT_SRF": "esc_basicsr.lab.networks.hitsrf_arch",
    "MambaIRv2Light": "esc_basicsr.lab.networks.mambairv2_arch",
    "Spandrel": "esc_basicsr.lab.networks.spandrel_arch",
}
_OF_BASICSR = ("PaddedSwinIR", "RCAN")


def build_baseline(name: str, scale: int) -> nn.Module:
    """Build a published baseline with random weights; released ones load by `esc_basicsr.weights`.

    Raises:
        UserError: There is no such baseline, or a package that has it is not installed.
    """
    if name not in BASELINES:
        raise UserError(f"{name!r} is no baseline. {hint(name, BASELINES)}".rstrip())
    network, scale_key = BASELINES[name]
    options = {**network, scale_key: scale}
    kind = options.pop("type")
    if kind in _OF_BASICSR:
        imported("basicsr", name)
    return getattr(importlib.import_module(_MODULES[kind]), kind)(**options)


def imported(module: str, network: str) -> ModuleType:
    """Import a module of another package, which ``network`` needs, as a message calls it.

    Raises:
        UserError: The package is not installed, or cannot be used.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{network} needs the package {package}, which cannot be used ({error}): pip install {package}."
        ) from error
