"""Reading checkpoints, executing nothing that is in them.

Files are BasicSR's: ``{"params": state dict, "params_ema": state dict}``. A bare state dict is read too, and
one that another trainer wrote under a name of its own. A .safetensors file holds one state dict, and text.
"""

import io
import json
import mmap
import os
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.weights.shown import few, shown

__all__ = ["is_exported", "is_safetensors", "read_safetensors_metadata", "read_weights", "refuse_bombs"]

# What a parameter or a buffer may be; others, such as float8, cannot all be copied into a network.
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}
# What a pickle of weights and numbers names, beside types; a storage's name is but a type to PyTorch.
_TYPES = re.compile(r"torch\.((cuda\.)?(?!Typed|Untyped)\w+Storage|b?float\d+\w*|complex\d+|u?int\d+|bool)")
_NAMED = {
    "torch.Size",
    "torch.device",
    "collections.OrderedDict",
    "collections.Counter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    # these are refused later, by the names of the weights
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch.serialization._get_layout",
}
# What PyTorch's averaging and a counter of operations leave among parameters.
_COUNTERS = {"n_averaged", "total_ops", "total_params"}
# What other trainers call BasicSR's state dicts, by preference.
_ALIASES = {
    "params_ema": ("ema", "ema_state_dict", "params", "state_dict", "model"),
    "params": ("state_dict", "model"),
}
_LEGACY_PICKLES = 5  # of a file before PyTorch 1.6: magic number, protocol, system, content, storages' keys


def read_weights(path: str | os.PathLike[str], param_key: str | None = "params") -> dict[str, Tensor]:
    """Read the weights of one network from a checkpoint file, executing nothing that is in it.

    Args:
        path: A ``.pth`` or a ``.safetensors`` file; its content tells which.
        param_key: Which of the file's state dicts, such as ``params`` or ``params_ema``; None for a bare one.
            Where a file does not hold it, what other trainers call it is read, or the only one that there is;
            the log says so.

    Returns:
        Parameters by name, on the CPU, without what PyTorch's wrappers add: ``module.``, ``_orig_mod.`` and
        counters.

    Raises:
        UserError: There is no such file, it is no checkpoint, it does not hold ``param_key``, or a value is
            not finite.
    """
    path = _existing(path)
    if is_exported(path):
        raise UserError(
            f"{path} is an exported network, to be run by other programs: give the checkpoint (.pth or "
            ".safetensors) that it was made from."
        )
    content: Any
    if is_safetensors(path):
        content, stored = _read_safetensors(path), read_safetensors_metadata(path).get("param_key")
        if stored is not None and param_key not in (None, stored):
            logger.info("%s holds %s alone; it is loaded for %s.", path, shown(stored), param_key)
    else:
        content = _read_pth(path)
    name, weights = _state_dict(content, param_key, path)
    if name not in (None, param_key):
        logger.info("%s holds no %s; its %s is loaded.", path, param_key, shown(name))
    weights = {
        key.removeprefix("module.").replace("_orig_mod.", "").removeprefix("module."): value
        for key, value in weights.items()
        if key.rpartition(".")[2] not in _COUNTERS
    }
    for key, value in weights.items():
        if value.layout is not torch.strided or value.device.type != "cpu" or value.dtype not in _DTYPES:
            kind = f"{value.dtype}, {value.layout}, on {value.device}".replace("torch.", "")
            raise UserError(f"{path}: {shown(key)} is no parameter of a network to load: {kind}.")
        if value.nbytes > path.stat().st_size:  # one number, repeated by strides of 0
            raise UserError(f"{path}: {shown(key)} would be larger than the whole file.")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(
                f"{path}: {shown(key)} has values that are no finite numbers: the training that wrote it had "
                "diverged. Take an older checkpoint."
            )
    return weights


