"""Registering with BasicSR, as soon as BasicSR is imported."""

import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def register(basicsr: ModuleType) -> None:
    """Patch BasicSR, and register ESC's networks, model, loss and data set.

    Where one of these cannot be registered, none is, with a warning; patches stay.
    """
    try:
        from esc_basicsr.basicsr_host import patches

        patches.apply()
        from esc_basicsr.archs import ESC, ESCFP, Bicubic, ESCReal, ESCRealM
        from esc_basicsr.data.degraded_dataset import DegradedDataset
        from esc_basicsr.data.dflip_dataset import DFLIPDataset
        from esc_basicsr.training.esc_model import ESCModel
        from esc_basicsr.training.y_channel_loss import YChannelL1Loss

        add_to_registries(
            archs=(ESC, ESCFP, ESCReal, ESCRealM, Bicubic),
            datasets=(DFLIPDataset, DegradedDataset),
            losses=(YChannelL1Loss,),
            models=(ESCModel,),
        )
    except (ImportError, RuntimeError, AttributeError, LookupError, TypeError) as error:
        # of a BasicSR that is another than the patches know
        warnings.warn(
            f"BasicSR is installed but cannot be used ({error}). The networks in esc_basicsr.archs work all "
            "the same; to train and test, repair that installation.",
            stacklevel=2,
        )


def add_to_registries(**what: Sequence[Callable[..., Any]]) -> None:
    """Register classes, or functions that build an object, under their names. Idempotent.

    Args:
        what: By registry: ``archs``, ``datasets``, ``losses``, ``models``.

    Raises:
        RuntimeError: Another package has registered one of the names; then none is registered.
    """
    from basicsr.utils import registry

    registries: dict[str, Any] = {
        "archs": registry.ARCH_REGISTRY,
        "datasets": registry.DATASET_REGISTRY,
        "losses": registry.LOSS_REGISTRY,
        "models": registry.MODEL_REGISTRY,
    }
    new = []
    for kind, classes in what.items():
        for cls in classes:
            known = registries[kind].get(cls.__name__) if cls.__name__ in registries[kind] else None
            if known not in (None, cls):
                raise RuntimeError(
                    f"{cls.__name__} is registered with BasicSR already, by {known.__module__}. "
                    "Use one ESC package in one environment: uninstall the other, or do not import it."
                )
            if known is None:
                new.append((registries[kind], cls))
    for each, cls in new:
        each.register(cls)
