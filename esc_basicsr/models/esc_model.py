"""What BasicSR's SRModel lacks to train ESC."""

from collections.abc import Iterable
from typing import Any

import torch
from basicsr.models.sr_model import SRModel
from torch import nn

from esc_basicsr.archs.checkpoint import load_weights, read_weights
from esc_basicsr.data.degradation import make_pair
from esc_basicsr.log import logger

__all__ = ["ESCModel"]


class ESCModel(SRModel):
    """SRModel with the release's optimizer, an exact schedule, and checkpoints read safely and across scales.

    Option keys are SRModel's; ``train.optim_g.type`` may be ``AdamW`` too.
    """

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch: ``lq`` and, unless there is none, ``gt``, (B, 3, H, W) in [0, 1].

        Where there is ``gt`` alone, uint8 from a `DFLIPDataset` with ``lq_on_device``, LR is made here.
        """
        if "lq" not in data:
            # float64, which a TF32 setting leaves alone
            data = make_pair(data["gt"].to(self.device), self.opt["scale"], torch.float64)
        super().feed_data(data)

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
