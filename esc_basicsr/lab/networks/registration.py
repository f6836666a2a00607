"""The baselines that BasicSR builds by name, registered as soon as BasicSR is imported."""

import warnings
from types import ModuleType


def register(basicsr: ModuleType) -> None:
    """Register the baselines: all, or none with a warning. ESC's own names do not depend on it."""
    try:
        from esc_basicsr.basicsr_host.registration import add_to_registries
        from esc_basicsr.lab.networks.hitsrf_arch import HiT_SRF
        from esc_basicsr.lab.networks.mambairv2_arch import MambaIRv2Light
        from esc_basicsr.lab.networks.spandrel_arch import Spandrel
        from esc_basicsr.lab.networks.swinir_arch import PaddedSwinIR

        add_to_registries(archs=(HiT_SRF, MambaIRv2Light, PaddedSwinIR, Spandrel))
    except (ImportError, RuntimeError) as error:
        warnings.warn(f"ESC's baselines are not registered with BasicSR: {error}", stacklevel=2)
