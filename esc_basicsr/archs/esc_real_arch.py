"""ESC-Real, for images with real damage. Source: ESC, ICCV 2025, arXiv:2503.06671; keys as in the release."""

import torch
import torch.nn as nn
from torch import Tensor

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.archs.block import ESCBlock
from esc_basicsr.archs.conv_attention import ConvAttention, LargeKernelConv, average_over_symmetries
from esc_basicsr.archs.layers import pad_to_multiple, reflect_border
from esc_basicsr.archs.upsamplers import DySample, Upsampler, nearest_upsampler
from esc_basicsr.archs.validation import check_flags, check_network_options, require

__all__ = ["ESCReal", "ESCRealM"]


class ReflectingConv2d(nn.Conv2d):
    """A depthwise convolution over an input that is reflected at its border, at whatever size.

    Args:
        dim: Channels.
        kernel_size: Side of the kernel, odd.

    Shape:
        Input, output: (B, dim, H, W), any H, W >= 1.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, groups=dim)
        self.border = kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        """Reflect, then convolve."""
        return super().forward(reflect_border(x, self.border))


class ESCRealM(nn.Module):
    """ESC's blocks with a convolutional skip and a choice of upsamplers, for any scale.

    Args:
        upscaling_factor: Scale of the output, an integer >= 1.
        dim: Feature channels.
        pdim: Channels that ConvAttn convolves.
        kernel_size: Side of the large kernel, odd.
        n_blocks: Blocks.
        conv_blocks: ConvAttn layers in a block.
        window_size: Side of an attention window, in pixels of the features.
        num_heads: Attention heads.
        exp_ratio: Expansion of the ConvFFNs before ConvAttn.
        attn_type: Attention backend, see `WindowAttention`; changes speed and memory, not results.
        upsampler: What makes the image, see `Upsampler`.
        mid_dim: Channels within some upsamplers.
        unshuffle_mod: Whether scales 1 and 2 turn the input's pixels into channels and upscale by 4.
        in_channels: Channels of the input.
        out_channels: Channels of the output.

    Shape:
        Input: (B, in_channels, H, W), values in [0, 1], RGB where there are 3, any B, H, W >= 1.
        Output: (B, out_channels, H·upscaling_factor, W·upscaling_factor), not clamped.

    Raises:
        ValueError: A value that is out of range or that does not go with another.
    """

    def __init__(
        self,
        upscaling_factor: int,
        dim: int = 64,
        pdim: int = 16,
        kernel_size: int = 13,
        n_blocks: int = 10,
        conv_blocks: int = 5,
        window_size: int = 32,
        num_heads: int = 4,
        exp_ratio: float = 2,
        attn_type: str = "auto",
        upsampler: str = "nearest+conv",
        mid_dim: int = 48,
        unshuffle_mod: bool = True,
        in_channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        check_network_options(
            dim=dim,
            pdim=pdim,
            kernel_size=kernel_size,
            n_blocks=n_blocks,
            conv_blocks=conv_blocks,
            window_size=window_size,
            num_heads=num_heads,
            upscaling_factor=upscaling_factor,
            mid_dim=mid_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            exp_ratio=exp_ratio,
        )
        check_flags(unshuffle_mod=unshuffle_mod)
        require(pdim >= 2, "pdim must be at least 2 for a dynamic kernel", pdim)
        super().__init__()
        self.upscaling_factor = upscaling_factor
        self.unshuffle = 4 // upscaling_factor if unshuffle_mod and upscaling_factor <= 2 else 1
        require(
            upsampler != "conv" or self.unshuffle == 1,
            "unshuffle_mod must be false with upsampler conv",
            unshuffle_mod,
        )
        require(
            self.unshuffle == 1 or in_channels == out_channels,
            "out_channels must be in_channels with unshuffle_mod, by which a file tells the scale",
            out_channels,
        )
        channels = in_channels * self.unshuffle**2
        first = [nn.PixelUnshuffle(self.unshuffle)] if self.unshuffle > 1 else []
        self.plk_filter = nn.Parameter(torch.empty(pdim, pdim, kernel_size, kernel_size))
        nn.init.orthogonal_(self.plk_filter)
        proj = nn.Conv2d(channels, dim, 3, padding=1)
        self.proj = nn.Sequential(*first, proj) if first else proj
        self.blocks = nn.ModuleList(
            ESCBlock(
                dim,
                attention=WindowAttention(dim, window_size, num_heads, attn_type),
                mixers=[ConvAttention(dim, pdim, LargeKernelConv(pdim)) for _ in range(conv_blocks)],
                proj_ratio=2,
                exp_ratio=exp_ratio,
                use_ln=True,
            )
            for _ in range(n_blocks)
        )
        self.last = nn.Conv2d(dim, dim, 3, padding=1)
        self.to_img = self._upsampler(
            upsampler, upscaling_factor * self.unshuffle, dim, out_channels, mid_dim
        )
        self.skip = nn.Sequential(
            *first,
            nn.Conv2d(channels, 2 * dim, 1),
            ReflectingConv2d(2 * dim, 7),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * dim, dim, 1),
        )

    def _upsampler(self, name: str, scale: int, dim: int, out_channels: int, mid_dim: int) -> nn.Module:
        return Upsampler(name, scale, dim, out_channels, mid_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Restore and upscale a batch of images."""
        height, width = (side * self.upscaling_factor for side in x.shape[-2:])
        x = pad_to_multiple(x, self.unshuffle)
        feat = self.proj(x)
        large_kernel = average_over_symmetries(self.plk_filter)
        out = feat
        for block in self.blocks:
            out = block(out, large_kernel)
        out = self.last(out) + feat + self.skip(x)
        return self.to_img(out)[:, :, :height, :width]


class ESCReal(ESCRealM):
    """The network of the paper's real-world experiments, of scale 4.

    The defaults are the published ones; arguments and shapes are those of `ESCRealM`.

    Args:
        upscaling_factor: 4.
        use_dysample: Whether `DySample` makes the image, in place of nearest neighbours and convolutions.

    Raises:
        ValueError: A value that is out of range or that does not go with another.
    """

    def __init__(
        self,
        upscaling_factor: int = 4,
        dim: int = 64,
        pdim: int = 16,
        kernel_size: int = 13,
        n_blocks: int = 10,
        conv_blocks: int = 5,
        window_size: int = 32,
        num_heads: int = 4,
        exp_ratio: float = 2,
        attn_type: str = "auto",
        use_dysample: bool = False,
        in_channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        require(upscaling_factor == 4, "ESCReal has upscaling_factor 4, ESCRealM any", upscaling_factor)
        check_flags(use_dysample=use_dysample)
        super().__init__(
            *(upscaling_factor, dim, pdim, kernel_size, n_blocks, conv_blocks, window_size, num_heads),
            exp_ratio=exp_ratio,
            attn_type=attn_type,
            upsampler="dysample" if use_dysample else "nearest+conv",
            in_channels=in_channels,
            out_channels=out_channels,
        )

    def _upsampler(self, name: str, scale: int, dim: int, out_channels: int, mid_dim: int) -> nn.Module:
        # not of the names' form in `Upsampler`, as the release has it
        return (
            DySample(dim, out_channels, scale) if name == "dysample" else nearest_upsampler(dim, out_channels)
        )
