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
from esc_basicsr.options.schema import fill_defaults
from esc_basicsr.options.sections import has_ours
from esc_basicsr.training.changed_options import options_of
from esc_basicsr.training.shared_validation import SharedValidation, published_variant
from esc_basicsr.training.state import TrainingState, is_plain
from esc_basicsr.training.step import TrainingStep
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


# Training: steps, states, stopping


def prepared(init: Callable[..., None]) -> Callable[..., None]:
    """Have ``BaseModel.__init__`` fill in defaults, and write down the options before BasicSR takes some out.

    From then on a signal to stop is noted, for `stopping_first`.
    """

    def call(self: Any, opt: dict[str, Any]) -> None:
        fill_defaults(opt)
        init(self, opt)
        self._paths = []
        if opt.get("is_train") and "train" in opt.get("datasets", {}):
            self._options = options_of(opt)
            self._stopping = Stopping()

    return call


def training_step(self: Any) -> TrainingStep:
    """Take steps, by `in_pieces`."""
    return TrainingStep(self.opt, self.device, self._stopping)


def shared_validation(self: Any) -> SharedValidation:
    """Measure on sets, and keep the records."""
    net = getattr(self, "net_g", None)
    variant = None if net is None else published_variant(self.get_bare_model(net))
    return SharedValidation(self.opt, variant)


def training_state(self: Any) -> TrainingState:
    """Write and resume checkpoints."""
    return TrainingState(
        *(self.opt, self._options, self.optimizers, self.schedulers, self.training_step.scaler),
        *(self.shared_validation.records, self.training_step.skipped),
    )


def in_pieces(optimize_parameters: Callable[..., None]) -> Callable[..., None]:
    """Have a model take a step as `TrainingStep` does."""

    @functools.wraps(optimize_parameters)
    def take(self: Any, current_iter: int) -> None:
        self.training_step.take(self, optimize_parameters, current_iter)

    return take


def noting_position(feed_data: Callable[..., Any]) -> Callable[..., Any]:
    """Have a model's ``feed_data`` remember which images its batch is of, and where in the training data."""

    @functools.wraps(feed_data)
    def feed(self: Any, data: Any) -> Any:
        feed_data(self, data)
        if isinstance(data, dict):
            # what Real-ESRGAN's models mix is of images that were fed before
            self._paths = [] if hasattr(self, "queue_lr") else data.get("gt_path", data.get("lq_path", []))
            if "position" in data:  # of training data alone
                self.training_state.position = data["position"]

    return feed


def save_network(
    self: Any, net: Any, net_label: str, current_iter: int, param_key: str | list[str] = "params"
) -> None:
    """Write the weights of one network, or of several by their keys, of an iteration; called on every rank.

    Raises:
        UserError: They cannot be written; on every rank.
    """
    nets, keys = (value if isinstance(value, list) else [value] for value in (net, param_key))
    networks = dict(zip(keys, map(self.get_bare_model, nets), strict=True))
    self.training_state.save_weights(net_label, "latest" if current_iter == -1 else current_iter, networks)


def save_training_state(self: Any, epoch: int, current_iter: int) -> None:
    """Write what a checkpoint has beside weights; called on every rank."""
    if current_iter != -1:
        self.training_state.pool = _pool_of(self)
        self.training_state.save(epoch, current_iter)
    self.training_step.throughput.go_on()


def resume_training(self: Any, resume_state: dict[str, Any]) -> None:
    """Go on where ``resume_state`` was saved, and make up for a validation of ours that was not completed.

    Raises:
        UserError: It is of another training: of another network, optimizer or schedule.
    """
    self.training_state.restore(resume_state)
    if hasattr(self, "queue_size") and self.opt["high_order_degradation"]:
        _fill_pool(self, self.training_state.pool)
    iteration = resume_state["iter"]
    if not has_ours(type(self), "nondist_validation"):
        return  # BasicSR's models of videos keep no records of what was validated
    for loader in self.shared_validation.missed(iteration):
        self.validation(loader, iteration, None, self.opt["val"]["save_img"])


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


def stopping_first(update_learning_rate: Callable[..., None]) -> Callable[..., None]:
    """Have what begins an iteration save a checkpoint and exit instead, if a rank was asked to stop.

    From ``warmup_iter`` on the rate is what the scheduler alone would give; before it, it rises linearly.
    """

    @functools.wraps(update_learning_rate)
    def update(self: Any, current_iter: int, warmup_iter: int = -1) -> None:
        # `TrainingStep` agrees on it; not all models take their steps by it.
        if current_iter > 1 and not self._stopping.take_agreement():
            wishes = torch.tensor(self._stopping.wish(), device=self.device)
            if self.opt["dist"]:
                dist.all_reduce(wishes)
            self._stopping.agree(wishes.item())
        if self._stopping.is_agreed:
            _save_and_exit(self, current_iter - 1)
        # Schedulers go on from the rate that they find: theirs of the last iteration, not the warm-up's.
        self._set_lr([scheduler.get_last_lr() for scheduler in self.schedulers])
        update_learning_rate(self, current_iter, warmup_iter)

    return update


def _save_and_exit(model: Any, iteration: int) -> None:
    if not model.training_state.is_saved(iteration):
        model.save(model.training_state.position.get("epoch", 0), iteration)
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
    if is_train := self.opt["is_train"]:
        # BasicSR validates once more when it has counted beyond the last iteration: it is that one's
        current_iter = min(int(current_iter), int(self.opt["train"]["total_iter"]))
    shared = self.shared_validation
    is_complete = shared.run(self.upscale_batch, dataloader, current_iter, tb_logger, save_img)
    self.metric_results = dict(shared.means)
    if not is_train:
        return
    if not is_complete:  # on all ranks
        _save_and_exit(self, current_iter)
    if self.training_state.is_saved(current_iter) and not shared.missing(current_iter):
        self.training_state.save_again()
    self.training_step.throughput.go_on()


def upscale_batch(self: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Upscale a batch as `SharedValidation.run` needs it; the model keeps nothing of it."""
    self.__dict__.pop("gt", None)  # of another batch
    self.feed_data(batch)
    self.test()
    visuals: dict[str, Tensor] = self.get_current_visuals()
    for name in ("lq", "gt", "output"):
        self.__dict__.pop(name, None)
    return visuals


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
