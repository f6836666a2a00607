"""ESC and ESC-light. Source: ESC, ICCV 2025, arXiv:2503.06671; keys as in the authors' release."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.archs.block import ESCBlock
from esc_basicsr.archs.conv_attention import (
    AttentionMixer,
    ConvAttention,
    LargeKernelConv,
    UnsharedConvAttention,
    average_over_symmetries,
)
from esc_basicsr.archs.validation import check_flags, check_network_options, require

__all__ = ["ESC"]

TOKEN_MIXERS = ("hybrid", "attention", "conv_attention")


class ESC(nn.Module):
    """Network in which most window self-attention is emulated by convolution.

    The defaults are the published ones.

    Args:
        upscaling_factor: Scale of the output, an integer >= 1.
        dim: Feature channels.
        pdim: Channels that ConvAttn convolves.
        kernel_size: Side of the large kernel, odd.
        n_blocks: Blocks.
        conv_blocks: ConvAttn layers in a block.
        window_size: Side of an attention window, in LR pixels.
        num_heads: Attention heads.
        exp_ratio: Expansion of the ConvFFNs before ConvAttn.
        attn_type: Attention backend, see `WindowAttention`; changes speed and memory, not results.
        use_ln: Whether those ConvFFNs see normalised features.
        token_mixer: What mixes pixels (ablation): ``hybrid`` is ESC; ``attention`` puts window attention
            in place of each ConvAttn; ``conv_attention`` leaves window attention out.
        share_large_kernel: Whether one large kernel serves the whole network; if not, each ConvAttn has
            its own (ablation).
        dynamic_kernel: Whether ConvAttn predicts a 3×3 kernel from the image; if not, it is the large
            kernel alone (ablation).
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
        dim: int = 64,
        pdim: int = 16,
        kernel_size: int = 13,
        n_blocks: int = 5,
        conv_blocks: int = 5,
        window_size: int = 32,
        num_heads: int = 4,
        exp_ratio: float = 1.25,
        attn_type: str = "auto",
        use_ln: bool = False,
        token_mixer: str = "hybrid",
        share_large_kernel: bool = True,
        dynamic_kernel: bool = True,
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
        check_flags(use_ln=use_ln, share_large_kernel=share_large_kernel, dynamic_kernel=dynamic_kernel)
        require(
            token_mixer in TOKEN_MIXERS, f"token_mixer must be one of {', '.join(TOKEN_MIXERS)}", token_mixer
        )
        has_conv = token_mixer != "attention"
        require(
            has_conv or (share_large_kernel and dynamic_kernel),
            "share_large_kernel and dynamic_kernel must be true with token_mixer attention",
            (share_large_kernel, dynamic_kernel),
        )
        require(not dynamic_kernel or pdim >= 2, "pdim must be at least 2 for a dynamic kernel", pdim)
        require(
            in_channels == out_channels, "out_channels must be in_channels: the image is added", out_channels
        )
        super().__init__()
        self.upscaling_factor = upscaling_factor
        if has_conv and share_large_kernel:
            self.plk_filter = nn.Parameter(torch.empty(pdim, pdim, kernel_size, kernel_size))
            # An orthogonal start steadies early training (release).
            nn.init.orthogonal_(self.plk_filter)
        else:
            self.register_parameter("plk_filter", None)

        def attention() -> WindowAttention:
            return WindowAttention(dim, window_size, num_heads, attn_type)

        def mixer() -> nn.Module:
            if not has_conv:
                return AttentionMixer(dim, attention())
            if not share_large_kernel:
                return UnsharedConvAttention(dim, pdim, kernel_size, dynamic_kernel)
            return ConvAttention(dim, pdim, LargeKernelConv(pdim, dynamic_kernel))

        self.proj = nn.Conv2d(in_channels, dim, 3, padding=1)
        self.blocks = nn.ModuleList(
            ESCBlock(
                dim,
                attention=attention() if token_mixer != "conv_attention" else None,
                mixers=[mixer() for _ in range(conv_blocks)],
                proj_ratio=2,
                exp_ratio=exp_ratio,
                use_ln=use_ln,
            )
            for _ in range(n_blocks)
        )
        self.last = nn.Conv2d(dim, dim, 3, padding=1)
        self.to_img = nn.Conv2d(dim, out_channels * upscaling_factor**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Upscale a batch of images."""
        feat = self.proj(x)
        large_kernel = [] if self.plk_filter is None else [average_over_symmetries(self.plk_filter)]
        out = feat
        for block in self.blocks:
            out = block(out, *large_kernel)
        out = self.last(out) + feat
        return F.pixel_shuffle(self.to_img(out), self.upscaling_factor) + self.upscale_input(x)

    def upscale_input(self, x: Tensor) -> Tensor:
        """Repeat each pixel: the skip that the network adds its detail to."""
        return F.interpolate(x, scale_factor=self.upscaling_factor, mode="nearest")
