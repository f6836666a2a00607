"""Reading and writing checkpoints, loading them into a network, and telling what network they belong to.

Files are BasicSR's: ``{"params": state dict, "params_ema": state dict}``; a bare state dict is read too. A
.safetensors file holds one state dict, and text about it.
"""

import io
import json
import math
import mmap
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import written_whole
from esc_basicsr.common.log import logger

__all__ = [
    "check_fit",
    "infer_network_options",
    "is_exported",
    "is_safetensors",
    "load_weights",
    "read_safetensors_metadata",
    "read_weights",
    "refuse_bombs",
    "rescale_to_img",
    "write_safetensors",
]

# how many keys an error message lists of each kind, and how much of a key it shows
_LISTED = 6
_SHOWN = 200

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
_LEGACY_PICKLES = 5  # of a file before PyTorch 1.6: magic number, protocol, system, content, storages' keys


def read_weights(path: str | os.PathLike[str], param_key: str | None = "params") -> dict[str, Tensor]:
    """Read the weights of one network from a checkpoint file, executing nothing that is in it.

    Args:
        path: A ``.pth`` or a ``.safetensors`` file; its content tells which.
        param_key: Which of the file's state dicts: ``params``, ``params_ema`` (``params`` is read where a
            file has no ``params_ema``, and the log says so), or None for a bare state dict. A file that holds
            one state dict alone gives that one; the log says so where it is known to be the other.

    Returns:
        Parameters by name, on the CPU, a leading ``module.`` of their names removed.

    Raises:
        UserError: There is no such file, it is no checkpoint, or it does not hold ``param_key``.
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
            logger.info("%s holds %s alone; it is loaded for %s.", path, _shown(stored), param_key)
    else:
        content = _read_pth(path)
    if not isinstance(content, dict) or not content:
        what = "an empty one" if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: expected a dict of weights, got {what}.")
    if not all(isinstance(value, Tensor) for value in content.values()):
        key = param_key or "params"
        if key not in content and key == "params_ema" and "params" in content:
            logger.info("%s holds no params_ema; params is loaded.", path)
            key = "params"
        if key not in content:
            raise UserError(
                f"{path}: no weights under {key!r}; it holds {_few(content)}. Set path.param_key_g."
            )
        content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: expected parameters by name under {param_key!r}, found something else.")
    for name, value in content.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: expected parameters by name, found a {type(name).__name__} as a name.")
        if value.layout is not torch.strided or value.device.type != "cpu" or value.dtype not in _DTYPES:
            kind = f"{value.dtype}, {value.layout}, on {value.device}".replace("torch.", "")
            raise UserError(f"{path}: {_shown(name)} is no parameter of a network to load: {kind}.")
        if value.nbytes > path.stat().st_size:  # one number, repeated by strides of 0
            raise UserError(f"{path}: {_shown(name)} would be larger than the whole file.")
    return {name.removeprefix("module."): value for name, value in content.items()}


def is_exported(path: Path) -> bool:
    """Whether a file is what ``export`` writes, ONNX, TorchScript or torch.export, by its name or content."""
    if path.suffix.lower() in (".onnx", ".pt2"):
        return True
    try:
        with zipfile.ZipFile(path) as archive:  # checkpoints are such archives, too, but without code
            return any("/code/" in name for name in archive.namelist())
    except Exception:  # no archive, or a damaged one, which reading it tells more of
        return False


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file is, by its content or else by its name, a .safetensors file.

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
    """What a .safetensors file says of itself, by key; empty if nothing.

    Raises:
        UserError: There is no such file, or it is no sound .safetensors file.
    """
    return _safetensors_header(_existing(path)).get("__metadata__", {})


def write_safetensors(
    path: str | os.PathLike[str], weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a state dict and what is to be known of it as a .safetensors file, whole or not at all.

    Args:
        path: The file.
        weights: Parameters by name, on any device and in any layout of memory; not changed.
        metadata: What `read_safetensors_metadata` will give. ``param_key``, ``params`` or ``params_ema``,
            says which state dict of a ``.pth`` file this is.

    Raises:
        UserError: The file cannot be written.
    """
    from safetensors.torch import save  # the networks alone need PyTorch and nothing else

    # Copies, as the format knows neither tensors that share memory nor strides.
    copies = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    with written_whole(path) as file:
        file.write(save(copies, dict(metadata)))


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
    if not zipfile.is_zipfile(path):
        # mapped: a pickle may ask for more to be read than there is
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:4] == b"PK\x03\x04":
                raise zipfile.BadZipFile("its end, by which a zip file is known, is missing")
            for _ in range(_LEGACY_PICKLES):
                _refuse_calls(content, path)
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise UserError(f"{path}: not a PyTorch checkpoint: it unpacks to more than the file holds.")
        for record in records:
            if record.filename.endswith(".pkl"):
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
                    f"{path}: not a checkpoint to read safely: it holds more than weights and numbers "
                    f"({_shown(name)})."
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
    """The header of a .safetensors file, found sound by the format's own reader, each name in it once."""
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


