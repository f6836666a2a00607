"""Options that were changed since a training was interrupted: honoured where they can be, and named."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger

__all__ = ["load_optimizer", "load_scheduler", "options_of", "report_changes"]

# Of all options: these say where and how a training runs. The seed is the loader's to compare.
_INCIDENTAL = {
    *("name", "path", "val", "logger", "num_gpu", "dist_params", "rank", "world_size", "dist", "auto_resume"),
    *("manual_seed", "seed_is_drawn", "is_train", "root_path", "resume", "datasets", "cpu_kernels"),
    "find_unused_parameters",
}
# Of datasets.train: these change no sample.
_WITHOUT_EFFECT = {
    *("name", "phase", "num_worker_per_gpu", "prefetch_mode", "num_prefetch_queue", "pin_memory"),
    *("persistent_workers", "max_unreadable", "io_backend"),
}
# Of a scheduler's state: where it is, not which it is.
_PROGRESS = {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "verbose"}


def options_of(opt: Mapping[str, Any]) -> str:
    """Write down the options that a training depends on, as JSON."""
    data = {key: value for key, value in opt["datasets"]["train"].items() if key not in _WITHOUT_EFFECT}
    sections = {key: value for key, value in opt.items() if key not in _INCIDENTAL} | {
        "datasets": {"train": data}
    }
    return json.dumps(sections, sort_keys=True, default=str)


def report_changes(now: str, before: str) -> None:
    """Name the options that differ from those that a state was saved by; `options_of` wrote down both.

    Raises:
        UserError: The optimizer is another one: the state's moments are of no use to it.
        ValueError: ``before`` is not what `options_of` writes.
    """
    old, new = (dict(_flat("", json.loads(text))) for text in (before, now))
    if "" in old:
        raise ValueError("options are none")
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    changes = {key: (old.get(key, "none"), new.get(key, "none")) for key in differing}
    for key, (was, is_now) in changes.items():
        if key.startswith("train.optim_") and key.endswith(".type"):
            raise UserError(
                f"{key} was {was} and is {is_now}: what the state holds of one is of no use to the other. "
                "Set it back, or start a new experiment from the weights (path.pretrain_network_g)."
            )
    if changes:
        lines = [f"  {key}: {was} -> {is_now}" for key, (was, is_now) in sorted(changes.items())]
        logger.warning(
            "Options differ from the state's; from here on the new ones hold:\n%s", "\n".join(lines)
        )


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value


def load_optimizer(optimizer: torch.optim.Optimizer, found: Mapping[str, Any]) -> None:
    """Load an optimizer's moments; its settings remain those of the options, but for the learning rate."""
    groups: Sequence[dict[str, Any]] = [
        {**theirs, **{key: value for key, value in ours.items() if key not in ("params", "lr")}}
        for theirs, ours in zip(found["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**found, "param_groups": groups})


def load_scheduler(scheduler: Any, found: Mapping[str, Any]) -> None:
    """Load a schedule's progress; where the options have another one, find out where that would be by now."""
    own = scheduler.state_dict()
    if all(found.get(key) == own[key] for key in own.keys() - _PROGRESS):
        scheduler.load_state_dict(found)
        return
    for group in scheduler.optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch misses the optimizer's steps, which were taken before
        for _ in range(found["last_epoch"]):
            scheduler.step()
    rates = ", ".join(f"{rate:.3g}" for rate in scheduler.get_last_lr())
    logger.info("The schedule differs from the state's: the learning rate is now %s.", rates)
