"""ESC and ESC-FP written a second time, from arXiv:2503.06671 and the release's description: an oracle.

Attention by scores that are written out and a table of indices; NCHW; direct convolutions; one operation
after the other. Parameters have the names of `esc_basicsr.archs`, so that weights go from one to the other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ReferenceNetwork(torch.nn.Module):
    """A network of `esc_basicsr.archs`, computed as the release does.

    Args:
        net: An `ESC` or `ESCFP` without ablations; its parameters are shared, not copied.

    Shape:
        Input: (B, 3, H, W), RGB in [0, 1], H and W above half a window. Output: (B, 3, H·s, W·s).
    """

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        attention: Any = net.get_submodule("blocks.0.attn")
        self.index: Tensor
        self.register_buffer("index", _bias_index(attention.window_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        scale = net.upscaling_factor
        is_fp = hasattr(net, "lk_spatial")
        feat = net.proj(x)
        out = feat
        kernel = None if is_fp else _averaged(net.plk_filter)
        for block in net.blocks:
            out = self._block(block, out, kernel)
        if is_fp:
            out = net.last(_layer_norm(net.ln_last, out)) + feat
            bicubic = F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)
            return F.pixel_shuffle(net.to_img(out), scale) + bicubic
        out = net.last(out) + feat
        return F.pixel_shuffle(net.to_img(out) + x.repeat_interleave(scale**2, dim=1), scale)

    def _block(self, block: Any, x: Tensor, kernel: Tensor | None) -> Tensor:
        skip = x
        x = _conv_ffn(block.proj, _layer_norm(block.ln_proj, x))
        x = x + self._attention(block.attn, _layer_norm(block.ln_attn, x))
        for norm, ffn, mixer in zip(block.lns, block.convffns, block.pconvs, strict=True):
            y = _conv_ffn(ffn, x if isinstance(norm, torch.nn.Identity) else _layer_norm(norm, x))
            f_att, f_idt = y[:, : mixer.pdim], y[:, mixer.pdim :]
            mixed = self._separable(mixer.plk, f_att) if kernel is None else _large(mixer.plk, f_att, kernel)
            x = x + mixer.aggr(torch.cat((mixed, f_idt), dim=1))
        return block.conv_out(_layer_norm(block.ln_out, x)) + skip

    def _separable(self, plk: Any, x: Tensor) -> Tensor:
        """ESC-FP's convolution: one image at a time, as each has its own kernel."""
        spatial, channel = self.net.get_parameter("lk_spatial"), self.net.get_parameter("lk_channel")
        border = (spatial.shape[-1] - 3) // 2
        kernels = spatial + F.pad(plk.proj(x).reshape(len(x), -1, 1, 3, 3), [border] * 4)
        mixed = F.conv2d(x, channel)
        each = [
            F.conv2d(one[None], kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))
            for one, kernel in zip(mixed, kernels, strict=True)
        ]
        return torch.cat(each)

    def _attention(self, attn: Any, x: Tensor) -> Tensor:
        w, heads = attn.window_size, attn.num_heads
        H, W = x.shape[-2:]
        x = F.pad(x, [0, -W % w, 0, -H % w], mode="reflect")
        B, C, padded_H, padded_W = x.shape
        rows, columns = padded_H // w, padded_W // w
        # [B, (3 heads d), (rows w), (columns w)] -> [3, (B rows columns), heads, (w w), d]
        qkv = attn.to_qkv(x).view(B, 3, heads, C // heads, rows, w, columns, w)
        q, k, v = qkv.permute(1, 0, 4, 6, 2, 5, 7, 3).reshape(3, -1, heads, w * w, C // heads)
        bias = attn.relative_position_bias
        scores = q @ k.transpose(-2, -1) * (C // heads) ** -0.5
        out = (scores + bias[:, self.index]).softmax(-1) @ v
        out = out.view(B, rows, columns, heads, w, w, C // heads).permute(0, 3, 6, 1, 4, 2, 5)
        return attn.to_out(out.reshape(B, C, padded_H, padded_W)[..., :H, :W])


def _bias_index(w: int) -> Tensor:
    """Index the table of biases by queries and keys, (w², w²): key minus query."""
    rows, columns = (
        grid.flatten() for grid in torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")
    )
    across = rows[None] - rows[:, None] + w - 1
    return across * (2 * w - 1) + columns[None] - columns[:, None] + w - 1


def _averaged(kernel: Tensor) -> Tensor:
    turned = [torch.rot90(kernel, turns, (-2, -1)) for turns in range(4)]
    return torch.stack(turned + [turn.flip(-1) for turn in turned]).mean(0)


def _layer_norm(norm: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    normalised = (x - mean) / (variance + norm.eps).sqrt()
    return norm.weight[:, None, None] * normalised + norm.bias[:, None, None]


def _conv_ffn(ffn: Any, x: Tensor) -> Tensor:
    x = F.gelu(ffn.proj(x))
    return ffn.aggr(x + F.gelu(ffn.dwc(x)))


def _large(plk: Any, x: Tensor, kernel: Tensor) -> Tensor:
    """ESC's convolution: the shared kernel, and a depthwise one for each image."""
    B, C, H, W = x.shape
    predicted = plk.dwc_proj(x).reshape(B * C, 1, 3, 3)
    dynamic = F.conv2d(x.reshape(1, B * C, H, W), predicted, padding=1, groups=B * C).view(B, C, H, W)
    return dynamic + F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
