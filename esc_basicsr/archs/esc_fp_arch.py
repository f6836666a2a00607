"""ESC-FP, of fewer parameters. Source: ESC, ICCV 2025, arXiv:2503.06671; keys as in the authors' release."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.archs.block import ESCBlock
from esc_basicsr.archs.conv_attention import ConvAttention, SeparableLargeKernelConv
from esc_basicsr.archs.layers import LayerNorm2d
from esc_basicsr.archs.validation import check_network_options, require

__all__ = ["ESCFP"]


class ESCFP(nn.Module):
    """ESC whose large kernel is separable (1×1, then depthwise), over bicubic upscaling of the input.

    The defaults are the published ones.

    Args:
        upscaling_factor: Scale of the output, an integer >= 1.
        dim: Feature channels.
        pdim: Channels that ConvAttn convolves, at least 4.
        kernel_size: Side of the large kernel, odd.
        n_blocks: Blocks.
        conv_blocks: ConvAttn layers in a block.
        window_size: Side of an attention window, in LR pixels.
        num_heads: Attention heads.
        exp_ratio: Expansion of the ConvFFNs before ConvAttn.
        attn_type: Attention backend, see `WindowAttention`; changes speed and memory, not results.
        in_channels: Channels of the input.
        out_channels: Channels of the output: as many, as the upscaled input is added.

    Shape:
        Input: (B, in_channels, H, W), values in [0, 1], RGB where there are 3, any B, H, W >= 1.
        Output: (B, out_channels, H·upscaling_factor, W·upscaling_factor), not clamped.

    Raises:
        ValueError: A value that is out of range or that does not go with another.
    """

    def __init__(
        self,
        upscaling_factor: int,
        dim: int = 48,
        pdim: int = 16,
        kernel_size: int = 13,
        n_blocks: int = 5,
        conv_blocks: int = 5,
        window_size: int = 32,
        num_heads: int = 3,
        exp_ratio: float = 1.25,
        attn_type: str = "auto",
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
            in_channels=in_channels,
            out_channels=out_channels,
            exp_ratio=exp_ratio,
        )
        require(pdim >= 4, "pdim must be at least 4 for ESCFP's dynamic kernel", pdim)
        require(
            in_channels == out_channels, "out_channels must be in_channels: the image is added", out_channels
        )
        super().__init__()
        self.upscaling_factor = upscaling_factor
        self.lk_channel = nn.Parameter(torch.empty(pdim, pdim, 1, 1))
        self.lk_spatial = nn.Parameter(torch.empty(pdim, 1, kernel_size, kernel_size))
        nn.init.normal_(self.lk_channel)
        nn.init.orthogonal_(self.lk_spatial)
        self.proj = nn.Conv2d(in_channels, dim, 3, padding=1)
        self.blocks = nn.ModuleList(
            ESCBlock(
                dim,
                attention=WindowAttention(dim, window_size, num_heads, attn_type),
                mixers=[ConvAttention(dim, pdim, SeparableLargeKernelConv(pdim)) for _ in range(conv_blocks)],
                proj_ratio=1.5,
                exp_ratio=exp_ratio,
                use_ln=True,
            )
            for _ in range(n_blocks)
        )
        self.ln_last = LayerNorm2d(dim)
        self.last = nn.Conv2d(dim, dim, 3, padding=1)
        self.to_img = nn.Conv2d(dim, out_channels * upscaling_factor**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Upscale a batch of images."""
        feat = self.proj(x)
        out = feat
        for block in self.blocks:
            out = block(out, self.lk_channel, self.lk_spatial)
        out = self.last(self.ln_last(out)) + feat
        return F.pixel_shuffle(self.to_img(out), self.upscaling_factor) + self.upscale_input(x)

    def upscale_input(self, x: Tensor) -> Tensor:
        """Interpolate bicubically: the skip that the network adds its detail to."""
        return F.interpolate(x, scale_factor=self.upscaling_factor, mode="bicubic", align_corners=False)
