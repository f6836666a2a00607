"""BasicSR's SwinIR for images of any size."""

from typing import Any

import torch
from basicsr.archs.swinir_arch import SwinIR
from torch import Tensor

from esc_basicsr.archs.layers import pad_to_multiple


class PaddedSwinIR(SwinIR):
    """SwinIR that pads an image to whole windows, as its authors' network does and BasicSR's does not.

    Args:
        upscale: Scale of the output.
        window_size: Side of a window, in LR pixels.
        options: BasicSR's SwinIR's.

    Shape:
        Input: (B, 3, H, W), RGB in [0, 1], any H, W >= 1.
        Output: (B, 3, H·upscale, W·upscale), not clamped.
    """

    def __init__(self, upscale: int = 2, window_size: int = 7, **options: Any) -> None:
        options |= {"upscale": upscale, "window_size": window_size}
        if torch.get_default_device().type == "meta":
            # SwinIR reads rates of stochastic depth out of a tensor, which has no values there.
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                super().__init__(**options)
            self.to("meta")
        else:
            super().__init__(**options)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        """Upscale a batch of images."""
        H, W = x.shape[-2:]
        sr: Tensor = super().forward(pad_to_multiple(x, self.window_size))
        return sr[:, :, : H * self.upscale, : W * self.upscale]
