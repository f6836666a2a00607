"""What every model of BasicSR has from here, in place of its base class's own."""

import functools
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from esc_basicsr.common.log import logger
from esc_basicsr.training.changed_options import options_of
from esc_basicsr.training.shared_validation import SharedValidation, published_variant
from esc_basicsr.training.skipped_steps import SkippedSteps
from esc_basicsr.training.state import TrainingState
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
    """Have ``BaseModel.__init__`` write down the options, of which BasicSR takes out what it has used."""

    def call(self: Any, opt: dict[str, Any]) -> None:
        init(self, opt)
        if opt.get("is_train") and "train" in opt.get("datasets", {}):
            self._options = options_of(opt)

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
        state.save(epoch, current_iter)


def resume_training(self: Any, resume_state: dict[str, Any]) -> None:
    """Go on where ``resume_state`` was saved.

    Raises:
        UserError: It is of another training: of another network, optimizer or schedule.
    """
    _state_of(self).restore(resume_state)


def _state_of(model: Any) -> TrainingState:
    if not hasattr(model, "_state"):
        scaler = torch.amp.GradScaler(model.device.type, enabled=False)
        model._state = TrainingState(
            *(model.opt, getattr(model, "_options", "{}"), model.optimizers, model.schedulers, scaler),
            *(_validation_of(model).records, SkippedSteps(model.opt)),
        )
    return model._state


# Validation


def dist_validation(self: Any, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool) -> None:
    """Measure on one set, with the other ranks."""
    self.nondist_validation(dataloader, current_iter, tb_logger, save_img)


def nondist_validation(self: Any, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool) -> None:
    """Measure on one set, with the other ranks (`SharedValidation.run`).

    In training the state of the same iteration is written again, with the figures.
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
    shared.run(upscale, dataloader, current_iter, tb_logger, save_img)
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
