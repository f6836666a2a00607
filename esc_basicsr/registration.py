"""The thin layer between this package and BasicSR's registries."""

from collections.abc import Callable
from typing import Any

import esc_basicsr.basicsr_host.patches as compat


def register() -> None:
    """Put every network, model, loss and data set of this package into BasicSR's registries. Idempotent."""
    compat.apply()
    from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY

    from esc_basicsr.archs import ESC, ESCFP, Bicubic
    from esc_basicsr.data.dflip_dataset import DFLIPDataset
    from esc_basicsr.lab.networks.hitsrf_arch import HiT_SRF
    from esc_basicsr.lab.networks.mambairv2_arch import MambaIRv2Light
    from esc_basicsr.lab.networks.spandrel_arch import Spandrel
    from esc_basicsr.lab.networks.swinir_arch import PaddedSwinIR
    from esc_basicsr.training.esc_model import ESCModel
    from esc_basicsr.training.y_channel_loss import YChannelL1Loss

    for registry, what in (
        (ARCH_REGISTRY, (ESC, ESCFP, Bicubic, HiT_SRF, MambaIRv2Light, PaddedSwinIR, Spandrel)),
        (DATASET_REGISTRY, (DFLIPDataset,)),
        (LOSS_REGISTRY, (YChannelL1Loss,)),
        (MODEL_REGISTRY, (ESCModel,)),
    ):
        for cls in what:
            _register(registry, cls)


def _register(registry: Any, cls: Callable[..., Any]) -> None:
    """Register a class, or a function that builds one's object, under its name, once.

    Raises:
        RuntimeError: Another package has registered that name.
    """
    known = registry.get(cls.__name__) if cls.__name__ in registry else None
    if known is None:
        registry.register(cls)
    elif known is not cls:
        raise RuntimeError(
            f"{cls.__name__} is registered with BasicSR already, by {known.__module__}. "
            "Use one ESC package in one environment: uninstall the other, or do not import it."
        )
