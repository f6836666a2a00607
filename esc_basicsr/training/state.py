"""A training's state: all that it depends on beside weights, saved with them and restored."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.training import checkpoints
from esc_basicsr.training.changed_options import (
    load_optimizer,
    load_scheduler,
    report_changes,
)
from esc_basicsr.training.metric_records import MetricRecords
from esc_basicsr.training.ranks import gather, on_first_rank
from esc_basicsr.training.skipped_steps import SkippedSteps
from esc_basicsr.weights.write import write_safetensors

__all__ = ["TrainingState", "is_plain"]

# What a state of another form makes PyTorch raise.
_MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Numbers for each parameter in optimizers' states; all else there has the parameter's shape.
_SCALARS = {"step", "eta", "mu"}


@dataclass
class TrainingState:
    """Checkpoints of a training: writes them whole, by rank 0, and goes on from them.

    A resumed run ends as one that was never interrupted: bit for bit on a CPU, with as many processes.
    """

    opt: dict[str, Any]  # all options
    options: str  # what `options_of` wrote down of them
    optimizers: Sequence[torch.optim.Optimizer]
    schedulers: Sequence[Any]
    scaler: torch.amp.GradScaler  # of gradients; its scale is part of the state if it is enabled
    records: MetricRecords
    skipped: SkippedSteps
    position: dict[str, int] = field(default_factory=dict)  # in the data, after the batch that was fed last
    # Pairs that this rank keeps for later batches, as Real-ESRGAN's models do: ``lq`` and ``gt``, of which
    # the first ``filled`` are pairs; empty where there are none.
    pool: dict[str, Any] = field(default_factory=dict)
    _sha256: dict[str, str] = field(default_factory=dict)  # of the newest weights, by file name
    _saved: tuple[int, int] | None = None  # epoch and iteration of the newest state

    # Saving

    def is_saved(self, iteration: int) -> bool:
        """Tell whether the newest state is that of an iteration."""
        return self._saved is not None and self._saved[1] == iteration

    def save_weights(self, label: str, name: int | str, networks: dict[str, nn.Module]) -> None:
        """Write the weights of an iteration, or of the name ``latest``, which has no state.

        ``networks``, such as those of the label ``net_g``, are by their keys in the file; the weights to use
        come last.

        Raises:
            UserError: They cannot be written; on every rank.
        """
        path = Path(self.opt["path"]["models"]) / f"{label}_{name}.pth"
        weights = {
            key: {name: value.cpu() for name, value in net.state_dict().items()}
            for key, net in networks.items()
        }

        def write() -> None:
            digest = checkpoints.write_torch(path, weights)
            if name != "latest":
                older = self._sha256.items()
                newest = {file: known for file, known in older if Path(file).stem.endswith(f"_{name}")}
                self._sha256 = newest | {path.name: digest}
            if label == "net_g" and self.opt["logger"].get("safetensors"):
                key = [*weights][-1]
                metadata = {
                    "param_key": key,
                    "name": self.opt["name"],
                    "scale": str(self.opt["scale"]),
                    "iteration": str(name),
                    "network_g": json.dumps(self.opt["network_g"]),
                }
                write_safetensors(path.with_suffix(".safetensors"), weights[key], metadata)

        on_first_rank(write)

    def save(self, epoch: int, iteration: int) -> None:
        """Write what a checkpoint has beside weights, and remove checkpoints that need not be kept.

        Raises:
            UserError: It cannot be written; on every rank.
        """
        state = self.collect() | {"epoch": epoch, "iter": iteration}

        def write() -> None:
            checkpoints.write_state(self.opt, {**state, "sha256": self._sha256})
            kept = (self.opt.get("logger") or {}).get("keep_checkpoints")
            if kept is not None:
                checkpoints.prune(self.opt, kept)

        on_first_rank(write)
        self._saved = epoch, iteration

    def save_again(self) -> None:
        """Write the newest state with the figures that were measured since."""
        assert self._saved is not None
        self.save(*self._saved)

    def collect(self) -> dict[str, Any]:
        """Give the state without epoch and iteration, in values that are safe to load; on every rank."""
        state = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "data": self.position,
            "random": gather(checkpoints.random_state()),
            "metrics": self.records.state(),
            "skipped": self.skipped.counts,
            "options": self.options,
        }
        if self.pool:
            state["pools"] = gather(self.pool)
        return state | ({"grad_scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {})

    # Resuming

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was saved.

        Raises:
            UserError: It is of another training: of another network, optimizer or schedule.
        """
        path, randoms = self.opt["path"].get("resume_state"), state.get("random", [])
        try:
            if "options" in state:
                report_changes(self.options, state["options"])
            self._check(state)
            for optimizer, found in zip(self.optimizers, state["optimizers"], strict=True):
                load_optimizer(optimizer, found)
            for scheduler, found in zip(self.schedulers, state["schedulers"], strict=True):
                load_scheduler(scheduler, found)
            if "grad_scaler" in state:
                self.scaler.load_state_dict(state["grad_scaler"])
            if len(randoms) == self.opt["world_size"]:
                checkpoints.restore_random_state(randoms[self.opt["rank"]])
                if len(pools := state.get("pools", [])) == len(randoms):
                    self.pool = pools[self.opt["rank"]]
        except _MISFITS as error:
            raise UserError(
                f"{path} does not fit these options ({error}): it is a state of another network, optimizer "
                "or schedule. Give the options that it was saved by."
            ) from error
        iteration = state["iter"]
        total = int(self.opt["train"].get("total_iter", iteration))
        if iteration > total:
            raise UserError(
                f"{path} is of iteration {iteration}, beyond train.total_iter, {total}: there is nothing "
                "left to train. Raise it, or resume an older state."
            )
        self._saved = state["epoch"], iteration
        self._sha256 = state.get("sha256", {})
        self.position = state.get("data", {})
        self.skipped.counts |= state.get("skipped", {})
        if "metrics" in state:
            self.records.restore(state["metrics"])
        if len(randoms) != self.opt["world_size"]:
            source = f"{len(randoms)} processes" if randoms else "another program"
            logger.warning(
                "The state was saved by %s: training goes on, though not exactly as it would have.", source
            )

    def _check(self, state: dict[str, Any]) -> None:
        """Look at a state before optimizers and schedulers take it in, who would take in anything.

        Raises:
            ValueError, LookupError: They are not such as this training's own.
        """
        if "grad_scaler" in state:
            checkpoints.check_form(state["grad_scaler"], self.scaler.state_dict(), "grad_scaler")
        for index, (optimizer, found) in enumerate(zip(self.optimizers, state["optimizers"], strict=True)):
            where = f"optimizers.{index}"
            checkpoints.check_form(found, {**optimizer.state_dict(), "state": {}}, where)
            for group in found["param_groups"]:
                _refuse_missing({*optimizer.defaults, "initial_lr"} - group.keys())
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            needed = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.Adam) else set()
            for number, entry in found["state"].items():
                _refuse_missing(needed - entry.keys())
                for name, value in entry.items():
                    shape = () if name in _SCALARS else parameters[number].shape
                    if not is_plain(value, shape):
                        raise ValueError(f"{where}.state.{number}.{name} is not what it should be")
        for index, (scheduler, found) in enumerate(zip(self.schedulers, state["schedulers"], strict=True)):
            where = f"schedulers.{index}"
            checkpoints.check_form(found, scheduler.state_dict(), where)
            for name in found:
                if callable(getattr(scheduler, name, None)):  # it would take the method's place
                    raise ValueError(f"{where}.{name} is not what it should be")


def _refuse_missing(names: set[str]) -> None:
    if names:
        raise ValueError(f"no {', '.join(sorted(names))}")


def is_plain(value: Any, shape: tuple[int, ...]) -> bool:
    """Tell whether it is a tensor of finite numbers in memory, of this shape."""
    return (
        isinstance(value, Tensor)
        and (value.device.type, value.layout, value.shape) == ("cpu", torch.strided, shape)
        and bool(value.isfinite().all())
    )
