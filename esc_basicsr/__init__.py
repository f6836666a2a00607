"""ESC super-resolution (ICCV 2025, arXiv:2503.06671) as a plugin for BasicSR.

Importing this package imports neither PyTorch nor BasicSR. As soon as BasicSR is imported, by whatever module
of it, what stock BasicSR 1.4.2 breaks on today's stack is patched, and ESC's networks, model, loss and data
set are registered with it; at once where it was imported before.
"""

import wrapt

from esc_basicsr.basicsr_host.functional_tensor import provide_functional_tensor
from esc_basicsr.common.version import __version__

__all__ = ["__version__"]

provide_functional_tensor()
for _hook in (
    "esc_basicsr.basicsr_host.registration:register",
    "esc_basicsr.lab.networks.registration:register",
):
    wrapt.register_post_import_hook(_hook, "basicsr")
