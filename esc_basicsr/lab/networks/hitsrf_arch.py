"""HiT-SRF. Source: HiT-SR: Hierarchical Transformer for Efficient Image Super-Resolution, ECCV 2024.

Options and keys are the release's. Tokens are laid out channels last: (B, H, W, C).
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.utils.checkpoint import checkpoint

from esc_basicsr.archs.validation import check_flags, require
from esc_basicsr.fast.network import is_plain_inference
from esc_basicsr.fast.precision import without_autocast

__all__ = ["ATTN_TYPES", "HiT_SRF"]

ATTN_TYPES = ("auto", "Naive", "Factored")

# mean colour of DIV2K, RGB
_MEAN = (0.4488, 0.4371, 0.4040)

Size = tuple[int, int]  # height, width
Biases = list[list[Tensor]]  # of each stage's blocks


class DropPath(nn.Module):
    """Stochastic depth: while training, each sample loses this branch with a probability of ``rate``.

    Shape:
        Input, output: (B, H, W, C).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop the branch, or make up for where it is dropped."""
        if not self.training or self.rate == 0:
            return x
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - self.rate).div_(1 - self.rate)


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
        """Mean over each cell's pixels of what the network makes of query minus key."""
        with without_autocast(self.pos_proj.weight.device):
            return self._means()

    def _means(self) -> Tensor:
        (wh, ww), (bh, bw) = self.window, self.grid
        sh, sw = wh // bh, ww // bw
        like = self.pos_proj.weight
        sides = [torch.arange(1 - side, side, dtype=like.dtype, device=like.device) for side in self.window]
        offsets = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)
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
        drop_rate: Dropout of the output.
        value_drop_rate: Dropout of values.

    Shape:
        Input, output: (B, H, W, dim), H and W multiples of the window's.
    """

    same_head: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Size,
        grid: Size,
        attn_type: str,
        drop_rate: float,
        value_drop_rate: float,
    ) -> None:
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
        self.drop = nn.Dropout(drop_rate)
        self.value_drop = nn.Dropout(value_drop_rate)
        head = torch.arange(dim // 2) // (dim // 2 // num_heads)
        self.register_buffer("same_head", (head[:, None] == head).float(), persistent=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Correlate within each window; ``bias`` is what ``pos`` gives."""
        B, H, W, C = x.shape
        wh, ww = self.window
        rows, columns = H // wh, W // ww
        qv = self.qv(x).reshape(B, rows, wh, columns, ww, C)
        # [B, rows, wh, columns, ww, C] -> [(B rows columns), (wh ww), C]
        q, v = qv.transpose(2, 3).reshape(-1, wh * ww, C).chunk(2, -1)
        out = self.proj(torch.cat([self._spatial(q, v, bias), self._channel(q, v)], -1))
        out = out.reshape(B, rows, columns, wh, ww, C).transpose(2, 3).reshape(B, H, W, C)
        return self.drop(out)

    def _spatial(self, q: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        (bh, bw), (sh, sw) = self.grid, self.cell
        # [N, (bh sh bw sw), C/2] -> [N, (bh bw), C/2, (sh sw)]
        cells = v.reshape(-1, bh, sh, bw, sw, v.shape[-1]).permute(0, 1, 3, 5, 2, 4)
        keys = self.spatial_linear(cells.reshape(-1, bh * bw, v.shape[-1], sh * sw)).squeeze(-1)
        keys = keys.flip(1)  # as the bias has them
        values = self.value_drop(keys)
        # Traced are operations that are counted: the published ones.
        is_naive = self.attn_type == "Naive" or (self.attn_type == "auto" and is_tracing())
        return (self._by_scores if is_naive else self._by_factors)(q, keys, values, bias)

    def _by_scores(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """``(q @ keys.T / d + bias) @ values``, the scores written out."""
        # [N, ..., (heads d)] -> [N, heads, ..., d]
        q, keys, values = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, keys, values))
        scores = q @ keys.transpose(-2, -1) / q.shape[-1] + bias
        return (scores @ values).transpose(1, 2).flatten(2)

    def _by_factors(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """The same as ``q @ (keys.T @ values) / d + bias @ values``, where nothing is as large as scores."""
        N, heads = len(q), self.num_heads
        d = q.shape[-1] // heads
        factor = keys.transpose(1, 2) @ values * (self.same_head / d)
        # [N, cells, (heads d)] -> [heads, cells, (N d)]
        values = values.unflatten(-1, (heads, d)).permute(2, 1, 0, 3).reshape(heads, -1, N * d)
        # [heads, L, (N d)] -> [N, L, (heads d)]
        biased = (bias @ values).unflatten(-1, (N, d)).permute(2, 1, 0, 3).flatten(2)
        return torch.baddbmm(biased, q, factor)

    def _channel(self, q: Tensor, v: Tensor) -> Tensor:
        correlation = v.transpose(1, 2) @ q / q.shape[1]
        return self.value_drop(v) @ correlation


class ConvMLP(nn.Module):
    """Feed-forward network with a depthwise 5×5 convolution between its linear layers.

    Args:
        dim: Channels of input and output.
        hidden: Channels between them.
        drop_rate: Dropout before and after the second linear layer.

    Shape:
        Input, output: (B, H, W, dim).
    """

    def __init__(self, dim: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        conv = TokenConv(hidden, hidden, 5, groups=hidden)
        self.dwconv = nn.Sequential(OrderedDict(depthwise_conv=nn.Sequential(conv, nn.GELU())))
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Expand, mix neighbours, and reduce."""
        x = F.gelu(self.fc1(x))
        return self.drop(self.fc2(self.drop(x + self.dwconv(x))))


class Block(nn.Module):
    """Correlation within windows and a feed-forward network, each normalised before it is added.

    Shape:
        Input, output: (B, H, W, dim), any H, W >= 1.
    """

    def __init__(self, correlation: Correlation, mlp: ConvMLP, dim: int, drop_path_rate: float) -> None:
        super().__init__()
        self.correlation = correlation
        self.mlp = mlp
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Add both branches in turn; ``bias`` is what the correlation's ``pos`` gives."""
        H, W = x.shape[1:3]
        out = self.correlation(_pad(x, self.correlation.window), bias)[:, :H, :W]
        x = x + self.drop_path(self.norm1(out))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class Stage(nn.Module):
    """Blocks and a convolution, with a residual connection around them.

    Shape:
        Input, output: (B, H, W, dim).
    """

    def __init__(self, blocks: Sequence[Block], dim: int, use_checkpoint: bool) -> None:
        super().__init__()
        self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.conv = TokenConv(dim, dim)
        self.use_checkpoint = use_checkpoint

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks, in order."""
        return cast(Sequence[Block], self.residual_group["blocks"])

    def forward(self, x: Tensor, biases: Sequence[Tensor]) -> Tensor:
        """Pass through the blocks, each with its bias, and add."""
        out = x
        for block, bias in zip(self.blocks, biases, strict=True):
            if self.use_checkpoint and torch.is_grad_enabled():
                out = checkpoint(block, out, bias, use_reentrant=False)
            else:
                out = block(out, bias)
        return x + self.conv(out)


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
        upsampler: ``pixelshuffledirect``, the one published.
        resi_connection: ``1conv``, the one published.
        ape: False, as published.
        patch_norm: True, as published.
        use_checkpoint: Whether training computes blocks a second time rather than to keep what is in them.
        drop_rate: Dropout.
        value_drop_rate: Dropout of the values in attention.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0.
        attn_type: How spatial attention is computed, which changes speed and memory, not results: ``Naive``
            writes the scores out, as the release does; ``Factored`` never does (without a softmax queries can
            meet keys times values); ``auto`` is that, but for what `torch.jit.trace` sees, so that operations
            are counted as published.
        img_size: Without effect, as in the release.
        patch_size: Without effect.
        expansion_factor: Without effect: released option files have it, but ``mlp_ratio`` rules.

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
        use_checkpoint: bool = False,
        drop_rate: float = 0.0,
        value_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_type: str = "auto",
        img_size: Any = 64,
        patch_size: Any = 1,
        expansion_factor: Any = None,
    ) -> None:
        _check_sizes(upscale=upscale, in_chans=in_chans, embed_dim=embed_dim)
        for key, got, only in (
            ("upsampler", upsampler, "pixelshuffledirect"),
            ("resi_connection", resi_connection, "1conv"),
            ("ape", ape, False),
            ("patch_norm", patch_norm, True),
        ):
            require(got == only, f"{key} must be {only}, the published one", got)
        check_flags(use_checkpoint=use_checkpoint)
        require(attn_type in ATTN_TYPES, f"attn_type must be one of {', '.join(ATTN_TYPES)}", attn_type)
        windows = _windows(base_win_size, hier_win_ratios)
        _check_stages(embed_dim, depths, num_heads, len(windows))
        for key, value in (("mlp_ratio", mlp_ratio), ("img_range", img_range)):
            require(_is_number(value) and value > 0, f"{key} must be a number above 0", value)
        hidden = int(embed_dim * mlp_ratio)
        require(hidden >= 1, "mlp_ratio must leave at least one channel", mlp_ratio)
        rates = {"drop_rate": drop_rate, "value_drop_rate": value_drop_rate, "drop_path_rate": drop_path_rate}
        for key, value in rates.items():
            require(_is_number(value) and 0 <= value < 1, f"{key} must be at least 0 and below 1", value)
        super().__init__()
        # Position biases, and the weights that they are made of. These are compared by value: what changes
        # them through `.data`, as BasicSR's EMA does, leaves no other trace.
        self._kept: tuple[Tensor, Biases] | None = None
        self.upscale = upscale
        self.img_range = img_range
        mean = torch.tensor(_MEAN if in_chans == 3 else (0.0,) * in_chans)
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        last = max(sum(depths) - 1, 1)

        def block(heads: int, number: int, index: int) -> Block:
            window, grid = windows[index]
            return Block(
                Correlation(embed_dim, heads, window, grid, attn_type, drop_rate, value_drop_rate),
                ConvMLP(embed_dim, hidden, drop_rate),
                embed_dim,
                drop_path_rate * number / last,
            )

        self.conv_first = TokenConv(in_chans, embed_dim)
        self.patch_embed = nn.Sequential(OrderedDict(norm=nn.LayerNorm(embed_dim)))
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList(
            Stage(
                [block(heads, sum(depths[:stage]) + index, index) for index in range(depth)],
                embed_dim,
                use_checkpoint,
            )
            for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True))
        )
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
        out = self.pos_drop(self.patch_embed(features))
        for stage, biases in zip(self.layers, self._position_biases(), strict=True):
            out = stage(out, biases)
        out = self.conv_after_body(self.norm(out)) + features
        sr = F.pixel_shuffle(self.upsample(out).permute(0, 3, 1, 2), self.upscale)
        return sr / self.img_range + self.mean

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but what can be made again."""
        return {**self.__dict__, "_kept": None}

    def _position_biases(self) -> Biases:
        """Each stage's biases, one for each block; kept for inference until the weights are others."""
        stages = cast(Sequence[Stage], self.layers)
        networks = [[block.correlation.pos for block in stage.blocks] for stage in stages]
        if not is_plain_inference() or _is_recorded(self.mean.device):
            return [[pos() for pos in stage] for stage in networks]
        weights = torch.cat([weight.flatten() for pos in chain(*networks) for weight in pos.parameters()])
        if self._kept is None or not _equal(self._kept[0], weights):
            self._kept = weights, [[pos() for pos in stage] for stage in networks]
        return self._kept[1]


def _is_recorded(device: torch.device) -> bool:
    """Whether operations go into a CUDA graph, where none can be waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.device, a.dtype) == (b.device, b.dtype) and torch.equal(a, b)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_sizes(**sizes: Any) -> None:
    for name, value in sizes.items():
        is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(is_size, f"{name} must be an integer of at least 1", value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _windows(base: Sequence[int], ratios: Sequence[float]) -> list[tuple[Size, Size]]:
    """Size and grid of each block's windows."""
    require(_is_list(base) and len(base) == 2, "base_win_size must be a height and a width", base)
    _check_sizes(**dict(zip(("base_win_size[0]", "base_win_size[1]"), base, strict=True)))
    require(_is_list(ratios) and all(map(_is_number, ratios)), "hier_win_ratios must be numbers", ratios)
    windows = []
    for ratio in ratios:
        sides = [int(side * ratio) for side in base]
        grid = [min(pair) for pair in zip(sides, base, strict=True)]
        fits = min(sides) >= 1 and not any(side % cells for side, cells in zip(sides, grid, strict=True))
        require(fits, f"hier_win_ratios must give windows below {list(base)} or multiples of it", ratio)
        windows.append(((sides[0], sides[1]), (grid[0], grid[1])))
    return windows


def _check_stages(dim: int, depths: Sequence[int], num_heads: Sequence[int], most: int) -> None:
    """Check that stages are described alike, and that features can be split."""
    for name, values in (("depths", depths), ("num_heads", num_heads)):
        require(_is_list(values) and len(values) > 0, f"{name} must list a number for each stage", values)
        _check_sizes(**{f"{name}[{stage}]": value for stage, value in enumerate(values)})
    require(len(depths) == len(num_heads), f"num_heads must be as many as depths ({len(depths)})", num_heads)
    require(max(depths) <= most, f"depths must be at most the number of hier_win_ratios ({most})", depths)
    require(dim >= 16, "embed_dim must be at least 16, for position biases", dim)
    for heads in num_heads:
        require(dim % (2 * heads) == 0, f"embed_dim must be a multiple of twice num_heads ({heads})", dim)
