"""Packages that rivals alone need, imported when one is asked for."""

import importlib
from types import ModuleType

from esc_basicsr.common.errors import UserError

__all__ = ["imported"]


def imported(module: str, network: str) -> ModuleType:
    """Import a module of another package.

    Args:
        module: Its full name.
        network: What it is needed for, as a message calls it.

    Raises:
        UserError: The package is not installed, or cannot be used.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise _unusable(package, network, error) from error
        raise UserError(
            f"{network} needs {package}, which is not installed: pip install {package}."
        ) from error
    except ImportError as error:
        raise _unusable(package, network, error) from error


def _unusable(package: str, network: str, error: ImportError) -> UserError:
    return UserError(f"{network} needs {package}, whose installation does not work ({error}): mend it.")
