"""The paper's loss on luma, and what keeps colours right. Source: ESC, arXiv:2503.06671, Sec. 4.1."""

import torch.nn as nn
from torch import Tensor

__all__ = ["RGB_TO_YCBCR", "YChannelL1Loss"]

# ITU-R BT.601, studio swing, as BasicSR's metrics and MATLAB's rgb2ycbcr use it; rows are Y, Cb, Cr.
RGB_TO_YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
_REDUCTIONS = ("none", "mean", "sum")


class YChannelL1Loss(nn.Module):
    """L1 on luma, as the paper states it, and on demand a light L1 on chroma.

    Luma alone leaves chroma free: whatever colour an edge takes, the loss is the same, and networks trained
    so tint their edges. The chroma term ties colours down; docs/loss.md has what it costs and gives,
    measured. The shipped option files set its weight to 0.2.

    The loss of a pixel is ``|ΔY| + chroma_weight · (|ΔCb| + |ΔCr|) / 2`` in BT.601 as BasicSR's metrics use
    it, differences in units of the full 8-bit range.

    Args:
        loss_weight: Factor of the whole loss.
        reduction: ``mean``, ``sum``, or ``none`` for a map.
        chroma_weight: Factor of the chroma term; 0 is luma alone.

    Shape:
        pred, target: (B, 3, H, W), float RGB in [0, 1]. Output: a scalar, or (B, 1, H, W) for ``none``.

    Raises:
        ValueError: An unknown reduction, a negative weight, images that are not RGB or differ in shape.
    """

    def __init__(self, loss_weight: float = 1.0, reduction: str = "mean", chroma_weight: float = 0.0) -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}.")
        if chroma_weight < 0:
            raise ValueError(f"chroma_weight must not be negative, got {chroma_weight!r}.")
        self.loss_weight = loss_weight
        self.reduction = reduction
        self.chroma_weight = chroma_weight

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare ``pred`` with ``target``."""
        if pred.shape != target.shape or pred.ndim != 4 or pred.shape[1] != 3:
            raise ValueError(
                "expected two RGB batches (B, 3, H, W) of one shape, "
                f"got {list(pred.shape)} and {list(target.shape)}."
            )
        # The conversion is linear, so the difference is converted once; in float32 also under autocast.
        r, g, b = (pred.float() - target.float()).unbind(1)
        y, cb, cr = ((r * from_r + g * from_g + b * from_b) / 255 for from_r, from_g, from_b in RGB_TO_YCBCR)
        loss = y.abs()
        if self.chroma_weight:
            loss = loss + self.chroma_weight * (cb.abs() + cr.abs()) / 2
        loss = loss.unsqueeze(1)
        if self.reduction == "mean":
            loss = loss.mean()
        elif self.reduction == "sum":
            loss = loss.sum()
        return self.loss_weight * loss
