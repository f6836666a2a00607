"""HiT-SRF. Source: HiT-SR: Hierarchical Transformer for Efficient Image Super-Resolution, ECCV 2024.

Options and keys are the release's. Tokens are laid out channels last: (B, H, W, C).
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.validation import require
from esc_basicsr.fast.precision import without_autocast
from esc_basicsr.lab.networks.checks import check_numbers, check_published, check_sizes, check_stages

ATTN_TYPES = ("Factored", "Naive")

# options that released files state and that have one value
_PUBLISHED = {"upsampler": "pixelshuffledirect", "resi_connection": "1conv", "ape": False, "patch_norm": True}
# mean colour of DIV2K, RGB
_MEAN = (0.4488, 0.4371, 0.4040)

Size = tuple[int, int]  # height, width


class TokenConv(nn.Conv2d):
    """Convolution of tokens, padded with zeros to keep their size, with a bias.

    Shape:
        Input: (B, H, W, in_channels). Output: (B, H, W, out_channels).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        if self.kernel_size == (1, 1):
            return F.linear(x, self.weight[:, :, 0, 0], self.bias)
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _pad(x: Tensor, window: Size) -> Tensor:
    """Pad tokens at bottom and right to multiples of a window, reflecting back and forth.

    Shape:
        x: (B, H, W, C), any H, W >= 1. Output: (B, H', W', C).
    """
    for axis, side in zip((1, 2), window, strict=True):
        size = x.shape[axis]
        if size % side:
            period = 2 * size - 2
            index = torch.arange(-(-size // side) * side, device=x.device) % max(period, 1)
            x = x.index_select(axis, torch.minimum(index, period - index))
    return x


class PositionBias(nn.Module):
    """The bias of each query pixel and grid cell of a window, made of their offsets by a small network.

    Args:
        dim: Feature channels of the network.
        num_heads: Attention heads.
        window: A window's size.
        grid: A window's cells; it divides ``window``.

    Shape:
        Output: (num_heads, pixels of a window, cells); pixels row by row, cells from the last to the first.
    """

    def __init__(self, dim: int, num_heads: int, window: Size, grid: Size) -> None:
        super().__init__()
        self.window = window
        self.grid = grid
        hidden = dim // 4 // 4

        def layer(out: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, out))

        self.pos_proj = nn.Linear(2, hidden)
        self.pos1 = layer(hidden)
        self.pos2 = layer(hidden)
        self.pos3 = layer(num_heads)

    def forward(self) -> Tensor:
        """Average what the network makes of query minus key over each cell's pixels."""
        (wh, ww), (bh, bw) = self.window, self.grid
        sh, sw = wh // bh, ww // bw
        like = self.pos_proj.weight
        sides = [torch.arange(1 - side, side, dtype=like.dtype, device=like.device) for side in self.window]
        offsets = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)
        with without_autocast(like.device):
            values = self.pos3(self.pos2(self.pos1(self.pos_proj(offsets)))).permute(2, 0, 1)
        # The pixels of a cell are neighbours, and so are their offsets. A mean over rows, then over columns.
        means = F.avg_pool2d(F.avg_pool2d(values, (sh, 1), stride=1), (1, sw), stride=1)
        # A cell further means the offsets of a query a cell back.
        windows = means.unfold(1, wh, sh).unfold(2, ww, sw)
        # [heads, -row, -column, y, x] -> [heads, (y x), -(row column)]
        return windows.permute(0, 3, 4, 1, 2).reshape(-1, wh * ww, bh * bw)


class QueryValue(nn.Module):
    """Queries and values: a convolution, and a linear layer that it modulates.

    Shape:
        Input, output: (B, H, W, dim); the output's first half are queries, the second values.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim // 5
        self.conv = nn.Sequential(
            TokenConv(dim, hidden, 1),
            nn.LeakyReLU(0.2, inplace=True),
            TokenConv(hidden, hidden),
            nn.LeakyReLU(0.2, inplace=True),
            TokenConv(hidden, dim, 1),
        )
        self.linear = TokenConv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the two."""
        return self.conv(x) * self.linear(x)


