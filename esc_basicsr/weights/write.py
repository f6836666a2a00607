"""Writing weights as .safetensors files."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from esc_basicsr.common.files import written_whole

__all__ = ["write_safetensors"]


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
