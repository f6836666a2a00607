"""spandrel's architectures as networks of BasicSR's registry, and as they run."""

import pkgutil
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.suggestion import hint
from esc_basicsr.lab.networks.baselines import imported


def spandrel_architecture(name: str) -> type[nn.Module]:
    """Find a class of networks that one of spandrel's modules of architectures offers.

    Raises:
        UserError: spandrel is not installed, or has no such architecture.
    """
    found: dict[str, type[nn.Module]] = {}
    for module in pkgutil.iter_modules(imported("spandrel.architectures", f"network {name}").__path__):
        offered = vars(imported(f"spandrel.architectures.{module.name}", f"network {name}"))
        for key in offered.get("__all__", ()):
            if isinstance(offered[key], type) and issubclass(offered[key], nn.Module):
                found[key] = offered[key]
    if name not in found:
        raise UserError(f"spandrel has no network {name!r}. {hint(name, found)}".rstrip())
    return found[name]


def Spandrel(architecture: str, **options: Any) -> nn.Module:  # noqa: N802 - as network_g.type names it
    """Build a network of spandrel's; in option files ``{type: Spandrel, architecture: ATD, upscale: 4}``.

    It is spandrel's own network, so that released weights load as they are; sizes are as it takes them.

    Args:
        architecture: A class of one of the modules of ``spandrel.architectures``.
        options: What the class is constructed by.

    Raises:
        UserError: spandrel is not installed, or has no such architecture.
        TypeError: The architecture has no such option.
    """
    return spandrel_architecture(architecture)(**options)


class SpandrelNetwork(nn.Module):
    """A network that spandrel describes, run as spandrel does, but not clamped, and open to gradients.

    Args:
        descriptor: spandrel's ImageModelDescriptor.
    """

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.model = descriptor.model
        self.descriptor = descriptor

    def forward(self, x: Tensor) -> Tensor:
        """Upscale an image; padded by reflection to the size that the network requires, and cropped."""
        height, width = x.shape[-2:]
        right, bottom = self.descriptor.size_requirements.get_padding(width, height)
        padded = F.pad(x, (0, right, 0, bottom), mode="reflect") if right or bottom else x
        sr: Tensor = self.descriptor._call_fn(self.model, padded)
        scale = self.descriptor.scale
        return sr[..., : height * scale, : width * scale]
