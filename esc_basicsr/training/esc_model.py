"""What BasicSR's SRModel lacks to train ESC."""

import contextlib
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esc_basicsr import fast
from esc_basicsr.common import signals as stopping
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.common.memory import is_out_of_memory
from esc_basicsr.data.degradation import make_pair
from esc_basicsr.data.loaders import batch_of_process
from esc_basicsr.fast import kernels
from esc_basicsr.fast.tiles import run_in_tiles, tile_side
from esc_basicsr.training import checkpoints
from esc_basicsr.training.resumable_model import ResumableModel
from esc_basicsr.training.throughput import Throughput
from esc_basicsr.weights.checkpoint import load_weights, read_weights
from esc_basicsr.weights.shipped import weights_file

__all__ = ["AMP_DTYPES", "ESCModel"]

# Values of train.amp and val.amp.
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# train.max_skipped where it is left out.
MAX_SKIPPED = 10
# network_g.window_size where it is left out.
_WINDOW = 32


class ESCModel(ResumableModel):
    """SRModel with the release's optimizer, an exact schedule, and checkpoints read safely and across scales.

    Training can be interrupted and resumed (`ResumableModel`). A step whose loss or gradients are not finite
    is skipped, on all ranks, and reported with its samples.

    Option keys are SRModel's; ``train.optim_g.type`` may be ``AdamW`` too. Left out, the following change
    nothing; docs/training-speed.md has what each does to the loss and to speed:

    * ``train.amp``: ``bf16`` or ``fp16``. The network computes in it where PyTorch's autocast deems that
      safe; weights, losses, optimizer and EMA stay float32. With fp16 gradients are scaled, and training
      resumes with the scale it had.
    * ``train.accumulate``: N. A batch goes through the network in N equal pieces, for less memory; the step
      is that of the whole batch, for losses that are means over images and networks that treat each image
      by itself. ``datasets.train.global_batch_size`` chooses N by the number of processes instead.
    * ``train.clip_grad_norm``: gradients are scaled down to this norm where theirs is larger.
    * ``train.max_skipped``: training ends after so many steps in a row with numbers that are not finite;
      10 if left out.
    * ``train.compile``: true. Training runs through ``torch.compile``; where that fails, uncompiled, and the
      log says why. Validation, on images of many sizes, is never compiled.
    * ``channels_last``: true. Weights and LR images are laid out channels last in memory.
    * ``cpu_kernels``: true. On a CPU, in float32, the networks run by kernels that are compiled when the
      model is built, which needs a C++ compiler (`fast.kernels`). On a GPU it changes nothing.
    * ``val.amp``: as ``train.amp``, for validation and testing. They run in float32 without it, whatever
      ``train.amp`` is.
    """

    lq: Tensor
    gt: Tensor
    output: Tensor

    def __init__(self, opt: dict[str, Any]) -> None:
        self._kernels = bool(opt.get("cpu_kernels")) and opt["num_gpu"] == 0
        if self._kernels:
            kernels.load()  # a missing compiler is reported before anything else is done
        super().__init__(opt)
        if self._kernels:
            fast.attend_by_kernels(self.net_g)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Put a network where it runs, laid out as ``channels_last`` says, and wrap it for several GPUs."""
        return super().model_to_device(self._laid_out(net))

    def init_training_settings(self) -> None:
        """Set up EMA, losses, optimizer, schedule, and what makes training fast."""
        super().init_training_settings()
        if self.ema_decay > 0:
            self._laid_out(self.net_g_ema)
        train = self.opt["train"]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.get("amp") == "fp16")
        if self.scaler.is_enabled():
            self._keep_scale_with(self.optimizer_g)
        self._network = self.net_g
        if train.get("compile"):
            self._network = torch.compile(self.net_g)
        _, self._passes = batch_of_process(self.opt)
        self._skipped = {"in_all": 0, "in_a_row": 0}
        self._throughput = Throughput()

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch: ``lq`` and, unless there is none, ``gt``, (B, 3, H, W) in [0, 1].

        Where there is ``gt`` alone, uint8 from a `DFLIPDataset` with ``lq_on_device``, LR is made here.
        """
        self._paths = data.get("gt_path", data.get("lq_path", []))
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
        batch = list(zip(self.lq.chunk(self._passes), self.gt.chunk(self._passes), strict=True))
        for number, (lq, gt) in enumerate(batch, 1):
            share = len(lq) / len(self.lq)
            with self._gradients_exchanged(number == len(batch)):
                losses = self._losses(self._upscale(lq), gt)
                total: Any = sum(losses.values())
                self.scaler.scale(total * share).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() * share
        self.scaler.unscale_(self.optimizer_g)
        limit = self.opt["train"].get("clip_grad_norm") or math.inf
        # Gradients are the same on every rank by now, and so is their norm.
        norm = nn.utils.clip_grad_norm_(self.net_g.parameters(), limit)
        self.log_dict, gradient_is_finite = self._agree(means, norm)
        losses_are_finite = all(map(math.isfinite, self.log_dict.values()))
        if losses_are_finite and gradient_is_finite:
            self.scaler.step(self.optimizer_g)
            if self.ema_decay > 0:
                self.model_ema(decay=self.ema_decay)
            self._skipped["in_a_row"] = 0
        elif not (losses_are_finite and self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            self._skip(
                current_iter, "gradient" if losses_are_finite else "loss"
            )  # else the scale was too large: it is lowered
        self.scaler.update()
        if self._skipped["in_all"]:
            self.log_dict["skipped"] = self._skipped["in_all"]
        self._throughput.count(len(self.lq) * self.opt["world_size"])

    def get_current_log(self) -> dict[str, Any]:
        """The last step's losses; with ``logger.use_tb_logger`` its learning rate and throughput as well.

        ``images_per_second`` counts all ranks' images since the last call, without the time that validation
        and saving took.
        """
        log = dict(super().get_current_log())
        if (self.opt.get("logger") or {}).get("use_tb_logger"):
            (log["lr"], *_) = self.get_current_learning_rate()
            rate = self._throughput.take()
            if rate is not None:
                log["images_per_second"] = rate
        return log

    def validation(self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool = False) -> None:
        """Measure on one set, as `ResumableModel` does; throughput is not measured meanwhile."""
        super().validation(dataloader, current_iter, tb_logger, save_img)
        if self.is_train:
            self._throughput.go_on()

    def save(self, epoch: int, current_iter: int) -> None:
        """Write a checkpoint, as `ResumableModel` does; throughput is not measured meanwhile."""
        super().save(epoch, current_iter)
        self._throughput.go_on()

    def _agree(self, means: dict[str, Tensor], norm: Tensor) -> tuple[dict[str, float], bool]:
        """The losses' means over all ranks, whether gradients are finite; and learn if one was told to stop.

        One exchange, and one wait for a GPU, for all of it.
        """
        told = torch.tensor(float(stopping.requested() is not None), device=self.device)
        values = torch.stack([*(mean.float() for mean in means.values()), norm.float(), told])
        if self.opt["dist"]:
            dist.all_reduce(values)
        *losses, norms, told_ranks = values.tolist()
        self._must_stop = told_ranks > 0
        agreed = {name: loss / self.opt["world_size"] for name, loss in zip(means, losses, strict=True)}
        return agreed, math.isfinite(norms)

    def _skip(self, current_iter: int, what: str) -> None:
        """Count and report a step that is not taken."""
        for count in self._skipped:
            self._skipped[count] += 1
        suspects = self._suspects()
        if self.opt["dist"]:
            of_ranks: list[list[str]] = [[] for _ in range(self.opt["world_size"])]
            dist.all_gather_object(of_ranks, suspects)
            suspects = [*itertools.chain(*of_ranks)]
        in_a_row, most = self._skipped["in_a_row"], self.opt["train"].get("max_skipped", MAX_SKIPPED)
        logger.warning(
            "Iteration %d: the %s is not finite; the step is skipped (%d in a row, %d in all). Samples: %s",
            *(current_iter, what, in_a_row, self._skipped["in_all"], ", ".join(suspects) or "not known"),
        )
        if in_a_row >= most:
            newest = checkpoints.newest_state(self.opt)
            remedy = f"The last good state is {newest}. " if newest else ""
            raise UserError(
                f"Iteration {current_iter}: the {what} was not finite for {in_a_row} steps in a row "
                f"(train.max_skipped: {most}). {remedy}Lower the learning rate, set train.clip_grad_norm, or "
                f"look at these samples: {', '.join(suspects) or 'not known'}"
            )

    def _suspects(self) -> list[str]:
        """The samples of this rank's batch that are or give something that is not finite; all if none is."""
        with torch.no_grad():
            net = self.get_bare_model(self.net_g)
            sr = torch.cat([net(lq) for lq in self.lq.chunk(self._passes)])
            sound = [
                all(bool(images[index].isfinite().all()) for images in (self.lq, self.gt, sr))
                for index in range(len(sr))
            ]
        named = list(self._paths)
        return [name for name, is_sound in zip(named, sound, strict=False) if not is_sound] or named

    def test(self) -> None:
        """Upscale what was fed, in float32 unless ``val.amp`` is set; ``output`` is float32."""
        with self._autocast((self.opt.get("val") or {}).get("amp")):
            try:
                self._infer()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._test_in_tiles()
        self.output = self.output.float()

    def _test_in_tiles(self) -> None:
        """Upscale what is too large for the memory, even by strips, in tiles that fit."""
        whole, window = self.lq, self.opt["network_g"].get("window_size", _WINDOW)
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
                *(whole.shape[-1], whole.shape[-2], side, side),
            )
            try:
                self.output = run_in_tiles(run, whole, self.opt["scale"], side, window)
                return
            except Exception as error:
                if side == least or not is_out_of_memory(error):
                    raise
                side = max(side // 2 // window, 1) * window
            finally:
                self.lq = whole

    def _laid_out(self, what: Any) -> Any:
        """A network or a batch of images, channels last if that is switched on. A network is changed."""
        return what.to(memory_format=torch.channels_last) if self.opt.get("channels_last") else what

    @torch.no_grad()
    def _infer(self) -> None:
        """Upscale ``lq`` by the weights to use, EMA's if there are."""
        net = self.get_bare_model(getattr(self, "net_g_ema", self.net_g))
        self.output = fast.prepare(net.eval(), kernels=self._kernels)(self.lq)
        self.net_g.train()

    def _autocast(self, amp: str | None) -> torch.autocast:
        return torch.autocast(self.device.type, AMP_DTYPES.get(amp or ""), enabled=bool(amp))

    def _upscale(self, lq: Tensor) -> Tensor:
        """Run the network to be trained. Float32."""
        with self._autocast(self.opt["train"].get("amp")):
            if self._network is self.net_g:
                return self.net_g(lq).float()
            try:
                return self._network(lq).float()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # No C++ compiler, no Triton, an operation that cannot be compiled: uncompiled it may work; if
                # not, the error that follows is the one to tell.
                reason, _, _ = str(error).partition("\n\n")  # then follows how to debug PyTorch
                logger.warning(
                    "train.compile failed (%s: %s); training goes on uncompiled.",
                    *(type(error).__name__, reason),
                )
                self._network = self.net_g
                return self.net_g(lq).float()

    def _losses(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """Each loss by the name it is logged under."""
        losses: dict[str, Tensor | None] = {}
        if self.cri_pix:
            losses["l_pix"] = self.cri_pix(sr, gt)
        if self.cri_perceptual:
            losses["l_percep"], losses["l_style"] = self.cri_perceptual(sr, gt)
        return {name: loss for name, loss in losses.items() if loss is not None}

    def _gradients_exchanged(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Where processes average gradients after the last piece alone, once for the whole step."""
        waits = isinstance(self.net_g, DistributedDataParallel) and not is_last
        return self.net_g.no_sync() if waits else contextlib.nullcontext()

    def _keep_scale_with(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the gradients' scale stored and restored with the optimizer, of which it is a part.

        BasicSR's training states hold what optimizers and schedulers say of themselves, and nothing else.
        """

        def store(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            state["grad_scaler"] = self.scaler.state_dict()

        def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            if "grad_scaler" in state:  # else that training was not fp16
                self.scaler.load_state_dict(state["grad_scaler"])

        optimizer.register_state_dict_post_hook(store)
        optimizer.register_load_state_dict_pre_hook(restore)

    def training_state(self) -> dict[str, Any]:
        """As `ResumableModel`'s, and how many steps were skipped."""
        return {**super().training_state(), "skipped": self._skipped}

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Go on where ``resume_state``, a training state, was saved."""
        self._skipped |= resume_state.get("skipped", {})
        super().resume_training(resume_state)

    def get_optimizer(
        self, optim_type: str, params: Iterable[nn.Parameter], lr: float, **kwargs: Any
    ) -> torch.optim.Optimizer:
        """Build the optimizer of ``train.optim_g``: AdamW, or one that BasicSR knows."""
        if optim_type == "AdamW":
            return torch.optim.AdamW(params, lr, **kwargs)
        return super().get_optimizer(optim_type, params, lr, **kwargs)

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """Set an iteration's learning rate: from ``warmup_iter`` on, what the scheduler alone would give.

        Before it the rate rises linearly, current_iter / warmup_iter of the initial one.
        """
        # Schedulers go on from the rate that they find: theirs of the last iteration, not the warm-up's.
        self._set_lr([scheduler.get_last_lr() for scheduler in self.schedulers])
        super().update_learning_rate(current_iter, warmup_iter)

    def load_network(
        self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = "params"
    ) -> None:
        """Load a checkpoint into a network, wrapped for several GPUs or not.

        Weights of another scale are converted, so that ×3 and ×4 can start from ×2.

        Args:
            net: The network.
            load_path: A ``.pth`` or ``.safetensors`` file, or the name of a network that ships.
            strict: Whether every key must fit. If not, what does not fit keeps its value.
            param_key: Which of the file's state dicts; ``params`` is read where it has no ``params_ema``.

        Raises:
            UserError: The file cannot be read, or does not fit.
        """
        logger.info("Loading %s from %s (%s).", type(self.get_bare_model(net)).__name__, load_path, param_key)
        weights = read_weights(weights_file(load_path), param_key)
        load_weights(self.get_bare_model(net), weights, load_path, strict)