def _state_dict(content: Any, param_key: str | None, path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """Find the state dict that is meant, and the key it lies under: None if it is the whole content."""
    if not isinstance(content, dict) or not content:
        what = "an empty one" if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: expected a dict of weights, got {what}.")
    if _is_state_dict(content):
        return None, _tensors(content)
    found = {key: value for key, value in content.items() if _is_state_dict(value)}
    for key in (param_key, *_ALIASES.get(param_key or "", ())):
        if key in found:
            return key, _tensors(found[key])
    if len(found) == 1:
        key, value = found.popitem()
        return str(key), _tensors(value)
    if found:
        raise UserError(
            f"{path}: no weights under {param_key!r}; it holds several networks: {few(found)}. Save the one "
            "that is meant in a file of its own, or name it where there is an option for that "
            "(path.param_key_g in an option file)."
        )
    raise UserError(f"{path}: expected parameters by name, found none; it holds {few(content)}.")


def _is_state_dict(value: Any) -> bool:
    """Tell whether a dict holds parameters by name, and beside them at most a few numbers and words."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False
    others = [entry for entry in value.values() if not isinstance(entry, Tensor)]
    return len(others) < len(value) / 2 and all(isinstance(entry, int | float | str) for entry in others)


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def is_exported(path: Path) -> bool:
    """Tell by name or content whether a file is what ``export`` writes for other programs to run."""
    if path.suffix.lower() in (".onnx", ".xml", ".param", ".pt2"):
        return True
    try:
        with zipfile.ZipFile(path) as archive:  # checkpoints are such archives, too, but without code
            return any("/code/" in name for name in archive.namelist())
    except Exception:  # no archive, or a damaged one, which reading it tells more of
        return False


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is, by its content or else by its name, a .safetensors file.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            start = file.read(9)  # the header's length, then the header, which is JSON
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    return start[8:] == b"{" or Path(path).suffix == ".safetensors"


def read_safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read what a .safetensors file says of itself, by key; empty if nothing.

    Raises:
        UserError: There is no such file, or it is no sound .safetensors file.
    """
    return _safetensors_header(_existing(path)).get("__metadata__", {})


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    try:
        is_there = path.is_file()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not is_there:
        what = "it is no regular file" if path.exists() else "there is no such checkpoint file"
        raise UserError(f"{path}: {what}. Check the path; in an option file it is path.pretrain_network_g.")
    return path


def _read_pth(path: Path) -> Any:
    try:
        refuse_bombs(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own words advise to load the file in a way that executes what is in it
        raise UserError(f"{path}: not a PyTorch checkpoint, or one that holds more than weights.") from error
    except UserError:
        raise
    except Exception as error:  # what a damaged pickle raises has no limits
        raise _unreadable(path) from error


def refuse_bombs(path: Path) -> None:
    """Refuse a file that would grow on reading far beyond its size, which PyTorch's safe loading does not.

    PyTorch compresses nothing, as a zip bomb does; and what it calls to make weights allocates nothing, as
    ``bytearray`` does, which it would call too.

    Raises:
        UserError: It is one.
        Exception: It is damaged.
    """
    # PyTorch goes by the first bytes: a zip file may lie behind a pickle, too.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] != b"PK\x03\x04":
            for _ in range(_LEGACY_PICKLES):  # mapped: a pickle may ask for more to be read than there is
                _refuse_calls(content, path)
            return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise UserError(f"{path}: not a PyTorch checkpoint: it unpacks to more than the file holds.")
        for record in records:
            if record.filename.lower().endswith(".pkl"):  # PyTorch finds data.PKL, too
                _refuse_calls(io.BytesIO(archive.read(record)), path)


def _refuse_calls(file: Any, path: Path) -> None:
    """Refuse a pickle that names anything but what weights and training states are made of."""
    operations = pickletools.genops(file)
    while True:
        try:
            operation, argument, _ = next(operations)
        except StopIteration:
            return
        except Exception as error:
            raise pickle.UnpicklingError(str(error)) from error
        if operation.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            name = str(argument).replace(" ", ".")
            if name not in _NAMED and not _TYPES.fullmatch(name):
                raise UserError(
                    f"{path}: not a checkpoint to read safely: it holds more than weights ({shown(name)}); "
                    "reading that would run its code. Where it was made, save the weights alone: "
                    "torch.save(network.state_dict(), FILE)."
                )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    _safetensors_header(path)
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            # Tensors that it gives are views of the file; these remain when that is replaced.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise _unreadable(path) from error


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Read a .safetensors file's header, found sound by the format's own reader, each name in it once."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt"):
            pass  # it has compared names, shapes and places with one another and with the file's length
        with path.open("rb") as file:
            return json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=_unique)
    except Exception as error:
        raise _unreadable(path) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _unreadable(path: Path) -> UserError:
    return UserError(
        f"{path}: not a readable checkpoint: it is cut short or damaged. Fetch or save it again, or use "
        "an older one."
    )
