"""torchvision.transforms.functional_tensor, which BasicSR imports and torchvision has removed in 0.17.

BasicSR #533, #649, #663. It must be found while BasicSR is imported: the other patches come afterwards.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NAME = "torchvision.transforms.functional_tensor"


def provide_functional_tensor() -> None:
    """Have Python find the module where torchvision lacks it. Idempotent; imports nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # the last to be asked: a module that exists is found before


def is_provided() -> bool:
    """Return whether the module is ours: torchvision lacks it."""
    spec = importlib.util.find_spec(NAME)
    return spec is not None and isinstance(spec.loader, _Finder)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname == NAME else None

    def exec_module(self, module: Any) -> None:
        from torchvision.transforms import functional

        def rgb_to_grayscale(img: Any, num_output_channels: int = 1) -> Any:
            return functional.rgb_to_grayscale(img, num_output_channels)

        module.rgb_to_grayscale = rgb_to_grayscale