def rescale_to_img(parameter: Tensor, scale: int) -> Tensor:
    """Convert ``to_img``'s weight or bias to another scale.

    Seen as an a×a image for each colour (and feature, kernel row, kernel column) it is resized to b×b
    bilinearly: neighbouring sub-pixels have similar filters, so this starts ×3 and ×4 from ×2 (release).

    Args:
        parameter: Weight or bias of the convolution at scale a.
        scale: The scale b wanted.

    Shape:
        parameter: (3·a², ...). Output: (3·b², ...).
    """
    rest = parameter.shape[1:]
    old = math.isqrt(parameter.shape[0] // 3)
    # [(3 a a), ...] -> [3, rest, a, a]
    images = parameter.reshape(3, old, old, -1).permute(0, 3, 1, 2)
    images = F.interpolate(images.float(), size=(scale, scale), mode="bilinear", align_corners=False)
    return images.permute(0, 2, 3, 1).reshape(3 * scale**2, *rest).to(parameter.dtype)


def load_weights(
    net: nn.Module, weights: dict[str, Tensor], source: str | os.PathLike[str], strict: bool = True
) -> None:
    """Load ``weights`` into ``net``, converting ``to_img`` where they are of another scale.

    Args:
        net: The network.
        weights: Parameters by name, as `read_weights` gives them; not changed.
        source: Where they come from, for messages.
        strict: Whether every key must be there, with its shape. If not, what does not fit is left as it is
            and the log lists it.

    Raises:
        UserError: ``strict`` and the weights do not fit: which keys, which shapes, what to try.
    """
    weights = dict(weights)
    own = net.state_dict()
    _convert_scale(own, weights, source)
    if strict:
        check_fit(net, weights, source)
    elif report := _misfits(net, weights, source):
        logger.warning("%s\nThese keep their present values (strict loading is off).", report)
    fitting = {key: w for key, w in weights.items() if key in own and w.shape == own[key].shape}
    net.load_state_dict(fitting, strict=False)


def check_fit(net: nn.Module, weights: dict[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Raise what a strict `load_weights` would, and load nothing.

    Args:
        net: The network; it may be on the meta device.
        weights: Parameters by name, as `read_weights` gives them; not changed.
        source: Where they come from, for messages.

    Raises:
        UserError: The weights do not fit: which keys, which shapes, what to try.
    """
    weights = dict(weights)
    own = net.state_dict()
    _convert_scale(own, weights, source)
    if report := _misfits(net, weights, source):
        raise UserError(f"{report}\n{_remedy(own, weights)}")


def _misfits(net: nn.Module, weights: dict[str, Tensor], source: str | os.PathLike[str]) -> str:
    """Keys and shapes that differ between the network and the weights; empty if none do."""
    own = net.state_dict()
    shapes = [
        f"{key}: {_shown(list(weights[key].shape))}, expected {list(own[key].shape)}"
        for key in own
        if key in weights and own[key].shape != weights[key].shape
    ]
    lines = [
        *_listing("missing from the file", [key for key in own if key not in weights]),
        *_listing("unknown to the network", [key for key in weights if key not in own]),
        *_listing("of another shape", shapes),
    ]
    return "\n".join([f"{source} does not fit {type(net).__name__}:", *lines]) if lines else ""


def _convert_scale(
    own: dict[str, Tensor], weights: dict[str, Tensor], source: str | os.PathLike[str]
) -> None:
    names = ("to_img.weight", "to_img.bias")
    if not all(name in own and name in weights for name in names):
        return
    old, new = (_scale_of(state["to_img.bias"]) for state in (weights, own))
    if old is None or new is None or old == new:
        return
    if any(weights[name].shape != (3 * old**2, *own[name].shape[1:]) for name in names):
        return
    for name in names:
        weights[name] = rescale_to_img(weights[name], new)
    logger.info("%s is of scale ×%d; to_img is converted to ×%d.", source, old, new)


def _scale_of(to_img_bias: Tensor) -> int | None:
    scale = math.isqrt(to_img_bias.numel() // 3)
    return scale if scale and 3 * scale**2 == to_img_bias.numel() else None


def _listing(title: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = [f"    ... and {len(items) - _LISTED} more"] if len(items) > _LISTED else []
    return [f"  {title} ({len(items)}):", *(f"    {_shown(item)}" for item in items[:_LISTED]), *more]


def _few(names: Iterable[object]) -> str:
    shown = [_shown(repr(name) if isinstance(name, str) else type(name).__name__) for name in names]
    return ", ".join(shown[:_LISTED]) + (f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else "")


def _shown(value: object) -> str:
    """What a file says, fit for a message: of one line, of some length, without what steers a terminal."""
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _remedy(own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    theirs, ours = infer_network_options(weights), infer_network_options(own)
    if theirs is None or ours is None:
        return "These are not weights of an ESC network. Check path.pretrain_network_g."
    differing = [
        f"{key}: {theirs.get(key, 'default')} (here {ours.get(key, 'default')})"
        for key in {**theirs, **ours}
        if theirs.get(key) != ours.get(key)
    ]
    if not differing:
        return "The file is of this very network, but incomplete: save it again, or load another checkpoint."
    options = ", ".join(differing)
    return f"The file is of another network_g: {options}. Set these options, or load another checkpoint."


def infer_network_options(weights: dict[str, Tensor]) -> dict[str, Any] | None:
    """Tell which network a state dict belongs to, by its keys and shapes.

    Args:
        weights: Parameters by name.

    Returns:
        ``network_g``: the registered ``type`` and constructor options, those of an ablation only where they
        differ from the default; None if these are not weights of an ESC network.
    """
    try:
        return _infer(weights)
    except (KeyError, ValueError, ArithmeticError, AttributeError, IndexError):
        return None


def _infer(weights: dict[str, Tensor]) -> dict[str, Any]:
    dim = weights["proj.weight"].shape[0]
    first = "blocks.0."
    is_fp = "lk_spatial" in weights
    unshared = f"{first}pconvs.0.plk_filter"
    options: dict[str, Any] = {"type": "ESCFP" if is_fp else "ESC", "dim": dim}
    large = weights["lk_spatial"] if is_fp else weights.get("plk_filter", weights.get(unshared))
    if large is not None:
        options |= {"pdim": large.shape[0], "kernel_size": large.shape[-1]}
    options["n_blocks"] = 1 + max(int(m[1]) for k in weights if (m := re.match(r"blocks\.(\d{1,6})\.", k)))
    options["conv_blocks"] = 1 + max(
        int(m[1]) for k in weights if (m := re.match(r"blocks\.0\.pconvs\.(\d{1,6})\.", k))
    )
    bias = weights.get(f"{first}attn.relative_position_bias")
    if bias is not None:
        options |= {"window_size": (math.isqrt(bias.shape[1]) + 1) // 2, "num_heads": bias.shape[0]}
    hidden = weights[f"{first}convffns.0.proj.weight"].shape[0]
    ratio = hidden / dim
    options["exp_ratio"] = ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)
    scale = _scale_of(weights["to_img.bias"])
    if scale is None:
        raise KeyError("to_img.bias")
    options["upscaling_factor"] = scale
    if is_fp:
        return options
    if f"{first}lns.0.weight" in weights:
        options["use_ln"] = True
    if f"{first}pconvs.0.attn.to_qkv.weight" in weights:
        return options | {"token_mixer": "attention"}
    if bias is None:
        options["token_mixer"] = "conv_attention"
    if unshared in weights:
        options["share_large_kernel"] = False
    if f"{first}pconvs.0.plk.dwc_proj.1.weight" not in weights:
        options["dynamic_kernel"] = False
    return options
