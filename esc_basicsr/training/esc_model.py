"""BasicSR's SRModel with what it lacks to train ESC."""

import contextlib
import math
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from basicsr.models.sr_model import SRModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esc_basicsr import fast
from esc_basicsr.common.log import logger
from esc_basicsr.common.memory import is_out_of_memory
from esc_basicsr.data.degradation import make_pair
from esc_basicsr.data.loaders import batch_of_process
from esc_basicsr.fast import kernels
from esc_basicsr.fast.precision import HALF_PRECISIONS
from esc_basicsr.fast.tiles import grid_of, run_in_tiles, tile_side
from esc_basicsr.options.schema import fill_defaults
from esc_basicsr.training.shared_validation import SharedValidation, published_variant
from esc_basicsr.training.skipped_steps import SkippedSteps, suspects
from esc_basicsr.training.state import TrainingState
from esc_basicsr.training.stopping import Stopping
from esc_basicsr.training.throughput import Throughput


class ESCModel(SRModel):
    """SRModel with the release's optimizer, an exact schedule, and checkpoints read safely and across scales.

    Training can be interrupted by SIGTERM or Ctrl-C, which save a checkpoint, and resumed (`TrainingState`).
    Validation is shared by all ranks (`SharedValidation`). A step whose loss or gradients are not finite
    is skipped, on all ranks, and reported with its samples.

    Option keys beyond SRModel's are in docs/options.md, and in docs/training-speed.md what each does to the
    loss and to speed. ``train.amp`` leaves weights, losses, optimizer and EMA in float32; a batch of
    ``train.accumulate`` pieces makes the step of the whole one, for losses that are means over images.
    Validation, on images of many sizes, is never compiled, and runs in float32 unless ``val.amp`` is set.

    Attributes:
        shared_validation: Measures on a set, and keeps the records.
        stopping: Agreement of all ranks to stop; in training only, as are the following.
        state: Writes and resumes checkpoints.
        skipped: Counts skipped steps.
        throughput: Counts images a second.
    """

    lq: Tensor
    gt: Tensor
    output: Tensor

    def __init__(self, opt: dict[str, Any]) -> None:
        fill_defaults(opt)
        self._kernels = opt["cpu_kernels"] and opt["num_gpu"] == 0
        if self._kernels:
            kernels.load()  # a missing compiler is reported before anything else is done
            if opt["is_train"] and opt["train"]["amp"]:
                fast.require_bf16()
        super().__init__(opt)
        if self._kernels:
            fast.train_by_kernels(self.net_g)
        variant = published_variant(self.get_bare_model(self.net_g))
        self.shared_validation = SharedValidation(opt, variant)
        if self.is_train:
            self.stopping = Stopping()
            self.skipped = SkippedSteps(opt)
            self.throughput = Throughput()
            records = self.shared_validation.records
            self.state = TrainingState(
                opt, self._options, self.optimizers, self.schedulers, self.scaler, records, self.skipped
            )

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Put a network where it runs, laid out as ``channels_last`` says.

        For several GPUs it is wrapped, if it has anything to train.
        """
        net = self._laid_out(net)
        if any(parameter.requires_grad for parameter in net.parameters()):
            return super().model_to_device(net)
        return net.to(self.device)

    def init_training_settings(self) -> None:
        """Set up EMA, losses, optimizer, schedule, and what makes training fast."""
        super().init_training_settings()
        if self.ema_decay > 0:
            self._laid_out(self.net_g_ema)
            if self.opt["dist"]:  # all ranks validate
                for tensor in self.net_g_ema.state_dict().values():
                    dist.broadcast(tensor, src=0)
        train = self.opt["train"]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train["amp"] == "fp16")
        self._network = torch.compile(self.net_g) if train["compile"] else self.net_g
        _, self._passes = batch_of_process(self.opt)

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch: ``lq`` and, unless there is none, ``gt``, (B, 3, H, W) in [0, 1].

        Where there is ``gt`` alone, uint8 from a `DFLIPDataset` with ``lq_on_device``, LR is made here.
        """
        self._paths = data.get("gt_path", data.get("lq_path", []))
        if "position" in data:  # of training data alone
            self.state.position = data["position"]
        if "lq" not in data:
            # float64, which a TF32 setting leaves alone
            pair = make_pair(data["gt"].to(self.device), self.opt["scale"], torch.float64)
            data = {**data, **pair}
        super().feed_data(data)
        self.lq = self._laid_out(self.lq)

    def optimize_parameters(self, current_iter: int) -> None:
        """Take one step on the batch that was fed, in as many passes as the options say.

        Raises:
            UserError: Too many steps in a row had numbers that are not finite.
        """
        self.optimizer_g.zero_grad()
        means: dict[str, Tensor] = {}
        batch = [*zip(self.lq.chunk(self._passes), self.gt.chunk(self._passes), strict=True)]
        for number, (lq, gt) in enumerate(batch, 1):
            share = len(lq) / len(self.lq)
            with self._gradients_exchanged(number == len(batch)):
                losses = self._losses(self._upscale(lq), gt)
                total: Any = sum(losses.values())
                self.scaler.scale(total * share).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() * share
        self.scaler.unscale_(self.optimizer_g)
        limit = self.opt["train"]["clip_grad_norm"] or math.inf
        # Gradients are the same on every rank by now, and so is their norm.
        norm = nn.utils.clip_grad_norm_(self.net_g.parameters(), limit)
        self.log_dict, gradient_is_finite = self._agree(means, norm)
        losses_are_finite = all(map(math.isfinite, self.log_dict.values()))
        if losses_are_finite and gradient_is_finite:
            self.scaler.step(self.optimizer_g)
            if self.ema_decay > 0:
                self.model_ema(decay=self.ema_decay)
            self.skipped.took_step()
        elif not losses_are_finite or not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
            # A scale that was too large is no fault: update() lowers it.
            samples = suspects(self.get_bare_model(self.net_g), batch, self._paths)
            self.skipped.skip(current_iter, "gradient" if losses_are_finite else "loss", samples)
        self.scaler.update()
        if self.skipped.counts["in_all"]:
            self.log_dict["skipped"] = self.skipped.counts["in_all"]
        self.throughput.count(len(self.lq) * self.opt["world_size"])

    def get_current_log(self) -> dict[str, Any]:
        """Give the last step's losses; with ``logger.use_tb_logger`` learning rate and throughput as well.

        ``images_per_second`` counts all ranks' images since the last call, without the time that validation
        and saving took.
        """
        log = dict(super().get_current_log())
        if (self.opt.get("logger") or {}).get("use_tb_logger"):
            (log["lr"], *_) = self.get_current_learning_rate()
            rate = self.throughput.take()
            if rate is not None:
                log["images_per_second"] = rate
        return log

    def validation(self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool = False) -> None:
        """Measure on one set, with the other ranks (`SharedValidation.run`).

        In training the checkpoint of the same iteration is written again, with the figures. If a rank was
        asked to stop meanwhile, this saves a checkpoint and ends the process.
        """
        if self.is_train:
            # BasicSR validates once more when it has counted beyond the last iteration: it is that one's
            current_iter = min(int(current_iter), int(self.opt["train"]["total_iter"]))
        is_complete = self.shared_validation.run(
            self.upscale_batch, dataloader, current_iter, tb_logger, save_img
        )
        if not self.is_train:
            return
        if not is_complete:  # on all ranks
            self._save_and_exit(current_iter)
        if self.state.is_saved(current_iter) and not self.shared_validation.missing(current_iter):
            self.state.save_again()
        self.throughput.go_on()

    def save(self, epoch: int, current_iter: int) -> None:
        """Write a checkpoint of an iteration; -1 is the end of training, whose weights have no state.

        Raises:
            UserError: It cannot be written; on every rank.
        """
        networks = {"params": self.get_bare_model(self.net_g)}
        if self.ema_decay > 0:
            networks["params_ema"] = self.net_g_ema
        self.state.save_weights("latest" if current_iter == -1 else current_iter, networks)
        if current_iter != -1:
            self.save_training_state(epoch, current_iter)
        self.throughput.go_on()

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """Write what a checkpoint has beside weights (`TrainingState.save`)."""
        self.state.save(epoch, current_iter)

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Go on where ``resume_state`` was saved, and make up for a validation that was not completed.

        Raises:
            UserError: It is of another training: of another network, optimizer or schedule.
        """
        self.state.restore(resume_state)
        iteration = resume_state["iter"]
        for loader in self.shared_validation.missed(iteration):
            self.validation(loader, iteration, None, self.opt["val"]["save_img"])

    def _save_and_exit(self, iteration: int) -> NoReturn:
        if not self.state.is_saved(iteration):
            self.save(self.state.position.get("epoch", 0), iteration)
        self.stopping.exit(iteration)

    def _agree(self, means: dict[str, Tensor], norm: Tensor) -> tuple[dict[str, float], bool]:
        """Give the losses' means over all ranks, and whether gradients are finite; agree whether to stop.

        One exchange, and one wait for a GPU, for all of it.
        """
        wish = torch.tensor(self.stopping.wish(), device=self.device)
        values = torch.stack([*(mean.float() for mean in means.values()), norm.float(), wish])
        if self.opt["dist"]:
            dist.all_reduce(values)
        *losses, norms, wishes = values.tolist()
        self.stopping.agree(wishes)
        agreed = {name: loss / self.opt["world_size"] for name, loss in zip(means, losses, strict=True)}
        return agreed, math.isfinite(norms)

    def upscale_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Upscale a batch as `SharedValidation.run` needs it; the model keeps nothing of it."""
        self.__dict__.pop("gt", None)  # of another batch
        self.feed_data(batch)
        self.test()
        visuals = self.get_current_visuals()
        for name in ("lq", "gt", "output"):
            self.__dict__.pop(name, None)
        return visuals

    def test(self) -> None:
        """Upscale what was fed, in float32 unless ``val.amp`` is set; ``output`` is float32."""
        val, lq = self.opt.get("val") or {}, self.lq
        if val.get("pad_to_window"):
            self.lq = _padded(lq, self._window())
        with self._autocast(val.get("amp")):
            try:
                self._infer()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._test_in_tiles()
        self.output = self.output.float()
        if self.lq is not lq:
            height, width = (size * self.opt["scale"] for size in lq.shape[-2:])
            self.output, self.lq = self.output[..., :height, :width], lq

    def _window(self) -> int:
        return grid_of(self.get_bare_model(self.net_g), self.opt["network_g"])

    def _test_in_tiles(self) -> None:
        """Upscale what is too large for the memory, even by row chunks, in tiles that fit."""
        whole, window = self.lq, self._window()
        least = tile_side(1, window)
        side = max(tile_side(whole.shape[-1] * whole.shape[-2] // 2, window), least)

        def run(part: Tensor) -> Tensor:
            self.lq = part
            self._infer()
            return self.output.float()

        while True:
            logger.warning(
                "%d × %d pixels are too many for the memory: they are worked through in tiles of %d × %d, "
                "which differs a little from the whole (docs/upscale.md).",
                whole.shape[-1],
                whole.shape[-2],
                side,
                side,
            )
            try:
                self.output = run_in_tiles(run, whole, self.opt["scale"], side, window)
                return
            except Exception as error:
                if side <= least or not is_out_of_memory(error):
                    raise
                side = max(side // 2 // window * window, least)
            finally:
                self.lq = whole

    def _laid_out(self, what: Any) -> Any:
        """Lay out a network, which is changed, or images channels last, if that is switched on."""
        return what.to(memory_format=torch.channels_last) if self.opt["channels_last"] else what

    @torch.no_grad()
    def _infer(self) -> None:
        """Upscale ``lq`` by the weights to use, EMA's if there are."""
        net = self.get_bare_model(getattr(self, "net_g_ema", self.net_g))
        self.output = fast.prepare(net.eval(), kernels=self._kernels)(self.lq)
        self.net_g.train()

    def _autocast(self, amp: str | None) -> torch.autocast:
        return torch.autocast(self.device.type, HALF_PRECISIONS.get(amp or ""), enabled=bool(amp))

    def _upscale(self, lq: Tensor) -> Tensor:
        """Run the network to be trained. Float32."""
        with self._autocast(self.opt["train"]["amp"]):
            try:
                return self._network(lq).float()
            except Exception as error:
                if self._network is self.net_g or isinstance(error, torch.OutOfMemoryError):
                    raise
                # No C++ compiler, no Triton, an operation that cannot be compiled: uncompiled it may work; if
                # not, the error that follows is the one to report.
                reason, _, _ = str(error).partition("\n\n")  # then follows how to debug PyTorch
                name = type(error).__name__
                logger.warning("train.compile failed (%s: %s); training goes on uncompiled.", name, reason)
                self._network = self.net_g
                return self.net_g(lq).float()

    def _losses(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """Compute each loss, by the name it is logged under."""
        pixel = self.cri_pix(sr, gt) if self.cri_pix else None
        perceptual, style = self.cri_perceptual(sr, gt) if self.cri_perceptual else (None, None)
        losses = {"l_pix": pixel, "l_percep": perceptual, "l_style": style}
        return {name: loss for name, loss in losses.items() if loss is not None}

    def _gradients_exchanged(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Have processes average gradients after the last piece alone, once for the whole step."""
        waits = isinstance(self.net_g, DistributedDataParallel) and not is_last
        return self.net_g.no_sync() if waits else contextlib.nullcontext()

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """Set an iteration's learning rate; or, if all ranks have agreed to stop, save a checkpoint and exit.

        From ``warmup_iter`` on the rate is what the scheduler alone would give; before it, it rises linearly:
        current_iter / warmup_iter of the initial one.
        """
        if self.stopping.is_agreed:
            self._save_and_exit(current_iter - 1)
        # Schedulers go on from the rate that they find: theirs of the last iteration, not the warm-up's.
        self._set_lr([scheduler.get_last_lr() for scheduler in self.schedulers])
        super().update_learning_rate(current_iter, warmup_iter)


def _padded(images: Tensor, multiple: int) -> Tensor:
    """Mirror (B, C, H, W) at bottom and right to multiples of a size, several times where they are small."""
    rows, columns = (
        torch.from_numpy(np.pad(np.arange(size), (0, -size % multiple), mode="reflect")).to(images.device)
        for size in images.shape[-2:]
    )
    return images[:, :, rows][..., columns]
