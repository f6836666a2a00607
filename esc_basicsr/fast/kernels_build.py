"""Compiling the kernels, once for each compiler and processor."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger

_SOURCE = Path(__file__).with_name("cpu.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class Library(NamedTuple):
    """The compiled functions; cpu.cpp says what they take.

    Attributes:
        lanes: Floats in a vector of this processor.
    """

    window_attention: Callable[..., int]
    window_attention_backward: Callable[..., int]
    conv_ffn: Callable[..., int]
    lanes: int


@functools.cache
def load() -> Library:
    """Compile the kernels, or find them compiled, and load them.

    Raises:
        UserError: There is no C++ compiler, it fails, or what it made cannot be kept or loaded.
    """
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the CPU kernels cannot be kept or loaded ({error}): set XDG_CACHE_HOME to a folder that can be "
            "written to and run from"
        ) from error
    pointer, size = ctypes.c_void_p, ctypes.c_int64

    def function(name: str, *arguments: type) -> Callable[..., int]:
        found = getattr(library, name)
        found.argtypes = arguments
        return found

    sizes = [size] * 6
    return Library(
        function("esc_window_attention", *[pointer] * 4, *sizes, ctypes.c_int),
        function("esc_window_attention_backward", *[pointer] * 7, *sizes, ctypes.c_int),
        function("esc_conv_ffn", *[pointer] * 11, ctypes.c_int, *sizes, ctypes.c_int),
        library.esc_lanes(),
    )


def _compiled() -> Path:
    """Find or compile the library, kept in the user's cache."""
    compiler = _compiler()
    # What the compiler defines tells its version and the processor's instructions.
    macros = _run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256("\0".join([*_FLAGS, macros, _SOURCE.read_text(encoding="utf-8")]).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esc_basicsr"
    target = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    logger.info("Compiling the CPU kernels, once.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / target.name
        _run([*compiler, *_FLAGS, str(_SOURCE), "-o", str(made)])
        made.replace(target)  # whole or not at all, whoever else compiles
    return target


def _compiler() -> list[str]:
    """Find the command of the C++ compiler: $CXX, or the system's."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise UserError(
        "the CPU kernels need a C++ compiler, and there is none: install g++ or clang, or set CXX to the "
        "command of one"
    )


def _run(command: list[str]) -> str:
    failed = "the CPU kernels cannot be compiled"
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise UserError(f"{failed}: {command[0]!r} does not run ({error}); see CXX") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip()[-2000:]
        raise UserError(f"{failed}: {shlex.join(command)} failed:\n{said}") from error
