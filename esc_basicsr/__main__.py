"""The command line: ``python -m esc_basicsr COMMAND``.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> int``. It is imported when it is
called, so that a command's packages are needed by that command only.
"""

import argparse
import sys
from collections.abc import Sequence

from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.version import __version__

COMMANDS = {
    "demo": (
        "esc_basicsr.commands.demo",
        "train a small ESC on embedded images and compare it with bicubic",
    ),
    "upscale": ("esc_basicsr.commands.upscale", "upscale images and films with a trained network"),
    "web": (
        "esc_basicsr.commands.web",
        "upscale images and films in the browser, on this computer alone",
    ),
    "train": ("esc_basicsr.train", "train by an option file, through BasicSR's pipeline"),
    "test": ("esc_basicsr.test", "measure a network on benchmark sets, through BasicSR's pipeline"),
    "lmdb": ("esc_basicsr.commands.lmdb", "make LMDB training sets from folders of images"),
    "benchmark-set": (
        "esc_basicsr.commands.benchmark_set",
        "lay out a test set: HR and bicubic LR per scale",
    ),
    "options": (
        "esc_basicsr.commands.options",
        "write the shipped option files, or check one of yours",
    ),
    "report": (
        "esc_basicsr.commands.report",
        "draw up trainings as one HTML page: curves, metrics, pictures",
    ),
    "export": (
        "esc_basicsr.commands.export",
        "write a trained network as ONNX, OpenVINO, ncnn, TorchScript, torch.export, weights or a page",
    ),
    "bench": (
        "esc_basicsr.commands.bench",
        "measure latency, memory and multiply-adds of networks, in turn",
    ),
    "gpu-report": (
        "esc_basicsr.commands.gpu_report",
        "measure what a GPU answers, in one call: correctness, speed, memory, targets",
    ),
    "analyze": (
        "esc_basicsr.commands.analyze",
        "look into networks: attribution maps, receptive fields",
    ),
    "compare": (
        "esc_basicsr.commands.compare",
        "measure ESC beside its baselines, or its ablation, as the paper's tables do",
    ),
    "doctor": ("esc_basicsr.commands.doctor", "report what is installed, and what is wrong"),
    "complexity": (
        "esc_basicsr.commands.complexity",
        "count parameters and multiply-adds of ESC",
    ),
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


if __name__ == "__main__":
    sys.exit(main())
