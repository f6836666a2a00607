"""ESC super-resolution (ICCV 2025, arXiv:2503.06671) as a plugin for BasicSR.

Importing this package mends what stock BasicSR 1.4.2 breaks on today's stack
(`esc_basicsr.basicsr_host.patches`) and registers ESC's networks, model, loss and data sets with BasicSR.
Where BasicSR is not installed the networks in `esc_basicsr.archs` work all the same, with torch alone.
"""

import importlib.util
import warnings

from esc_basicsr.common.version import __version__

__all__ = ["__version__"]

if importlib.util.find_spec("basicsr") is not None:
    try:
        from esc_basicsr.registration import register

        register()
    except (ImportError, RuntimeError) as error:
        warnings.warn(
            f"BasicSR is installed but cannot be used ({error}). The networks in esc_basicsr.archs work all "
            "the same; to train and test, mend that installation.",
            stacklevel=2,
        )
