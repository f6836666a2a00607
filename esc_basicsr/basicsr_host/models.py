"""Methods that every model of BasicSR has from here, in place of its base class's own."""

import functools
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esc_basicsr.common.log import logger
from esc_basicsr.data.loaders import batch_of_process
from esc_basicsr.training.changed_options import options_of
from esc_basicsr.training.shared_validation import SharedValidation, published_variant
from esc_basicsr.training.skipped_steps import SkippedSteps
from esc_basicsr.training.state import TrainingState, is_plain
from esc_basicsr.training.stopping import Stopping
from esc_basicsr.weights.fit import load_weights
from esc_basicsr.weights.read import read_weights
from esc_basicsr.weights.shipped import weights_file


def load_network(
    self: Any, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = "params"
) -> None:
    """Load a checkpoint into a network, wrapped for several GPUs or not.

    Weights of another scale are converted, so that ×3 and ×4 can start from ×2.

    Args:
        self: The model.
        net: The network.
        load_path: A ``.pth`` or ``.safetensors`` file, or the name of a network that ships.
        strict: Whether every key must fit. If not, what does not fit keeps its value.
        param_key: Which of the file's state dicts; ``params`` is read where it has no ``params_ema``.

    Raises:
        UserError: The file cannot be read, or does not fit.
    """
    net = self.get_bare_model(net)
    logger.info("Loading %s from %s (%s).", type(net).__name__, load_path, param_key)
    load_weights(net, read_weights(weights_file(load_path), param_key), load_path, strict)


def get_optimizer(
    self: Any, optim_type: str, params: Iterable[nn.Parameter], lr: float, **kwargs: Any
) -> torch.optim.Optimizer:
    """Build an optimizer of ``torch.optim`` that steps by the gradients alone."""
    match optim_type:  # the option check reads these names here
        case (
            "Adam" | "AdamW" | "Adamax" | "NAdam" | "RAdam" | "SGD" | "ASGD" | "RMSprop" | "Rprop" | "Adagrad"
        ):
            return getattr(torch.optim, optim_type)(params, lr, **kwargs)
    raise NotImplementedError(f"optimizer {optim_type} is not supported.")


# States


def noting_options(init: Callable[..., None]) -> Callable[..., None]:
    """Have ``BaseModel.__init__`` write down the options, of which BasicSR takes out what it has used.

    From then on a signal to stop is noted, for `stopping_first`.
    """

    def call(self: Any, opt: dict[str, Any]) -> None:
        init(self, opt)
        if opt.get("is_train") and "train" in opt.get("datasets", {}):
            self._options = options_of(opt)
            self._stopping = Stopping()

    return call


def noting_position(feed_data: Callable[..., Any]) -> Callable[..., Any]:
    """Have a model's ``feed_data`` remember where in the training data its batch was."""

    @functools.wraps(feed_data)
    def feed(self: Any, data: Any) -> Any:
        if isinstance(data, dict) and "position" in data:  # of training data alone
            self._position = data["position"]
        return feed_data(self, data)

    return feed


def save_training_state(self: Any, epoch: int, current_iter: int) -> None:
    """Write what a checkpoint has beside weights; called on every rank."""
    if current_iter != -1:
        state = _state_of(self)
        state.position = getattr(self, "_position", state.position)
        state.pool = _pool_of(self)
        state.save(epoch, current_iter)


def resume_training(self: Any, resume_state: dict[str, Any]) -> None:
    """Go on where ``resume_state`` was saved, and make up for a validation that was not completed.

    Raises:
        UserError: It is of another training: of another network, optimizer or schedule.
    """
    state = _state_of(self)
    state.restore(resume_state)
    if hasattr(self, "queue_size") and self.opt.get("high_order_degradation", True):
        _fill_pool(self, state.pool)
    for loader in _validation_of(self).missed(resume_state["iter"]):
        self.validation(loader, resume_state["iter"], None, self.opt["val"]["save_img"])


def _pool_of(model: Any) -> dict[str, Any]:
    """Give the pairs that a model of Real-ESRGAN keeps for later batches; nothing of other models."""
    if not hasattr(model, "queue_lr"):
        return {}
    return {"lq": model.queue_lr.cpu(), "gt": model.queue_gt.cpu(), "filled": model.queue_ptr}


