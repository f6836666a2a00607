"""ESC networks as spandrel architectures: what ComfyUI and chaiNNer read checkpoints by.

import spandrel
from esc_basicsr import spandrel_archs

spandrel_archs.install()
model = spandrel.ModelLoader().load_from_file("ESC_x4.pth")
"""

from typing import Any

import torch.nn as nn
from spandrel import (
    MAIN_REGISTRY,
    Architecture,
    ArchRegistry,
    ArchSupport,
    ImageModelDescriptor,
    ModelTiling,
    SizeRequirements,
    StateDict,
)

from esc_basicsr import fast
from esc_basicsr.archs.variants import RELEASED
from esc_basicsr.common.errors import UserError
from esc_basicsr.weights.fit import build_fitting
from esc_basicsr.weights.infer import infer_network_options

__all__ = ["ESCArchitecture", "install"]

# registered name -> what it is called
_NAMES = {"ESC": "ESC", "ESCFP": "ESC-FP", "ESCReal": "ESC-Real", "ESCRealM": "ESC-RealM"}


class ESCArchitecture(Architecture[nn.Module]):
    """One registered network as an architecture: what its weights tell decides.

    Args:
        network: Its name, a key of `NETWORKS`.
        name: What it is called.
    """

    def __init__(self, network: str, name: str) -> None:
        super().__init__(id=network, name=name, detect=self._is_ours)
        self._network = network

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[nn.Module]:
        """Build the network that a state dict belongs to.

        Raises:
            UserError: It is not of this architecture.
        """
        network, options = build_fitting(state_dict, self.name)
        if options["type"] != self._network:
            raise UserError(f"these are not weights of {self.name}.")
        scale = int(options["upscaling_factor"])
        return ImageModelDescriptor(
            network,
            state_dict,
            architecture=self,
            purpose="SR" if scale > 1 else "Restoration",
            tags=_tags(options),
            supports_half=True,
            supports_bfloat16=True,
            scale=scale,
            input_channels=options.get("in_channels", 3),
            output_channels=options.get("out_channels", 3),
            call_fn=lambda network, image: fast.prepare(network)(image),
            # The network pads by itself. But its dynamic kernels are made from the whole image.
            size_requirements=SizeRequirements(),
            tiling=ModelTiling.DISCOURAGED,
        )

    def _is_ours(self, state_dict: StateDict) -> bool:
        options = infer_network_options(state_dict)
        return options is not None and options["type"] == self._network


def install(registry: ArchRegistry = MAIN_REGISTRY) -> None:
    """Have spandrel know the networks of this package; once more does no harm.

    Args:
        registry: What `spandrel.ModelLoader` is to find them in; by default every one does.
    """
    supports = [ArchSupport.from_architecture(ESCArchitecture(*names)) for names in _NAMES.items()]
    registry.add(*supports, ignore_duplicates=True)


def _tags(options: dict[str, Any]) -> list[str]:
    """Name the published variant, if it is one, and the sizes."""
    sizes = {key: value for key, value in options.items() if key != "upscaling_factor"}
    tags = [name for name, variant in RELEASED.items() if variant == sizes]
    return [*tags, f"{options['dim']}dim", f"{options['n_blocks']}nb"]
