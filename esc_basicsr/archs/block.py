"""The block that both ESC networks repeat. Source: ESC, arXiv:2503.06671, Fig. 3 and the release."""

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.archs.conv_attention import LargeKernel
from esc_basicsr.archs.layers import ConvFFN, LayerNorm2d, add
from esc_basicsr.fast.row_chunks import map_by_strips

__all__ = ["ESCBlock"]


class ESCBlock(nn.Module):
    """One window attention followed by several ConvAttn layers, around a residual.

    Args:
        dim: Feature channels.
        attention: The block's window attention; None leaves it out, with its normalisation.
        mixers: The layers after it, called ``mixer(x, norm, convffn, large_kernel)`` with the normalisation
            and the ConvFFN before them; each returns ``x`` plus its result, and may overwrite ``x``.
        proj_ratio: Expansion of the ConvFFN that opens the block.
        exp_ratio: Expansion of the ConvFFNs before the mixers.
        use_ln: Whether those ConvFFNs see normalised features.

    Shape:
        Input, output: (B, dim, H, W).
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

    def forward(self, x: Tensor, large_kernel: LargeKernel) -> Tensor:
        """Run the block with the network's large kernel, None where there is no shared one."""
        y = self.proj.after(self.ln_proj, x)
        if self.attn is not None and self.ln_attn is not None:
            y = self.attn.add_to(y, self.ln_attn, y)
        for norm, convffn, mixer in zip(self.lns, self.convffns, self.pconvs, strict=True):
            y = mixer(y, norm, convffn, large_kernel)
        return add(map_by_strips(lambda strip: self.conv_out(self.ln_out(strip)), y), x)
