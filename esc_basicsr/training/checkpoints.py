"""The files that training is resumed from: networks' weights, and states with all the rest.

A checkpoint of iteration k is ``models/net_g_k.pth`` and ``training_states/k.state``. The state is written
last: one that exists stands for a whole checkpoint. It holds the SHA-256 of the weights.
"""

import hashlib
import importlib
import io
import random
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import check_writable, written_whole
from esc_basicsr.common.log import logger
from esc_basicsr.training.ranks import on_first_rank
from esc_basicsr.weights.read import read_weights, refuse_bombs

__all__ = [
    "check_form",
    "load_resume_state",
    "newest_state",
    "prune",
    "random_state",
    "restore_random_state",
    "write_state",
    "write_torch",
]


_LARGEST = 2**62  # of whole numbers in a state
_COUNT = range(_LARGEST)
# The form of a training state: BasicSR's, and what ours has beside. `_matches` reads it.
_NEEDED = {"epoch": _COUNT, "iter": _COUNT, "optimizers": list, "schedulers": list}
_OURS = {
    "data": dict.fromkeys(("seed", "samples", "batch", "epoch", "done"), _COUNT),  # the sampler's
    "sha256": {str: str},
    "options": str,
    "random": list,
    "pools": [{"lq": torch.Tensor, "gt": torch.Tensor, "filled": _COUNT}],
    "skipped": {str: int},
    "metrics": {
        "history": [{str: int | float | str}],
        "best": {str: {str: {"better": str, "val": float, "iter": int}}},
    },
}


# Writing


def write_torch(path: str | Path, content: object) -> str:
    """Write what `torch.save` writes, whole or not at all.

    Returns:
        The file's SHA-256, in hexadecimal.

    Raises:
        UserError: It cannot be written, as when the disk is full.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getbuffer()
    with written_whole(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def write_state(opt: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the training state of ``state["iter"]``, which replaces one of the same iteration."""
    write_torch(Path(opt["path"]["training_states"]) / f"{state['iter']}.state", dict(state))


def prune(opt: Mapping[str, Any], kept: int) -> None:
    """Remove all but the ``kept`` newest checkpoints. ``net_g_latest`` and what others put there stays."""
    models = Path(opt["path"]["models"])
    for state in _states(opt)[kept:]:
        # First of all it is no state any more: none is ever without its weights. Where this is interrupted,
        # the next call finds what was left.
        state.replace(state.with_suffix(".pruned"))
    for state in Path(opt["path"]["training_states"]).glob("*.pruned"):
        for label in _labels(opt):
            for suffix in (".pth", ".safetensors"):
                (models / f"net_{label}_{state.stem}{suffix}").unlink(missing_ok=True)
        state.unlink()


def _set_aside_newer(opt: Mapping[str, Any], iteration: int) -> None:
    """Rename states beyond the one that is resumed: a later resumption would take them, and prune others."""
    for state in _states(opt):
        if int(state.stem) > iteration:
            aside = state.with_name(f"{state.name}.abandoned")
            state.replace(aside)
            logger.warning(
                "Training goes on from iteration %d: %s is renamed %s.", iteration, state, aside.name
            )


def newest_state(opt: Mapping[str, Any]) -> Path | None:
    """Find the experiment's newest training state, if it has any."""
    return next(iter(_states(opt)), None)


# Random numbers


def random_state() -> dict[str, Any]:
    """Give the state of this process's global random numbers, in values that a training state may hold."""
    name, numbers, position, has_normal, normal = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(numbers, np.int64)), position, has_normal, normal],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Go on with the random numbers of a process whose `random_state` it was."""
    random.setstate(state["python"])
    name, numbers, position, *others = state["numpy"]
    if not 0 <= position <= len(numbers):
        raise ValueError(f"random numbers at {position} of {len(numbers)}")
    np.random.set_state((name, numbers.numpy().astype(np.uint32), position, *others))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# Resuming


def load_resume_state(opt: dict[str, Any]) -> Any:
    """Read the training state to resume from, on the CPU; None to start anew.

    With ``--auto_resume`` the newest state of this experiment that is whole, its networks' weights included,
    if it has any; else ``path.resume_state``. ``opt["resume"]`` is set to where in the data it was.

    Raises:
        UserError: ``path.resume_state`` is not whole, or none of the experiment's states is; or training is
            to start anew in an experiment that has states, which BasicSR would archive.
    """
    if (opt.get("logger") or {}).get("use_tb_logger"):
        folder = Path(opt["path"]["experiments_root"]).parent.parent / "tb_logger"
        on_first_rank(lambda: check_writable(folder))  # BasicSR would raise what it meets, later
    # One process chooses: on another node a file may be there a little later.
    found = on_first_rank(lambda: _find_resume_state(opt))
    if found is None:
        return None
    path, state = found
    if Path(path).parent.resolve() == Path(opt["path"]["training_states"]).resolve():
        on_first_rank(lambda: _set_aside_newer(opt, state["iter"]))
    opt["path"]["resume_state"] = path
    opt["resume"] = {**state.get("data", {}), "epoch": state["epoch"], "iter": state["iter"]}
    for folder in {"experiments_root", "models", "training_states", "visualization"} & opt["path"].keys():
        # BasicSR makes them for new experiments alone; the state may be another one's.
        Path(opt["path"][folder]).mkdir(parents=True, exist_ok=True)
    importlib.import_module("basicsr.utils").check_resume(opt, state["iter"])
    for label, weights in zip(_resumed_labels(opt), _weights_of(opt, state, Path(path)), strict=True):
        opt["path"][f"pretrain_network_{label}"] = str(weights)  # of another experiment, if the state is
    return state


def _find_resume_state(opt: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    states = _states(opt)
    given = opt["path"].get("resume_state")
    if opt["auto_resume"] and states:
        if given is not None:
            logger.info("--auto_resume: %s goes before path.resume_state, %s.", states[0].parent, given)
        for file in states:
            try:
                return str(file), _read_state(opt, file)
            except UserError as error:
                logger.warning("--auto_resume passes over a state: %s", error)
        raise UserError(
            f"--auto_resume: none of the {len(states)} training states in {states[0].parent} can be resumed "
            "from. To start anew, move that folder away."
        )
    if given is not None:
        return str(given), _read_state(opt, Path(given))
    if states and not opt["name"].startswith("debug_"):
        raise UserError(
            f"{opt['path']['experiments_root']} holds an experiment of this name, at iteration "
            f"{states[0].stem}. Add --auto_resume to go on from there; to start anew, give another name or "
            "move that folder away."
        )
    return None


def _states(opt: Mapping[str, Any]) -> list[Path]:
    """List the experiment's training states, newest first."""
    files = Path(opt["path"]["training_states"]).glob("*.state")
    return sorted(
        (file for file in files if file.stem.isdecimal() and file.is_file()),
        key=lambda file: int(file.stem),
        reverse=True,
    )


