"""Trained networks: those that ship with this package, by name, and any checkpoint file."""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from esc_basicsr.archs.variants import RELEASED
from esc_basicsr.common.errors import UserError
from esc_basicsr.weights.fit import build_fitting, load_weights
from esc_basicsr.weights.read import read_weights

__all__ = ["ListedModel", "TrainedNetwork", "default_model", "load_network", "model_list", "weights_file"]

_FOLDER = Path(__file__).parent / "trained"


@dataclass(frozen=True)
class ListedModel:
    """One entry of models.json, the list of networks that ship with this package.

    Args:
        file: Name of the .safetensors file beside the list.
        sha256: Its checksum, in hexadecimal.
        variant: The published variant, such as ESC-light.
        scale: Upscaling factor.
        psnr: Measured PSNR on Y in dB, by test set.
        data: What it was trained on.
        licence: Of the weights.
    """

    file: str
    sha256: str
    variant: str
    scale: int
    psnr: dict[str, float]
    data: str
    licence: str


class TrainedNetwork(NamedTuple):
    """A network with its weights, on the CPU, in evaluation mode.

    ``options`` is its ``network_g``; ``variant`` the published variant that it is, None if it is another;
    ``scale`` its upscaling factor; ``name`` what it was loaded by.
    """

    network: nn.Module
    options: dict[str, Any]
    variant: str | None
    scale: int
    name: str


@functools.cache
def model_list() -> dict[str, ListedModel]:
    """List the networks that ship with this package, by name."""
    entries = json.loads((_FOLDER / "models.json").read_text(encoding="utf-8"))
    return {name: ListedModel(**entry) for name, entry in entries.items()}


def default_model(scale: int | None = None) -> str:
    """Name the network that is used where none is named: the first of the list, of this scale.

    Raises:
        UserError: No network of this scale ships with this package.
    """
    for name, listed in model_list().items():
        if scale in (None, listed.scale):
            return name
    wanted = "" if scale is None else f" of scale ×{scale}"
    raise UserError(
        f"No trained network{wanted} ships with this package: name a checkpoint file with --model."
    )


def load_network(model: str | Path) -> TrainedNetwork:
    """Load a trained ESC network; architecture, variant and scale are told from its weights.

    Args:
        model: A name of `model_list`, or a checkpoint file: .pth (``params_ema`` is taken where there is one)
            or .safetensors, of the release or of this package.

    Raises:
        UserError: There is neither such a name nor such a file, or it does not hold weights of ESC.
    """
    path = weights_file(model)
    if not path.exists():
        names = ", ".join(model_list()) or "none"
        raise UserError(f"{model}: there is no such file, nor does a network of that name ship ({names}).")
    weights = read_weights(path, "params_ema")
    network, options = build_fitting(weights, model)
    load_weights(network, weights, model)
    scale = int(options["upscaling_factor"])
    named = (name for name, variant in RELEASED.items() if {**variant, "upscaling_factor": scale} == options)
    return TrainedNetwork(network, options, next(named, None), scale, str(model))


def weights_file(model: str | Path) -> Path:
    """Find the file of a network that ships, by its name; else ``model`` itself, where ~ is the home folder.

    Raises:
        UserError: The file of the network that ships is damaged.
    """
    listed = model_list().get(str(model))
    if listed is None:
        return Path(os.path.expanduser(model))  # noqa: PTH111 - no error for an unknown ~user
    path = _FOLDER / listed.file
    try:
        is_whole = hashlib.sha256(path.read_bytes()).hexdigest() == listed.sha256
    except OSError:
        is_whole = False
    if not is_whole:
        raise UserError(f"{path} is damaged: install esc_basicsr anew.")
    return path
