"""BasicSR's SRModel with what it lacks to train ESC."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from basicsr.models.sr_model import SRModel
from torch import Tensor, nn

from esc_basicsr import fast
from esc_basicsr.common.log import logger
from esc_basicsr.common.memory import is_out_of_memory
from esc_basicsr.data.degradation import make_pair
from esc_basicsr.fast import kernels
from esc_basicsr.fast.precision import HALF_PRECISIONS
from esc_basicsr.fast.tiles import grid_of, run_in_tiles, tile_side
from esc_basicsr.options.schema import fill_defaults


class ESCModel(SRModel):
    """SRModel by fast kernels, with LR made on the device, and tests of images of any size.

    Steps (`TrainingStep`), states (`TrainingState`), stopping and validation (`SharedValidation`) are those
    that every model of BasicSR has from `esc_basicsr.basicsr_host.models`. Option keys are in
    docs/options.md, and in docs/training-speed.md what each does to the loss and to speed. Validation, on
    images of many sizes, is never compiled, and runs in float32 unless ``val.amp`` is set.
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

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Put a network where it runs, laid out as ``channels_last`` says.

        For several GPUs it is wrapped, if it has anything to train.
        """
        net = self._laid_out(net)
        if any(parameter.requires_grad for parameter in net.parameters()):
            return super().model_to_device(net)
        return net.to(self.device)

    def init_training_settings(self) -> None:
        """Set up EMA, losses, optimizer and schedule."""
        super().init_training_settings()
        if self.ema_decay > 0:
            self._laid_out(self.net_g_ema)
            if self.opt["dist"]:  # all ranks validate
                for tensor in self.net_g_ema.state_dict().values():
                    dist.broadcast(tensor, src=0)

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch: ``lq`` and, unless there is none, ``gt``, (B, 3, H, W) in [0, 1].

        Where there is ``gt`` alone, uint8 from a `DFLIPDataset` with ``lq_on_device``, LR is made here.
        """
        if "lq" not in data:
            # float64, which a TF32 setting leaves alone
            pair = make_pair(data["gt"].to(self.device), self.opt["scale"], torch.float64)
            data = {**data, **pair}
        super().feed_data(data)
        self.lq = self._laid_out(self.lq)

    def get_current_log(self) -> dict[str, Any]:
        """Give the last step's losses; with ``logger.use_tb_logger`` learning rate and throughput as well.

        ``images_per_second`` counts all ranks' images since the last call, without the time that validation
        and saving took.
        """
        log = dict(super().get_current_log())
        if (self.opt.get("logger") or {}).get("use_tb_logger"):
            (log["lr"], *_) = self.get_current_learning_rate()
            rate = self.training_step.throughput.take()
            if rate is not None:
                log["images_per_second"] = rate
        return log

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


def _padded(images: Tensor, multiple: int) -> Tensor:
    """Mirror (B, C, H, W) at bottom and right to multiples of a size, several times where they are small."""
    rows, columns = (
        torch.from_numpy(np.pad(np.arange(size), (0, -size % multiple), mode="reflect")).to(images.device)
        for size in images.shape[-2:]
    )
    return images[:, :, rows][..., columns]
