"""A training step of any model of BasicSR: in pieces, in half precision, compiled, agreed on by all ranks."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.data.loaders import batch_of_process
from esc_basicsr.fast.precision import HALF_PRECISIONS
from esc_basicsr.training.skipped_steps import SkippedSteps, suspects
from esc_basicsr.training.stopping import Stopping
from esc_basicsr.training.throughput import Throughput

__all__ = ["TrainingStep"]

# Of a model: what is trained, by which optimizer, and what of a batch is worked through in pieces.
_NETWORKS = ("net_g", "net_d")
_OPTIMIZERS = ("optimizer_g", "optimizer_d")
_IMAGES = ("lq", "gt", "gt_usm")


class TrainingStep:
    """Takes a model's steps by its own ``optimize_parameters``, and by the options of the section ``train``.

    The method runs once for each piece of a batch. Meanwhile networks compute in half precision, their
    gradients are scaled within them alone, and the calls of optimizers, EMA and logging are noted. They are
    made when all pieces are done and all losses and gradients are finite, on all ranks; otherwise the step
    is skipped. Each piece weighs by its share of the batch, which is right for losses that are means over
    images.

    Args:
        opt: All options.
        device: Where the model is.
        stopping: What ranks agree on in the same exchange.

    Attributes:
        scaler: Of gradients, with ``train.amp: fp16``.
        skipped: Counts skipped steps.
        throughput: Counts images a second.
    """

    def __init__(self, opt: dict[str, Any], device: torch.device, stopping: Stopping) -> None:
        self._opt, self._train, self._device, self._stopping = opt, opt["train"], device, stopping
        self._amp = self._train["amp"] or None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._amp == "fp16")
        self.skipped = SkippedSteps(opt)
        self.throughput = Throughput()
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def take(self, model: Any, optimize_parameters: Callable[..., None], iteration: int) -> None:
        """Take a step on the batch that the model was fed; its ``log_dict`` gets the means over all ranks.

        Raises:
            UserError: Too many steps in a row had numbers that are not finite; or a batch comes in pieces to
                a network that normalises over it.
        """
        _, passes = batch_of_process(self._opt)
        optimizers = {name: _Due(vars(model)[name]) for name in _OPTIMIZERS if name in vars(model)}
        networks = {name: vars(model)[name] for name in _NETWORKS if name in vars(model)}
        for each in optimizers.values():
            each.real.zero_grad()
        means: dict[str, Tensor] = {}
        averages: list[dict[str, float]] = []
        # what a validation has left is of another size
        images = {name: vars(model)[name] for name in _IMAGES if name in vars(model)}
        whole = {name: batch.chunk(passes) for name, batch in images.items() if len(batch) == len(model.lq)}
        pieces = [dict(zip(whole, parts, strict=True)) for parts in zip(*whole.values(), strict=True)]
        if len(pieces) > 1:
            self._refuse_batch_normalisation(networks)
        for number, piece in enumerate(pieces, 1):
            share = len(piece["lq"]) / len(model.lq)
            stand_ins = {
                **piece,
                **optimizers,
                **{name: self._stand_in(name, net, share) for name, net in networks.items()},
                "model_ema": lambda **options: averages.append(options),
                "reduce_loss_dict": functools.partial(_add_up, means, share),
            }
            with (
                _exchanging(networks.values(), number == len(pieces)),
                mock.patch.multiple(model, **stand_ins),
            ):
                optimize_parameters(model, iteration)
        model.__dict__.pop("output", None)  # of the last piece
        due = [each.real for each in optimizers.values() if each.is_due]
        model.log_dict, gradient_is_finite = self._agree(means, [self._norm(optimizer) for optimizer in due])
        losses_are_finite = all(map(math.isfinite, model.log_dict.values()))
        if losses_are_finite and gradient_is_finite:
            for optimizer in due:
                self.scaler.step(optimizer)
            if averages:
                model.model_ema(**averages[-1])
            self.skipped.took_step()
        elif not losses_are_finite or not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
            # A scale that was too large is no fault: update() lowers it.
            pairs = [(piece["lq"], piece["gt"]) for piece in pieces]
            samples = suspects(model.get_bare_model(model.net_g), pairs, model._paths)
            self.skipped.skip(iteration, "gradient" if losses_are_finite else "loss", samples)
        self.scaler.update()
        if self.skipped.counts["in_all"]:
            model.log_dict["skipped"] = self.skipped.counts["in_all"]
        self.throughput.count(len(model.lq) * self._opt["world_size"])

    def _refuse_batch_normalisation(self, networks: Mapping[str, nn.Module]) -> None:
        for name, net in networks.items():
            if any(isinstance(layer, _BatchNorm) and layer.training for layer in net.modules()):
                is_global = self._opt["datasets"]["train"].get("global_batch_size") is not None
                where = "datasets.train.global_batch_size" if is_global else "train.accumulate"
                raise UserError(
                    f"{where}: {name} normalises over a whole batch, not pieces. Leave it out, or take a "
                    "network without batch normalisation."
                )

    def _stand_in(self, name: str, net: nn.Module, share: float) -> "_Network":
        factor: Any = share
        if self.scaler.is_enabled():
            factor = self.scaler.scale(torch.full((), share, device=self._device))
        run = functools.partial(self._run, net) if name == "net_g" and self._train["compile"] else net
        half = torch.autocast(
            self._device.type, HALF_PRECISIONS.get(self._amp or ""), enabled=self._amp is not None
        )
        return _Network(net, run, half, factor)

    def _run(self, net: nn.Module, images: Tensor) -> Tensor:
        """Run the network compiled, or as it is once that has failed."""
        if self._compiled is None:
            self._compiled = torch.compile(net)
        try:
            return self._compiled(images)
        except Exception as error:
            if self._compiled is net or isinstance(error, torch.OutOfMemoryError):
                raise
            # No C++ compiler, no Triton, an operation that cannot be compiled: uncompiled it may work; if
            # not, the error that follows is the one to report.
            reason, _, _ = str(error).partition("\n\n")  # then follows how to debug PyTorch
            kind = type(error).__name__
            logger.warning("train.compile failed (%s: %s); training goes on uncompiled.", kind, reason)
            self._compiled = net
            return self._compiled(images)

    def _norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Give the norm of an optimizer's gradients, and scale them down to the largest that is wanted.

        Gradients are the same on every rank by now, and so is their norm.
        """
        self.scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, self._train["clip_grad_norm"] or math.inf)

    def _agree(self, means: Mapping[str, Tensor], norms: Iterable[Tensor]) -> tuple[dict[str, float], bool]:
        """Give the losses' means over all ranks, and whether gradients are finite; agree whether to stop.

        One exchange, and one wait for a GPU, for all of it.
        """
        wish = torch.tensor(self._stopping.wish(), device=self._device)
        values = torch.stack([*(value.float() for value in (*means.values(), *norms)), wish])
        if self._opt["dist"]:
            dist.all_reduce(values)
        *numbers, wishes = values.tolist()
        self._stopping.agree(wishes)
        losses = {name: loss / self._opt["world_size"] for name, loss in zip(means, numbers, strict=False)}
        return losses, all(map(math.isfinite, numbers[len(means) :]))


