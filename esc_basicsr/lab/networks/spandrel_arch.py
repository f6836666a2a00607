"""spandrel's architectures as networks of BasicSR's registry."""

import pkgutil
from typing import Any

import torch.nn as nn

from esc_basicsr.common.suggestion import hint
from esc_basicsr.lab.networks.packages import imported

__all__ = ["Spandrel"]


def Spandrel(architecture: str, **options: Any) -> nn.Module:  # noqa: N802 - as network_g.type names it
    """Build a network of spandrel's; in option files ``{type: Spandrel, architecture: ATD, upscale: 4}``.

    It is spandrel's own network, so that released weights load as they are; sizes are as it takes them.

    Args:
        architecture: A module of ``spandrel.architectures``, and its class of that name.
        options: What the class is constructed by.

    Raises:
        UserError: spandrel is not installed.
        ValueError: It has no such architecture.
        TypeError: The architecture has no such option.
    """
    known = imported("spandrel.architectures", f"network {architecture}").__path__
    names = [module.name for module in pkgutil.iter_modules(known) if not module.name.startswith("_")]
    if architecture not in names:
        near = hint(architecture, names)
        raise ValueError(f"architecture must be one of spandrel's, got {architecture!r}. {near}".rstrip())
    network = getattr(imported(f"spandrel.architectures.{architecture}", architecture), architecture)
    return network(**options)
