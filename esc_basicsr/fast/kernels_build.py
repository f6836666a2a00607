"""Compiling the kernels, once for each compiler and processor."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import filelock

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import written_whole
from esc_basicsr.common.log import logger

_SOURCE = Path(__file__).with_name("cpu.cpp")
_LONGEST_WAIT = 300  # seconds, while another process compiles
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class Library(NamedTuple):
    """The compiled functions; cpu.cpp says what they take.

    Attributes:
        lanes: Floats in a vector of this processor.
        has_bf16: Whether it has instructions that multiply bfloat16, without which no function takes it.
        has_amx: Whether AMX multiplies it, in PyTorch's convolutions too; the system lets this process.
    """

    window_attention: Callable[..., int]
    window_attention_backward: Callable[..., int]
    conv_ffn: Callable[..., int]
    conv_ffn_backward: Callable[..., int]
    large_kernel: Callable[..., int]
    large_kernel_backward: Callable[..., int]
    lanes: int
    has_bf16: bool
    has_amx: bool


@functools.cache
def load() -> Library:
    """Compile the kernels, or find them compiled, and load them.

    Raises:
        UserError: There is no C++ compiler, it fails, or what it made cannot be kept or loaded, or not where
            nobody else could replace it.
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
        function("esc_window_attention", *[pointer] * 4, ctypes.c_int, *sizes, ctypes.c_int),
        function("esc_window_attention_backward", *[pointer] * 6, ctypes.c_int, *sizes, ctypes.c_int),
        function("esc_conv_ffn", *[pointer] * 11, *[ctypes.c_int] * 2, *sizes, ctypes.c_int),
        function("esc_conv_ffn_backward", *[pointer] * 16, *[ctypes.c_int] * 2, *sizes, ctypes.c_int),
        function("esc_large_kernel", *[pointer] * 3, *[size] * 2, *sizes[:5], ctypes.c_int),
        function("esc_large_kernel_backward", *[pointer] * 5, *[size] * 2, *sizes[:5], ctypes.c_int),
        library.esc_lanes(),
        bool(library.esc_has_bf16()),
        bool(library.esc_has_amx()),
    )


def _compiled() -> Path:
    """Find or compile the library, kept in the user's cache under a name that ends in its checksum."""
    compiler = _compiler()
    # What the compiler defines tells its version and the processor's instructions.
    macros = _run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    key = _sha256("\0".join([*_FLAGS, macros, _SOURCE.read_text(encoding="utf-8")]).encode())[:16]
    folder = _cache()
    if kept := _kept(folder, key):
        return kept
    with filelock.FileLock(folder / "lock", timeout=_LONGEST_WAIT):
        if kept := _kept(folder, key):  # another process has compiled it meanwhile
            return kept
        logger.info("Compiling the CPU kernels, once.")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "kernels.so"
            _run([*compiler, *_FLAGS, str(_SOURCE), "-o", str(made)])
            content = made.read_bytes()
        target = folder / f"kernels-{key}-{_sha256(content)}.so"
        with written_whole(target) as file:
            file.write(content)
        target.chmod(0o600)  # whatever the umask
    return target


def _cache() -> Path:
    """Make the folder of the user's cache that compiled code is run from: nobody else may write to it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the XDG specification has relative paths ignored
        cache = Path.home() / ".cache"
    (cache / "esc_basicsr").mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = (cache / "esc_basicsr").resolve()
    if os.name != "posix":
        return folder
    if folder.stat().st_uid == os.getuid() and not _is_own(folder):
        folder.chmod(0o700)  # it was made under a lax umask
    open_to_all = (each for each in folder.parents if each.stat().st_mode & 0o1002 == 0o002)
    unsafe = next(open_to_all, None) if _is_own(folder) else folder
    if unsafe is not None:
        raise UserError(
            f"the CPU kernels are not run from {folder}, as others than this user may write to {unsafe}: set "
            "XDG_CACHE_HOME to the full path of a folder that nobody else may write to"
        )
    return folder


def _is_own(path: Path) -> bool:
    """Tell whether a file or folder, itself no link, is this user's, who alone may write to it."""
    about = path.lstat()
    return os.name != "posix" or (about.st_uid == os.getuid() and not about.st_mode & 0o022)


def _kept(folder: Path, key: str) -> Path | None:
    """Find the library in the cache: a plain file of this user's own, and whole."""
    for path in folder.glob(f"kernels-{key}-*.so"):
        is_own = stat.S_ISREG(path.lstat().st_mode) and _is_own(path)
        if is_own and path.stem.endswith(f"-{_sha256(path.read_bytes())}"):
            return path
    return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
