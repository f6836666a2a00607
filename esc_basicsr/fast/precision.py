"""Precisions by name, and keeping the operands' within autocast."""

import contextlib

import torch

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HALF_PRECISIONS = {name: dtype for name, dtype in PRECISIONS.items() if name != "fp32"}


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Give a context in which operations keep their operands' precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
