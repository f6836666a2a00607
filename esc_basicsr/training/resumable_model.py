"""Training that can be interrupted at any instant and goes on as if it had not been."""

import json
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from basicsr.data import build_dataloader, build_dataset
from torch import Tensor

from esc_basicsr.common import signals as stopping
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.training import checkpoints, heartbeat
from esc_basicsr.training.shared_validation import SharedValidation
from esc_basicsr.weights.checkpoint import write_safetensors

__all__ = ["ResumableModel"]

# What a state of another form makes PyTorch raise.
_MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class ResumableModel(SharedValidation):
    """An SRModel whose checkpoints hold all that training depends on.

    They are written whole, by rank 0, and verified when they are read (`training.checkpoints`). A resumed
    run ends as one that was never interrupted: bit for bit on a CPU, with as many processes. SIGTERM and
    Ctrl-C save a checkpoint and end the process.

    Option keys beyond SRModel's:

    * ``logger.keep_checkpoints``: how many are kept, the newest ones; all if left out.
    * ``logger.safetensors``: true. Beside each ``.pth`` lies a ``.safetensors`` file of the weights to use,
      EMA's if there are, with the network's options as metadata.
    """

    def init_training_settings(self) -> None:
        """Set up training, and heed wishes to stop."""
        super().init_training_settings()
        self._place: dict[str, int] = {}  # in the training data, after the batch that was fed last
        self._sha256: dict[str, str] = {}  # of the newest weights, by file name
        self._saved: tuple[int, int] | None = None  # epoch and iteration of the newest state
        self._must_stop = False  # the same on all ranks
        stopping.heed()

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch; of training data, note where in it it ends."""
        if "position" in data:
            self._place = data["position"]
        super().feed_data(data)

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """Set an iteration's learning rate; or, if all ranks know of a wish to stop, fulfil it."""
        if self._must_stop:
            self._save_and_exit(current_iter - 1)
        super().update_learning_rate(current_iter, warmup_iter)

    def validation(self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool = False) -> None:
        """Measure on one set. In training the checkpoint of the same iteration learns what came out."""
        super().validation(dataloader, current_iter, tb_logger, save_img)
        if not self.is_train or (self.opt["val"] or {}).get("metrics") is None:
            return
        iteration = min(current_iter, int(self.opt["train"]["total_iter"]))
        name = dataloader.dataset.opt["name"]
        missing = {self.opt["datasets"][phase]["name"] for phase in self.validations_missing(iteration)}
        if name in missing:  # it was cut short, on all ranks
            self._save_and_exit(iteration)
        if self._saved is not None and self._saved[1] == iteration and not missing:
            self.save_training_state(*self._saved)

    def save(self, epoch: int, current_iter: int) -> None:
        """Write a checkpoint of an iteration; -1 is the end of training, whose weights have no state.

        Raises:
            UserError: It cannot be written; on every rank.
        """
        iteration = "latest" if current_iter == -1 else current_iter
        networks = {"params": self.net_g}
        if self.ema_decay > 0:
            networks["params_ema"] = self.net_g_ema
        weights = {
            key: {name: value.cpu() for name, value in self.get_bare_model(net).state_dict().items()}
            for key, net in networks.items()
        }
        path = Path(self.opt["path"]["models"]) / f"net_g_{iteration}.pth"
        checkpoints.on_first_rank(lambda: self._write_weights(path, weights))
        if current_iter != -1:
            self.save_training_state(epoch, current_iter)

    def _write_weights(self, path: Path, weights: dict[str, dict[str, Tensor]]) -> None:
        digest = checkpoints.write_torch(path, weights)
        if path.stem != "net_g_latest":  # which has no state
            self._sha256 = {path.name: digest}
        if self.opt["logger"].get("safetensors"):
            key = [*weights][-1]
            about = {
                "param_key": key,
                "name": self.opt["name"],
                "scale": str(self.opt["scale"]),
                "iteration": path.stem.removeprefix("net_g_"),
                "network_g": json.dumps(self.opt["network_g"]),
            }
            write_safetensors(path.with_suffix(".safetensors"), weights[key], about)

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """Write what a checkpoint has beyond weights, and remove checkpoints that need not be kept.

        Raises:
            UserError: It cannot be written; on every rank.
        """
        state = self.training_state() | {"epoch": epoch, "iter": current_iter}

        def write() -> None:
            checkpoints.write_state(self.opt, {**state, "sha256": self._sha256})
            kept = self.opt["logger"].get("keep_checkpoints")
            if kept is not None:
                checkpoints.prune(self.opt, kept)

        checkpoints.on_first_rank(write)
        self._saved = epoch, current_iter

    def training_state(self) -> dict[str, Any]:
        """All that training depends on but weights and the iteration, in values that are safe to load.

        Every rank must call it.
        """
        randoms: list[Any] = [checkpoints.random_state()]
        if self.opt["dist"]:
            own = randoms[0]
            randoms = [None] * self.opt["world_size"]
            dist.all_gather_object(randoms, own)
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "data": self._place,
            "random": randoms,
            "metrics": self.metrics_state(),
        }

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Go on where ``resume_state``, a training state, was saved.

        Raises:
            UserError: It is of another training: of another network, optimizer or schedule.
        """
        randoms = resume_state.get("random", [])
        try:
            self._check_form(resume_state)
            super().resume_training(resume_state)
            self._check_optimizers()
            if len(randoms) == self.opt["world_size"]:
                checkpoints.restore_random_state(randoms[self.opt["rank"]])
        except _MISFITS as error:
            raise UserError(
                f"{self.opt['path']['resume_state']} does not fit these options ({error}): it is a state of "
                "another network, optimizer or schedule. Give the options that it was saved by."
            ) from error
        iteration = resume_state["iter"]
        total = int(self.opt["train"].get("total_iter", iteration))
        if iteration > total:
            raise UserError(
                f"{self.opt['path']['resume_state']} is of iteration {iteration}, beyond train.total_iter, "
                f"{total}: there is nothing left to train. Raise it, or resume an older state."
            )
        self._saved = resume_state["epoch"], iteration
        self._sha256 = resume_state.get("sha256", {})
        self._place = resume_state.get("data", {})
        if "metrics" in resume_state:
            self.restore_metrics(resume_state["metrics"])
        if len(randoms) != self.opt["world_size"]:
            whose = f"{len(randoms)} processes" if randoms else "another program"
            logger.warning(
                "The state was saved by %s: training goes on, though not exactly as it would have.", whose
            )
        self._validate_what_was_missed(iteration)

    def _check_form(self, state: dict[str, Any]) -> None:
        """Look at a state before optimizers and schedulers take it in, who would take in anything.

        Raises:
            ValueError: They are not such as this training's own.
        """
        for index, (optimizer, found) in enumerate(zip(self.optimizers, state["optimizers"], strict=True)):
            where = f"optimizers.{index}"
            checkpoints.check_form(found, {**optimizer.state_dict(), "state": {}}, where)
            for entry in found["state"].values():
                for name, value in entry.items():
                    # as yet no one knows whose shape it must have; one number repeated is as good as endless
                    is_plain = (
                        isinstance(value, Tensor)
                        and (value.device.type, value.layout) == ("cpu", torch.strided)
                        and value.nbytes <= value.untyped_storage().nbytes()
                    )
                    if not is_plain or not bool(value.isfinite().all()):
                        raise ValueError(f"{where}.state.{name} is not what it should be")
        for index, (scheduler, found) in enumerate(zip(self.schedulers, state["schedulers"], strict=True)):
            where = f"schedulers.{index}"
            checkpoints.check_form(found, scheduler.state_dict(), where)
            for name in found:
                if callable(getattr(scheduler, name, None)):  # it would take the method's place
                    raise ValueError(f"{where}.{name} is not what it should be")

    def _check_optimizers(self) -> None:
        """PyTorch's optimizers take what they are given, and fail at the first step."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if missing := {*optimizer.defaults, "initial_lr"} - group.keys():
                    raise ValueError(f"no {', '.join(sorted(missing))}")
            needed = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.Adam) else set()
            for parameter, entry in optimizer.state.items():
                if missing := needed - entry.keys():
                    raise ValueError(f"no {', '.join(sorted(missing))}")
                for name, value in entry.items():
                    if value.shape != (() if name == "step" else parameter.shape):
                        raise ValueError(f"{name} of shape {[*value.shape]} for {[*parameter.shape]}")

    def _validate_what_was_missed(self, iteration: int) -> None:
        """Catch up where training was interrupted between saving and validating."""
        val = self.opt.get("val") or {}
        if val.get("metrics") is None or iteration % val["val_freq"]:
            return
        for phase in self.validations_missing(iteration):
            section = self.opt["datasets"][phase]
            loader = build_dataloader(build_dataset(section), section, self.opt["num_gpu"], self.opt["dist"])
            self.validation(loader, iteration, None, val["save_img"])

    def _save_and_exit(self, iteration: int) -> NoReturn:
        if self._saved is None or self._saved[1] != iteration:
            self.save(self._place.get("epoch", 0), iteration)
        signal = stopping.requested()
        logger.info(
            "Stopped at iteration %d%s. Its state is saved: go on with --auto_resume.",
            *(iteration, f" by {signal.name}" if signal else ""),
        )
        heartbeat.agree_to_end()
        raise SystemExit(stopping.exit_code())
