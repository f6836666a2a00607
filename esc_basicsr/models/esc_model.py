"""What BasicSR's SRModel lacks to train ESC."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from basicsr.models.sr_model import SRModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esc_basicsr import kernels
from esc_basicsr.archs.checkpoint import load_weights, read_weights
from esc_basicsr.data.degradation import make_pair
from esc_basicsr.log import logger

__all__ = ["AMP_DTYPES", "ESCModel"]

# Values of train.amp and val.amp.
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ESCModel(SRModel):
    """SRModel with the release's optimizer, an exact schedule, and checkpoints read safely and across scales.

    Option keys are SRModel's; ``train.optim_g.type`` may be ``AdamW`` too. Left out, the following change
    nothing; docs/training-speed.md has what each does to the loss and to speed:

    * ``train.amp``: ``bf16`` or ``fp16``. The network computes in it where PyTorch's autocast deems that
      safe; weights, losses, optimizer and EMA stay float32. With fp16 gradients are scaled, and training
      resumes with the scale it had.
    * ``train.accumulate``: N. A batch goes through the network in N equal pieces, for less memory; the step
      is that of the whole batch, for losses that are means over images and networks that treat each image
      by itself.
    * ``train.compile``: true. Training runs through ``torch.compile``; where that fails, uncompiled, and the
      log says why. Validation, on images of many sizes, is never compiled.
    * ``channels_last``: true. Weights and LR images are laid out channels last in memory.
    * ``cpu_kernels``: true. On a CPU, in float32, the networks run by kernels that are compiled when the
      model is built, which needs a C++ compiler (see `esc_basicsr.kernels`). On a GPU it changes nothing.
    * ``val.amp``: as ``train.amp``, for validation and testing. They run in float32 without it, whatever
      ``train.amp`` is.
    """

    lq: Tensor
    gt: Tensor
    output: Tensor

    def __init__(self, opt: dict[str, Any]) -> None:
        if opt.get("cpu_kernels") and opt["num_gpu"] == 0:
            kernels.load()  # a missing compiler is told before anything else is done
        super().__init__(opt)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Put a network where it runs, laid out as ``channels_last`` says, and wrap it for several GPUs."""
        return super().model_to_device(self._laid_out(net))

    def init_training_settings(self) -> None:
        """Set up EMA, losses, optimizer, schedule, and what makes training fast."""
        super().init_training_settings()
        if self.ema_decay > 0:
            self._laid_out(self.net_g_ema)
        amp = self.opt["train"].get("amp")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        if self.scaler.is_enabled():
            self._keep_scale_with(self.optimizer_g)
        self._network = self.net_g
        if self.opt["train"].get("compile"):
            self._network = torch.compile(self.net_g)

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch: ``lq`` and, unless there is none, ``gt``, (B, 3, H, W) in [0, 1].

        Where there is ``gt`` alone, uint8 from a `DFLIPDataset` with ``lq_on_device``, LR is made here.
        """
        if "lq" not in data:
            # float64, which a TF32 setting leaves alone
            data = make_pair(data["gt"].to(self.device), self.opt["scale"], torch.float64)
        super().feed_data(data)
        self.lq = self._laid_out(self.lq)

    def optimize_parameters(self, current_iter: int) -> None:
        """Take one step on the batch that was fed, piece by piece where ``train.accumulate`` says so."""
        self.optimizer_g.zero_grad()
        means: dict[str, Tensor] = {}
        pieces = self.opt["train"].get("accumulate", 1)
        batch = list(zip(self.lq.chunk(pieces), self.gt.chunk(pieces), strict=True))
        for number, (lq, gt) in enumerate(batch, 1):
            share = len(lq) / len(self.lq)
            with self._gradients_exchanged(number == len(batch)), self._kernels():
                losses = self._losses(self._upscale(lq), gt)
                total: Any = sum(losses.values())
                self.scaler.scale(total * share).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() * share
        self.scaler.step(self.optimizer_g)
        self.scaler.update()
        self.log_dict = self.reduce_loss_dict(means)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def test(self) -> None:
        """Upscale what was fed, in float32 unless ``val.amp`` is set; ``output`` is float32."""
        with self._autocast((self.opt.get("val") or {}).get("amp")), self._kernels():
            super().test()
        self.output = self.output.float()

    def _laid_out(self, what: Any) -> Any:
        """A network or a batch of images, channels last if that is switched on. A network is changed."""
        return what.to(memory_format=torch.channels_last) if self.opt.get("channels_last") else what

    def _kernels(self) -> contextlib.AbstractContextManager[None]:
        wanted = self.opt.get("cpu_kernels") and self.device.type == "cpu"
        return kernels.in_use() if wanted else contextlib.nullcontext()

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
            load_path: A ``.pth`` file.
            strict: Whether every key must fit. If not, what does not fit keeps its value.
            param_key: Which of the file's state dicts; ``params`` is read where it has no ``params_ema``.

        Raises:
            UserError: The file cannot be read, or does not fit.
        """
        logger.info("Loading %s from %s (%s).", type(self.get_bare_model(net)).__name__, load_path, param_key)
        load_weights(self.get_bare_model(net), read_weights(load_path, param_key), load_path, strict)
