"""Running a command: a module with ``add_arguments(parser)`` and ``run(args) -> int``."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from esc_basicsr.common.errors import UserError

# What pip is asked for, where it is not the package of that name alone.
_INSTALLED_BY = {
    "basicsr": "pip (BasicSR 1.4.2 installs on Python 3.10, 3.11 and 3.12)",
    "matplotlib": "pip install 'esc-basicsr[lab]'",
    "spandrel": "pip install 'esc-basicsr[lab]'",
    "av": "pip install 'esc-basicsr[video]'",
    "onnx": "pip install 'esc-basicsr[onnx]'",
    "onnxruntime": "pip install 'esc-basicsr[onnx]'",
    "openvino": "pip install 'esc-basicsr[openvino]'",
    "ncnn": "pip install 'esc-basicsr[ncnn]'",
    "pnnx": "pip install 'esc-basicsr[ncnn]'",
}


def run_command(module_name: str, arguments: Sequence[str], prog: str) -> int:
    """Parse ``arguments`` for the command that ``module_name`` implements, and run it."""
    try:
        module = importlib.import_module(module_name)
        parser = argparse.ArgumentParser(
            prog=prog, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(parser)
        return module.run(parser.parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("esc_basicsr"):
            raise
        package = error.name.split(".")[0]
        found = importlib.util.find_spec(package)
        if package != error.name and found is not None and found.origin is not None:
            print(
                f"error: {prog} finds {package} at {Path(found.origin).parent}, which lacks {error.name}: it "
                "is a copy that was not installed, and hides an installed one. Start in another folder, or "
                "install the copy.",
                file=sys.stderr,
            )
            return 2
        means = _INSTALLED_BY.get(package, "pip")
        print(f"error: {prog} needs the package {package}: install it with {means}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