def _fill_pool(model: Any, pool: dict[str, Any]) -> None:
    """Give a model the pairs that a state has; none, and a warning, where they are of other sizes."""
    count, side, scale = model.queue_size, model.opt["gt_size"], model.opt["scale"]
    batch, _ = batch_of_process(model.opt)
    fits = pool and all(
        is_plain(pool[key], (count, 3, size, size)) for key, size in (("lq", side // scale), ("gt", side))
    )
    if fits and pool["filled"] in range(0, count + 1, batch):
        model.queue_lr, model.queue_gt = (pool[key].to(model.device) for key in ("lq", "gt"))
        model.queue_ptr = pool["filled"]
    else:
        logger.warning(
            "The state has no pool of pairs for these options: it is filled anew, and training goes on, "
            "though not exactly as it would have."
        )


def _state_of(model: Any) -> TrainingState:
    if not hasattr(model, "_state"):
        scaler = torch.amp.GradScaler(model.device.type, enabled=False)
        model._state = TrainingState(
            *(model.opt, getattr(model, "_options", "{}"), model.optimizers, model.schedulers, scaler),
            *(_validation_of(model).records, SkippedSteps(model.opt)),
        )
    return model._state


# Stopping


def stopping_first(update_learning_rate: Callable[..., None]) -> Callable[..., None]:
    """Have what begins an iteration save a checkpoint and exit instead, if a rank was asked to stop."""

    @functools.wraps(update_learning_rate)
    def update(self: Any, current_iter: int, warmup_iter: int = -1) -> None:
        # ESCModel agrees on it in its own steps; in the first iteration there is nothing to save.
        if current_iter > 1 and not hasattr(self, "stopping"):
            wishes = torch.tensor(self._stopping.wish(), device=self.device)
            if self.opt["dist"]:
                dist.all_reduce(wishes)
            self._stopping.agree(wishes.item())
            if self._stopping.is_agreed:
                _save_and_exit(self, current_iter - 1)
        update_learning_rate(self, current_iter, warmup_iter)

    return update


def _save_and_exit(model: Any, iteration: int) -> None:
    state = _state_of(model)
    if not state.is_saved(iteration):
        model.save(getattr(model, "_position", state.position).get("epoch", 0), iteration)
    model._stopping.exit(iteration)


# Validation


def dist_validation(self: Any, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool) -> None:
    """Measure on one set, with the other ranks."""
    self.nondist_validation(dataloader, current_iter, tb_logger, save_img)


def nondist_validation(self: Any, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool) -> None:
    """Measure on one set, with the other ranks (`SharedValidation.run`).

    In training the state of the same iteration is written again, with the figures. If a rank was asked to
    stop meanwhile, this saves a checkpoint and ends the process.
    """

    def upscale(batch: dict[str, Any]) -> dict[str, Tensor]:
        self.__dict__.pop("gt", None)  # of another batch
        self.feed_data(batch)
        self.test()
        return self.get_current_visuals()

    if is_train := self.opt["is_train"]:
        # BasicSR validates once more when it has counted beyond the last iteration: it is that one's
        current_iter = min(int(current_iter), int(self.opt["train"]["total_iter"]))
    shared = _validation_of(self)
    is_complete = shared.run(upscale, dataloader, current_iter, tb_logger, save_img)
    if is_train and not is_complete:  # on all ranks
        _save_and_exit(self, current_iter)
    self.metric_results = dict(shared.means)
    if is_train and _state_of(self).is_saved(current_iter) and not shared.missing(current_iter):
        _state_of(self).save_again()


def _validation_of(model: Any) -> SharedValidation:
    if not hasattr(model, "_validation"):
        net = getattr(model, "net_g", None)
        variant = None if net is None else published_variant(model.get_bare_model(net))
        model._validation = SharedValidation(model.opt, variant)
    return model._validation


# Models that make LR themselves


def on_its_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """Have a model's method, which puts all on a GPU, stay on the CPU where ``num_gpu`` is 0."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        opt = getattr(self, "opt", None) or (args[0] if args else kwargs["opt"])
        if opt["num_gpu"] != 0:
            return method(self, *args, **kwargs)
        with (
            mock.patch.object(nn.Module, "cuda", lambda module, *_: module),
            mock.patch.object(Tensor, "cuda", lambda tensor, *_: tensor),
        ):
            return method(self, *args, **kwargs)

    return call
