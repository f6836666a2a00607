"""The block that both ESC networks repeat. Source: ESC, arXiv:2503.06671, Fig. 3 and the release."""

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.archs.layers import ConvFFN, LayerNorm2d

__all__ = ["ESCBlock"]


class ESCBlock(nn.Module):
    """One window attention followed by several ConvAttn layers, with a residual around all of them.

    Args:
        dim: Feature channels.
        attention: The block's window attention; None leaves it out, with its normalisation.
        mixers: The ConvAttn layers after it, or what an ablation puts in their place.
        proj_ratio: Expansion of the ConvFFN that opens the block.
        exp_ratio: Expansion of the ConvFFNs before the mixers.
        use_ln: Whether those ConvFFNs see normalised features.

    Shape:
        x, output: (B, dim, H, W). large_kernel: the network's shared kernel, as ``mixers`` take it.
    """

    def __init__(
        self,
        dim: int,
        attention: WindowAttention | None,
        mixers: Sequence[nn.Module],
        proj_ratio: float,
        exp_ratio: float,
        use_ln: bool,
    ) -> None:
        super().__init__()
        self.ln_proj = LayerNorm2d(dim)
        self.proj = ConvFFN(dim, proj_ratio)
        self.ln_attn = LayerNorm2d(dim) if attention is not None else None
        self.attn = attention
        self.lns = nn.ModuleList(LayerNorm2d(dim) if use_ln else nn.Identity() for _ in mixers)
        self.convffns = nn.ModuleList(ConvFFN(dim, exp_ratio) for _ in mixers)
        # The checkpoints' name for the ConvAttn layers, whatever stands in their place in an ablation.
        self.pconvs = nn.ModuleList(mixers)
        self.ln_out = LayerNorm2d(dim)
        self.conv_out = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, *large_kernel: Tensor) -> Tensor:
        """Attend within windows once, then emulate attention by convolution several times."""
        skip = x
        x = self.proj(self.ln_proj(x))
        if self.attn is not None and self.ln_attn is not None:
            x = x + self.attn(self.ln_attn(x))
        for ln, convffn, pconv in zip(self.lns, self.convffns, self.pconvs, strict=True):
            x = x + pconv(convffn(ln(x)), *large_kernel)
        return self.conv_out(self.ln_out(x)) + skip