class _Due:
    """An optimizer that notes that it is to take a step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.real = optimizer
        self.is_due = False

    def zero_grad(self) -> None:
        """Do nothing: gradients of all pieces add up."""

    def step(self) -> None:
        self.is_due = True


class _Network:
    """A network in half precision, float32 in and out, whose gradients are multiplied within it alone.

    So losses and their gradients by images stay as they are, and what is between two networks.
    """

    def __init__(
        self, net: nn.Module, run: Callable[[Tensor], Tensor], half: torch.autocast, factor: float | Tensor
    ) -> None:
        self._net, self._run, self._half, self._factor = net, run, half, factor

    def __call__(self, images: Tensor) -> Tensor:
        is_multiplied = isinstance(self._factor, Tensor) or self._factor != 1
        if is_multiplied and images.requires_grad:
            images = images.view_as(images)  # a tensor of its own, for the hook
            images.register_hook(lambda gradient: gradient / self._factor)
        with self._half:
            result = self._run(images).float()
        if is_multiplied and result.requires_grad:
            result.register_hook(lambda gradient: gradient * self._factor)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)


def _add_up(means: dict[str, Tensor], share: float, losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Add a piece's losses, by the names they are logged under, to those of the batch."""
    for name, loss in losses.items():
        means[name] = means.get(name, 0) + loss.detach().mean() * share
    return {}


def _exchanging(networks: Iterable[nn.Module], is_last: bool) -> contextlib.ExitStack:
    """Have processes average gradients after the last piece alone, once for the whole step."""
    stack = contextlib.ExitStack()
    for net in networks:
        if isinstance(net, DistributedDataParallel) and not is_last:
            stack.enter_context(net.no_sync())
    return stack
