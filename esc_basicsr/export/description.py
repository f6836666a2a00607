"""The metadata of exported files."""

import json
from pathlib import Path

from esc_basicsr.common.version import __version__
from esc_basicsr.weights.read import is_safetensors, read_safetensors_metadata
from esc_basicsr.weights.shipped import TrainedNetwork, model_list


def describe(trained: TrainedNetwork, precision: str) -> dict[str, str]:
    """Metadata of an exported network, by key.

    They are the source's own, where it is a .safetensors file, and what the list of models says of one that
    ships; then ``variant`` (where it is a published one), ``scale``, ``network_g`` (JSON), ``precision`` and
    ``esc_basicsr``, the version that wrote the file.
    """
    about: dict[str, str] = {}
    listed = model_list().get(trained.name)
    if listed is not None:
        about = {"name": trained.name, "data": listed.data, "licence": listed.licence}
    elif is_safetensors(source := Path(trained.name).expanduser()):
        about = read_safetensors_metadata(source)
    if trained.variant is not None:
        about["variant"] = trained.variant
    return about | {
        "scale": str(trained.scale),
        "network_g": json.dumps(trained.options),
        "precision": precision,
        "esc_basicsr": __version__,
    }
