"""The command line: ``python -m esc_basicsr COMMAND``.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> int``. It is imported when it is
called, so that a command's packages are needed by that command only.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from esc_basicsr.errors import UserError
from esc_basicsr.version import __version__

COMMANDS = {
    "demo": ("esc_basicsr.demo", "train a small ESC on embedded photographs and compare it with bicubic"),
    "upscale": ("esc_basicsr.upscale.upscale_command", "upscale pictures with a trained network"),
    "train": ("esc_basicsr.train", "train by an option file, through BasicSR's pipeline"),
    "test": ("esc_basicsr.test", "measure a network on benchmark sets, through BasicSR's pipeline"),
    "lmdb": ("esc_basicsr.data.lmdb_command", "make LMDB training sets from folders of images"),
    "benchmark-set": (
        "esc_basicsr.data.benchmark_command",
        "lay out a test set: HR and bicubic LR per scale",
    ),
    "options": (
        "esc_basicsr.config.options_command",
        "write the shipped option files, or check one of yours",
    ),
    "report": (
        "esc_basicsr.report.report_command",
        "draw up trainings as one HTML page: curves, metrics, pictures",
    ),
    "export": (
        "esc_basicsr.export.export_command",
        "write a trained network as ONNX, TorchScript, torch.export or .safetensors",
    ),
    "bench": (
        "esc_basicsr.benchmark.bench_command",
        "measure latency, memory and multiply-adds of networks, in turn",
    ),
    "analyze": (
        "esc_basicsr.analysis.analyze_command",
        "look into networks: attribution maps, receptive fields",
    ),
    "compare": (
        "esc_basicsr.benchmark.compare_command",
        "measure ESC beside its rivals, or its ablation, as the paper's tables do",
    ),
    "doctor": ("esc_basicsr.doctor", "tell what is installed, what works here, and what is wrong"),
    "complexity": ("esc_basicsr.complexity", "count parameters and multiply-adds of the ESC networks"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when it succeeded, 2 for a mistake in what the user gave, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:<14} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m esc_basicsr",
        description="ESC super-resolution (ICCV 2025) on BasicSR.",
        epilog=f"commands:\n{listing}\n\n'python -m esc_basicsr COMMAND --help' explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"esc_basicsr {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    command = parser.parse_args(arguments[:1]).command
    module_name, _ = COMMANDS[command]
    return run_command(module_name, arguments[1:], prog=f"python -m esc_basicsr {command}")


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
        where = " (BasicSR 1.4.2 installs on Python 3.10, 3.11 and 3.12)" if package == "basicsr" else ""
        print(f"error: {prog} needs the package {package}: install it with pip{where}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
