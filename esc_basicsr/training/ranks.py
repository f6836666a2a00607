"""Exchanges between ranks. Where there is one process, they do what is to be done without any."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from esc_basicsr.common.errors import UserError

__all__ = ["described", "gather", "on_first_rank", "own_rank", "raise_everywhere"]

T = TypeVar("T")


def own_rank() -> int:
    """Give this process's rank; 0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(own: T) -> list[T]:
    """Collect what each rank gives, in their order, on every rank."""
    if not dist.is_initialized():
        return [own]
    everyones = [own] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    return everyones


def raise_everywhere(error: Exception | None) -> None:
    """Raise an error that any rank has: on its rank as it is, elsewhere as a `UserError` that names it."""
    messages = gather(None if error is None else described(error))
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise UserError(f"{message} (rank {rank})")


def on_first_rank(work: Callable[[], T]) -> T:
    """Have rank 0 do something; give its result on every rank, or raise its error as `raise_everywhere`."""
    result: list[Any] = [None]
    error: Exception | None = None
    if own_rank() == 0:
        try:
            result = [work()]
        except Exception as caught:  # whatever it is, the other ranks wait to hear of it
            error = caught
    raise_everywhere(error)
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def described(error: Exception) -> str:
    """Describe an error in a line or two: a user's in its own words, any other with its kind."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