def _read_state(opt: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Read a training state, if the weights that belong to it can be read too: check_resume sets them."""
    try:
        refuse_bombs(path)
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load checks no sums
                raise ValueError(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such training state. Use another one.") from None
    except Exception as error:  # a damaged file can make torch raise anything
        raise UserError(
            f"{path}: not a readable training state: it is cut short or damaged. Use an older one."
        ) from error
    if not _is_state(state):
        raise UserError(f"{path}: not a training state, which holds epoch, iter, optimizers and schedulers.")
    for weights in _weights_of(opt, state, path):
        if not weights.is_file():
            raise UserError(f"{path}: the weights that belong to it, {weights}, are missing.")
        try:
            read_weights(weights)
        except UserError as error:
            raise UserError(f"{path}: the weights that belong to it cannot be used: {error}") from error
        expected = state.get("sha256", {}).get(weights.name)
        if expected is not None and hashlib.sha256(weights.read_bytes()).hexdigest() != expected:
            raise UserError(
                f"{path}: the weights that belong to it, {weights}, are damaged or of another run."
            )
    return state


def _is_state(state: Any) -> bool:
    """Tell whether it has the form of a training state: BasicSR's, or ours with more."""
    if not isinstance(state, dict) or not _NEEDED.keys() <= state.keys():
        return False
    for key, form in (_NEEDED | _OURS).items():
        is_empty = key == "data" and state.get(key) == {}  # saved before the first batch
        if key in state and not is_empty and not _matches(state[key], form):
            return False
    entries = state.get("metrics", {}).get("history", [])
    return all(type(entry.get("iter")) is int and type(entry.get("set")) is str for entry in entries)


def _matches(value: Any, form: Any) -> bool:
    """Tell whether a value has a form.

    Args:
        value: What was read.
        form: A type or several; a range of whole numbers; ``[form]`` of all items; ``{type: form}`` of all
            values, by keys of that type; or the form of the value of each key, none of which is missing.
    """
    if isinstance(form, range):
        return type(value) is int and value in form
    if isinstance(form, list):
        return type(value) is list and all(_matches(item, form[0]) for item in value)
    if isinstance(form, dict):
        if type(value) is not dict:
            return False
        key, inner = next(iter(form.items()))
        if isinstance(key, type):
            return all(type(name) is key and _matches(item, inner) for name, item in value.items())
        return value.keys() == form.keys() and all(_matches(value[key], form[key]) for key in form)
    return isinstance(value, form) if isinstance(form, types.UnionType) else type(value) is form


def check_form(found: Any, own: Any, where: str) -> None:
    """Compare a part of a training state with the same part of this training's own.

    Args:
        found: What was read: tensors, numbers, texts, and containers of them.
        own: What it must be like. Numbers may differ, but must be finite; of numbers alone a container may
            have more or fewer. Keys of one dict alone are ignored; an empty container allows anything.
        where: What it is called.

    Raises:
        ValueError: It is not like that; it says where.
    """
    if isinstance(own, Mapping) and isinstance(found, Mapping):
        if all(map(_is_number, own.values())):
            fits = not own or all(map(_is_number, found.values()))
        else:
            fits = True
            for key in own.keys() & found.keys():
                check_form(found[key], own[key], f"{where}.{key}")
    elif isinstance(own, list | tuple) and isinstance(found, list | tuple):
        if all(map(_is_number, own)):
            fits = not own or all(map(_is_number, found))
        else:
            fits = len(found) == len(own)
            for number, pair in enumerate(zip(found, own, strict=False)):
                check_form(*pair, f"{where}.{number}")
    else:
        fits = _is_number(found) if _is_number(own) else type(found) is type(own)
    if not fits:
        raise ValueError(f"{where} is not what it should be")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


def _labels(opt: Mapping[str, Any]) -> list[str]:
    """Give ``g`` for ``network_g``, and the like."""
    return [key.removeprefix("network_") for key in opt if key.startswith("network_")]


def _resumed_labels(opt: Mapping[str, Any]) -> list[str]:
    ignored = opt["path"].get("ignore_resume_networks") or ()
    return [label for label in _labels(opt) if f"network_{label}" not in ignored]


def _weights_of(opt: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> list[Path]:
    """Locate the weights that belong to the state in ``path``: of its own experiment, whichever that is."""
    beside = path.parent.parent / "models"
    models = beside if beside.is_dir() else Path(opt["path"]["models"])
    return [models / f"net_{label}_{state['iter']}.pth" for label in _resumed_labels(opt)]