class Correlation(nn.Module):
    """Spatial and channel self-correlation within windows; there is no softmax.

    Args:
        dim: Feature channels, a multiple of ``2 * num_heads``.
        num_heads: Attention heads.
        window: A window's size.
        grid: Cells of a window, to which values are reduced; it divides ``window``.
        attn_type: See `HiT_SRF`.

    Shape:
        Input, output: (B, H, W, dim), H and W multiples of the window's.
    """

    same_head: Tensor

    def __init__(self, dim: int, num_heads: int, window: Size, grid: Size, attn_type: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.grid = grid
        self.cell = (window[0] // grid[0], window[1] // grid[1])
        self.attn_type = attn_type
        self.qv = QueryValue(dim)
        self.spatial_linear = nn.Linear(self.cell[0] * self.cell[1], 1)
        self.pos = PositionBias(dim, num_heads, window, grid)
        self.proj = nn.Linear(dim, dim)
        head = torch.arange(dim // 2) // (dim // 2 // num_heads)
        self.register_buffer("same_head", (head[:, None] == head).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Correlate within each window."""
        B, H, W, C = x.shape
        wh, ww = self.window
        rows, columns = H // wh, W // ww
        qv = self.qv(x).reshape(B, rows, wh, columns, ww, C)
        # [B, rows, wh, columns, ww, C] -> [(B rows columns), (wh ww), C]
        q, v = qv.transpose(2, 3).reshape(-1, wh * ww, C).chunk(2, -1)
        out = self.proj(torch.cat([self._spatial(q, v), v @ (v.transpose(1, 2) @ q / q.shape[1])], -1))
        return out.reshape(B, rows, columns, wh, ww, C).transpose(2, 3).reshape(B, H, W, C)

    def _spatial(self, q: Tensor, v: Tensor) -> Tensor:
        (bh, bw), (sh, sw) = self.grid, self.cell
        # [N, (bh sh bw sw), C/2] -> [N, (bh bw), C/2, (sh sw)]
        cells = v.reshape(-1, bh, sh, bw, sw, v.shape[-1]).permute(0, 1, 3, 5, 2, 4)
        keys = self.spatial_linear(cells.reshape(-1, bh * bw, v.shape[-1], sh * sw)).squeeze(-1)
        keys = keys.flip(1)  # as the bias has them
        by = self._by_scores if self.attn_type == "Naive" else self._by_factors
        return by(q, keys, self.pos())

    def _by_scores(self, q: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        """Compute ``(q @ keys.T / d + bias) @ keys``, the scores written out; keys are the values too."""
        # [N, ..., (heads d)] -> [N, heads, ..., d]
        q, keys = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, keys))
        scores = q @ keys.transpose(-2, -1) / q.shape[-1] + bias
        return (scores @ keys).transpose(1, 2).flatten(2)

    def _by_factors(self, q: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        """Compute ``q @ (keys.T @ keys) / d + bias @ keys``, where nothing is as large as scores."""
        N, heads = len(q), self.num_heads
        d = q.shape[-1] // heads
        factor = keys.transpose(1, 2) @ keys * (self.same_head / d)
        # [N, cells, (heads d)] -> [heads, cells, (N d)]
        values = keys.unflatten(-1, (heads, d)).permute(2, 1, 0, 3).reshape(heads, -1, N * d)
        # [heads, L, (N d)] -> [N, L, (heads d)]
        biased = (bias @ values).unflatten(-1, (N, d)).permute(2, 1, 0, 3).flatten(2)
        return torch.baddbmm(biased, q, factor)


class ConvMLP(nn.Module):
    """Feed-forward network with a depthwise 5×5 convolution between its linear layers.

    Args:
        dim: Channels of input and output.
        hidden: Channels between them.

    Shape:
        Input, output: (B, H, W, dim).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        conv = TokenConv(hidden, hidden, 5, groups=hidden)
        self.dwconv = nn.Sequential(OrderedDict(depthwise_conv=nn.Sequential(conv, nn.GELU())))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Expand, mix neighbours, and reduce."""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class Block(nn.Module):
    """Correlation within windows and a feed-forward network, each normalised before it is added.

    Shape:
        Input, output: (B, H, W, dim), any H, W >= 1.
    """

    def __init__(self, correlation: Correlation, mlp: ConvMLP, dim: int) -> None:
        super().__init__()
        self.correlation = correlation
        self.mlp = mlp
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches in turn."""
        H, W = x.shape[1:3]
        x = x + self.norm1(self.correlation(_pad(x, self.correlation.window))[:, :H, :W])
        return x + self.norm2(self.mlp(x))


class Stage(nn.Module):
    """Blocks and a convolution, with a residual connection around them.

    Shape:
        Input, output: (B, H, W, dim).
    """

    def __init__(self, blocks: Sequence[Block], dim: int) -> None:
        super().__init__()
        self.residual_group = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
        self.conv = TokenConv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Pass through the blocks, and add."""
        return x + self.conv(self.residual_group["blocks"](x))


class HiT_SRF(nn.Module):  # noqa: N801 - the name that the release's option files give
    """Network whose windows grow from block to block, at a cost linear in their size.

    The defaults are the published ones.

    Args:
        upscale: Scale of the output, an integer >= 1.
        in_chans: Colours of input and output.
        embed_dim: Feature channels, a multiple of twice the heads of each stage, at least 16.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        base_win_size: Height and width, in LR pixels, of a window whose ratio is 1.
        hier_win_ratios: Size of each block's windows, in base windows. A larger window is a multiple of the
            base window, and its values are reduced to as many cells as that has pixels.
        mlp_ratio: Hidden channels of feed-forward networks are ``int(embed_dim * mlp_ratio)``.
        img_range: What colours are multiplied by.
        upsampler, resi_connection, ape, patch_norm: As published; other values are not implemented.
        attn_type: How spatial attention is computed, which changes speed and memory, not results: ``Naive``
            writes the scores out, as the release does, and is what multiply-adds are published of;
            ``Factored`` never does (without a softmax queries can meet keys times values).
        img_size, patch_size, expansion_factor: Stand in the release's option files; without effect, as there.

    Shape:
        Input: (B, in_chans, H, W), RGB in [0, 1], any B, H, W >= 1.
        Output: (B, in_chans, H·upscale, W·upscale), not clamped.

    Raises:
        ValueError: A value that is out of range or that does not go with another.
    """

    mean: Tensor

    def __init__(
        self,
        upscale: int = 4,
        in_chans: int = 3,
        embed_dim: int = 60,
        depths: Sequence[int] = (6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6),
        base_win_size: Sequence[int] = (8, 8),
        hier_win_ratios: Sequence[float] = (0.5, 1, 2, 4, 6, 8),
        mlp_ratio: float = 2.0,
        img_range: float = 1.0,
        upsampler: str = "pixelshuffledirect",
        resi_connection: str = "1conv",
        ape: bool = False,
        patch_norm: bool = True,
        attn_type: str = "Factored",
        img_size: Any = 64,
        patch_size: Any = 1,
        expansion_factor: Any = None,
    ) -> None:
        check_published(locals(), _PUBLISHED)
        check_sizes(upscale=upscale, in_chans=in_chans, embed_dim=embed_dim)
        require(attn_type in ATTN_TYPES, f"attn_type must be one of {', '.join(ATTN_TYPES)}", attn_type)
        windows = _windows(base_win_size, hier_win_ratios)
        check_stages(depths, num_heads)
        most = len(windows)
        require(max(depths) <= most, f"depths must be at most the number of hier_win_ratios ({most})", depths)
        require(embed_dim >= 16, "embed_dim must be at least 16, for position biases", embed_dim)
        for heads in num_heads:
            fits = embed_dim % (2 * heads) == 0
            require(fits, f"embed_dim must be a multiple of twice num_heads ({heads})", embed_dim)
        check_numbers(mlp_ratio=mlp_ratio, img_range=img_range)
        hidden = int(embed_dim * mlp_ratio)
        require(hidden >= 1, "mlp_ratio must leave at least one channel", mlp_ratio)
        super().__init__()
        self.upscale = upscale
        self.img_range = img_range
        mean = torch.tensor(_MEAN if in_chans == 3 else (0.0,) * in_chans)
        self.register_buffer("mean", mean[:, None, None], persistent=False)

        def stage(depth: int, heads: int) -> Stage:
            layers = [Correlation(embed_dim, heads, *sizes, attn_type) for sizes in windows[:depth]]
            blocks = [Block(layer, ConvMLP(embed_dim, hidden), embed_dim) for layer in layers]
            return Stage(blocks, embed_dim)

        self.conv_first = TokenConv(in_chans, embed_dim)
        self.patch_embed = nn.Sequential(OrderedDict(norm=nn.LayerNorm(embed_dim)))
        self.layers = nn.Sequential(*map(stage, depths, num_heads))
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = TokenConv(embed_dim, embed_dim)
        self.upsample = nn.Sequential(TokenConv(embed_dim, in_chans * upscale**2))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Upscale a batch of images."""
        x = (x - self.mean) * self.img_range
        features = self.conv_first(x.permute(0, 2, 3, 1))
        out = self.layers(self.patch_embed(features))
        out = self.conv_after_body(self.norm(out)) + features
        sr = F.pixel_shuffle(self.upsample(out).permute(0, 3, 1, 2), self.upscale)
        return sr / self.img_range + self.mean


def _windows(base: Sequence[int], ratios: Sequence[float]) -> list[tuple[Size, Size]]:
    """Give size and grid of each block's windows."""
    is_pair = isinstance(base, Sequence) and not isinstance(base, str) and len(base) == 2
    require(is_pair, "base_win_size must be a height and a width", base)
    check_sizes(**{f"base_win_size[{axis}]": side for axis, side in enumerate(base)})
    require(isinstance(ratios, Sequence), "hier_win_ratios must be numbers", ratios)
    check_numbers(**{f"hier_win_ratios[{index}]": ratio for index, ratio in enumerate(ratios)})
    windows = []
    for ratio in ratios:
        sides = [int(side * ratio) for side in base]
        grid = [min(pair) for pair in zip(sides, base, strict=True)]
        fits = min(sides) >= 1 and not any(side % cells for side, cells in zip(sides, grid, strict=True))
        require(fits, f"hier_win_ratios must give windows below {list(base)} or multiples of it", ratio)
        windows.append(((sides[0], sides[1]), (grid[0], grid[1])))
    return windows
