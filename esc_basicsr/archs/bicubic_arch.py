"""Bicubic upscaling as a network: the baseline that every super-resolution table begins with."""

from torch import Tensor, nn

from esc_basicsr.archs.resize import imresize

__all__ = ["Bicubic"]


class Bicubic(nn.Module):
    """MATLAB's bicubic upscaling, as a network without parameters.

    As ``network_g`` of a test option file it makes the bicubic baseline come out of the very path that
    measures the networks.

    Args:
        upscaling_factor: Scale, an integer >= 1.

    Shape:
        Input: (B, 3, H, W), RGB in [0, 1].
        Output: (B, 3, H * upscaling_factor, W * upscaling_factor), not clamped.

    Raises:
        ValueError: ``upscaling_factor`` is not an integer >= 1.
    """

    def __init__(self, upscaling_factor: int) -> None:
        super().__init__()
        if not isinstance(upscaling_factor, int) or upscaling_factor < 1:
            raise ValueError(f"upscaling_factor must be an integer >= 1, got {upscaling_factor!r}")
        self.upscaling_factor = upscaling_factor

    def forward(self, x: Tensor) -> Tensor:
        """Upscale ``x``."""
        return imresize(x, self.upscaling_factor)

    def extra_repr(self) -> str:
        """Say the scale when printed."""
        return f"upscaling_factor={self.upscaling_factor}"
