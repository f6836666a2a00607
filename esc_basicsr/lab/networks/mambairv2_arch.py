"""MambaIRv2-light. Source: MambaIRv2, CVPR 2025, arXiv:2411.15269; keys as in the authors' release."""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.validation import require
from esc_basicsr.lab.networks.checks import check_numbers, check_published, check_sizes, check_stages
from esc_basicsr.lab.networks.selective_scan import selective_scan

ROUTINGS = ("auto", "deterministic", "sampled")
# options that released files state and that have one value
_PUBLISHED: dict[str, object] = {"upsampler": "pixelshuffledirect", "resi_connection": "1conv"}
_PUBLISHED |= {"patch_size": 1, "qkv_bias": True, "patch_norm": True, "ape": False}
RGB_MEAN = (0.4488, 0.4371, 0.4040)
GATE_KERNEL = 5
INIT_STD = 0.02
# what keeps a shifted window's query from keys that were not its neighbours before the shift
MASKED = -100.0


def _mirror(x: Tensor, multiple: int) -> Tensor:
    """Pad at bottom and right until both sides are multiples of ``multiple``.

    The image is mirrored at its edge, the edge pixel repeated, as often as it takes.

    Shape:
        Input: (B, C, H, W), any H, W >= 1. Output: (B, C, H', W').
    """
    for axis in (2, 3):
        size = x.shape[axis]
        index = torch.arange(-(-size // multiple) * multiple, device=x.device) % (2 * size)
        x = x.index_select(axis, torch.minimum(index, 2 * size - 1 - index))
    return x


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Convolve (B, H, W, C)."""
    y: Tensor = conv(x.permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1)


def _without_decay(value: Tensor) -> nn.Parameter:
    """Make a parameter that bears mamba_ssm's mark of those that weight decay should leave alone."""
    parameter = nn.Parameter(value)
    parameter.__dict__["_no_weight_decay"] = True
    return parameter


def _gumbel_noise(like: Tensor) -> Tensor:
    """Draw standard Gumbel noise."""
    return -torch.empty_like(like).exponential_().log()


def position_index(window_size: int) -> Tensor:
    """Index the table of position biases by each pair of a query and a key: query minus key.

    Shape:
        Output: (w², w²), int64, queries by keys.
    """
    side = torch.arange(window_size)
    distance = side[:, None] - side + window_size - 1
    rows, columns = distance[:, None, :, None], distance[None, :, None, :]
    return (rows * (2 * window_size - 1) + columns).flatten(2).flatten(0, 1)


class WindowMHSA(nn.Module):
    """Softmax attention within windows, of queries, keys and values made before.

    Args:
        dim: Channels, a multiple of ``num_heads``.
        window_size: Side w of a window, even.
        num_heads: Attention heads.
        shift: Whether windows lie half a window off, the map being cyclic; pairs that only the cycle
            brought together are masked.

    Shape:
        qkv: (B, H, W, 3·dim), in the order (qkv, head, channel); H and W multiples of w.
        index: (w², w²), `position_index`. Output: (B, H, W, dim).
    """

    def __init__(self, dim: int, window_size: int, num_heads: int, shift: bool) -> None:
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.shift = shift
        self.relative_position_bias_table = _without_decay(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=INIT_STD)
        self.proj = nn.Linear(dim, dim)

    def forward(self, qkv: Tensor, index: Tensor) -> Tensor:
        """Attend within each window."""
        w, half = self.window_size, self.window_size // 2
        if self.shift:
            qkv = qkv.roll((-half, -half), (1, 2))
        bias = F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1).to(qkv.dtype)
        B, H, W, _ = qkv.shape
        # [B, (rows w), (columns w), (3 heads d)] -> [3, B, rows, columns, heads, (w w), d]
        qkv = qkv.view(B, H // w, w, W // w, w, 3, self.num_heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
        windows = qkv.flatten(5, 6)
        if self.shift:
            rows = ((windows[:, :, :-1], False), (windows[:, :, -1:], True))
            out = torch.cat([self._attend_row(row, bias, last_row) for row, last_row in rows], 1)
        else:
            out = self._attend(windows, bias)
        # [B, rows, columns, heads, (w w), d] -> [B, (rows w), (columns w), (heads d)]
        out = out.unflatten(4, (w, w)).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, -1)
        out = self.proj(out)
        return out.roll((half, half), (1, 2)) if self.shift else out

    def _attend_row(self, windows: Tensor, bias: Tensor, last_row: bool) -> Tensor:
        """Attend within shifted windows of some rows: only the last of rows and columns need a mask."""
        parts = ((windows[:, :, :, :-1], False), (windows[:, :, :, -1:], True))
        return torch.cat(
            [self._attend(part, bias + self._mask(last_row, last, bias)) for part, last in parts], 2
        )

    def _mask(self, last_row: bool, last_column: bool, like: Tensor) -> Tensor:
        """Make the mask (w², w²) of the windows that hold the seam between rows, between columns, or both."""
        beyond = (torch.arange(self.window_size, device=like.device) >= self.window_size // 2).long()
        region = (2 * last_row * beyond[:, None] + last_column * beyond).flatten()
        return MASKED * (region[:, None] != region).to(like.dtype)

    @staticmethod
    def _attend(windows: Tensor, bias: Tensor) -> Tensor:
        """Attend: [3, B, rows, columns, heads, (w w), d] -> [B, rows, columns, heads, (w w), d]."""
        q, k, v = windows.flatten(1, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return out.unflatten(0, windows.shape[1:4])


class SpatialGate(nn.Module):
    """Half of the channels multiply the other half, after a normalisation and a depthwise convolution.

    Shape:
        Input: (B, H, W, 2·dim). Output: (B, H, W, dim).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv2d(dim, dim, GATE_KERNEL, padding=GATE_KERNEL // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        x, gate = x.chunk(2, dim=-1)
        return x * _convolve(self.conv, self.norm(gate))


class GatedMLP(nn.Module):
    """Multilayer perceptron with a spatial gate on (B, H, W, dim); ``hidden`` channels are even."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.sg = SpatialGate(hidden // 2)
        self.fc2 = nn.Linear(hidden // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Expand, gate, and project back."""
        return self.fc2(self.sg(F.gelu(self.fc1(x))))


class SelectiveScan(nn.Module):
    """The state-space model: step, input and output matrices made from the input, and the scan.

    Shape:
        u, output: (B, n, dim). prompt, added to the output matrix: (B, n, d_state).
    """

    def __init__(self, dim: int, d_state: int) -> None:
        super().__init__()
        self.rank = math.ceil(dim / 16)
        self.d_state = d_state

        def uniform(*shape: int, bound: float) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        self.x_proj_weight = uniform(1, self.rank + 2 * d_state, dim, bound=dim**-0.5)
        self.dt_projs_weight = uniform(1, dim, self.rank, bound=self.rank**-0.5)
        # softplus of the bias, the first step, is spread log-uniformly
        step = torch.empty(1, dim).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_projs_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_logs = _without_decay(torch.arange(1.0, d_state + 1).log().repeat(dim, 1))
        self.Ds = _without_decay(torch.ones(dim))

    def forward(self, u: Tensor, prompt: Tensor) -> Tensor:
        """Scan."""
        sizes = (self.rank, self.d_state, self.d_state)
        r, B, C = F.linear(u, self.x_proj_weight[0]).split(sizes, -1)
        delta = F.linear(r, self.dt_projs_weight[0])
        A = -self.A_logs.to(torch.promote_types(u.dtype, torch.float32)).exp()
        return selective_scan(u, delta, A, B, C + prompt, self.Ds, self.dt_projs_bias[0])


class ASSM(nn.Module):
    """Attentive state-space module: pixels are scanned in the order of the token that each is given.

    A token's row of a learned dictionary is added to what reads the states. As in the release these rows
    stay in raster order while the pixels are sorted. Pixels of one token keep their raster order.

    Args:
        dim: Channels of input and output.
        hidden: Channels D of the scan.
        d_state: States of a channel.
        inner_rank: Rank of the dictionary.
        num_tokens: Its rows.
        routing: See `MambaIRv2Light`.

    Shape:
        Input, output: (B, H, W, dim). dictionary_factor: (inner_rank, d_state).
    """

    def __init__(
        self, dim: int, hidden: int, d_state: int, inner_rank: int, num_tokens: int, routing: str
    ) -> None:
        super().__init__()
        self.routing = routing
        self.selectiveScan = SelectiveScan(hidden, d_state)
        self.out_norm = nn.LayerNorm(hidden)
        self.out_proj = nn.Linear(hidden, dim)
        self.in_proj = nn.Sequential(nn.Conv2d(dim, hidden, 1))
        self.CPE = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden))
        self.embeddingB = nn.Embedding(num_tokens, inner_rank)
        nn.init.uniform_(self.embeddingB.weight, -1 / num_tokens, 1 / num_tokens)
        self.route = nn.Sequential(nn.Linear(dim, dim // 3), nn.GELU(), nn.Linear(dim // 3, num_tokens))

    def forward(self, x: Tensor, dictionary_factor: Tensor) -> Tensor:
        """Sort, scan, and put back."""
        B, H, W, _ = x.shape
        tokens, prompt = self._choose(x.flatten(1, 2), self.embeddingB.weight @ dictionary_factor)
        order = tokens.argsort(dim=1, stable=True)
        back = torch.empty_like(order).scatter_(1, order, torch.arange(H * W, device=x.device).expand(B, -1))
        v = _convolve(self.in_proj, x)
        v = v * torch.sigmoid(_convolve(self.CPE, v))
        y = self.selectiveScan(_reorder(v.flatten(1, 2), order), prompt)
        y = self.out_proj(self.out_norm(y))
        return _reorder(y, back).unflatten(1, (H, W))

    def _choose(self, x: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the token of each pixel, (B, n), and its row of the dictionary, (B, n, N).

        Gradients pass straight through the choice: to the dictionary as if the tokens were given, to the
        router as if the rows were averaged by the probabilities.
        """
        scores = self.route(x).log_softmax(-1)
        if self.routing == "sampled" or (self.routing == "auto" and self.training):
            scores = scores + _gumbel_noise(scores)
        tokens = scores.argmax(-1)
        prompt = F.embedding(tokens, dictionary)
        if torch.is_grad_enabled():
            p = scores.softmax(-1)
            prompt = prompt + (p - p.detach()) @ dictionary.detach().to(p.dtype)
        return tokens, prompt


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Give y[b, l] = x[b, order[b, l]]. ``x``: (B, n, C); ``order``: (B, n), permutations."""
    B, n, _ = x.shape
    rows = order + n * torch.arange(B, device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (B, n))


class AttentiveLayer(nn.Module):
    """Window attention, then the attentive state-space module, each with a gated MLP and a scaled skip.

    Shape:
        Input, output: (B, H, W, dim). index: `position_index`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        attention: WindowMHSA,
        d_state: int,
        inner_rank: int,
        num_tokens: int,
        routing: str,
    ) -> None:
        super().__init__()
        self.scale1 = nn.Parameter(torch.full((dim,), 1e-4))
        self.scale2 = nn.Parameter(torch.full((dim,), 1e-4))
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.wqkv = nn.Linear(dim, 3 * dim)
        self.win_mhsa = attention
        self.assm = ASSM(dim, hidden, d_state, inner_rank, num_tokens, routing)
        self.convffn1 = GatedMLP(dim, hidden)
        self.convffn2 = GatedMLP(dim, hidden)
        self.embeddingA = nn.Embedding(inner_rank, d_state)
        nn.init.uniform_(self.embeddingA.weight, -1 / inner_rank, 1 / inner_rank)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Mix within windows, then over the image."""
        y = x + self.win_mhsa(self.wqkv(self.norm1(x)), index)
        y = y + self.convffn1(self.norm2(y))
        x = y + self.scale1 * x
        z = x + self.assm(self.norm3(x), self.embeddingA.weight)
        z = z + self.convffn2(self.norm4(z))
        return z + self.scale2 * x


class ResidualGroup(nn.Module):
    """Layers, every other one with shifted windows, and a 3×3 convolution within a skip.

    Shape:
        Input, output: (B, H, W, dim).
    """

    def __init__(self, layers: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.residual_group = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Apply the layers in turn."""
        out = x
        for layer in self.residual_group["layers"].children():
            out = layer(out, index)
        return x + _convolve(self.conv, out)


class MambaIRv2Light(nn.Module):
    """Window attention and a state-space model that scans an image in the order of learned tokens.

    The defaults are the release's; the published light networks have ``depths`` and ``num_heads`` of four
    groups, [5, 5, 5, 5] and [4, 4, 4, 4], ``mlp_ratio`` 1.0 and ``upsampler`` pixelshuffledirect.

    Args:
        upscale: Scale of the output.
        in_chans: Channels of the image.
        img_range: What the image, its mean subtracted, is multiplied by.
        embed_dim: Feature channels.
        d_state: States of a channel in the scan.
        depths: Layers of each group.
        num_heads: Attention heads of each group.
        window_size: Side of an attention window, in LR pixels, even.
        inner_rank: Rank of the dictionary of tokens.
        num_tokens: Its rows.
        mlp_ratio: Channels of the scan and of the MLPs, per feature channel.
        upsampler, resi_connection, patch_size, qkv_bias, patch_norm, ape: As published; the release's other
            values are not implemented.
        routing: How a pixel's token is chosen. ``deterministic`` takes the most probable; ``sampled``
            draws one by its probability, so that no two outputs are alike: what the release does, in
            evaluation too; ``auto`` draws while training only.
        img_size, convffn_kernel_size, use_checkpoint: Stand in the release's option files; without effect,
            as there.

    Shape:
        Input: (B, in_chans, H, W), RGB in [0, 1], any B, H, W >= 1.
        Output: (B, in_chans, H·upscale, W·upscale), not clamped.

    Raises:
        ValueError: A value that is out of range, that does not go with another, or is not implemented.
    """

    mean: Tensor

    def __init__(
        self,
        upscale: int = 2,
        in_chans: int = 3,
        img_size: int = 64,
        img_range: float = 1.0,
        embed_dim: int = 48,
        d_state: int = 8,
        depths: Sequence[int] = (6, 6, 6, 6),
        num_heads: Sequence[int] = (4, 4, 4, 4),
        window_size: int = 16,
        inner_rank: int = 32,
        num_tokens: int = 64,
        mlp_ratio: float = 2.0,
        upsampler: str = "",
        convffn_kernel_size: int = 5,
        resi_connection: str = "1conv",
        patch_size: int = 1,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        ape: bool = False,
        use_checkpoint: bool = False,
        routing: str = "auto",
    ) -> None:
        check_published(locals(), _PUBLISHED)
        check_sizes(upscale=upscale, in_chans=in_chans, embed_dim=embed_dim, d_state=d_state)
        check_sizes(window_size=window_size, inner_rank=inner_rank, num_tokens=num_tokens)
        check_stages(depths, num_heads)
        for heads in num_heads:
            require(embed_dim % heads == 0, f"num_heads must divide embed_dim ({embed_dim})", heads)
        require(embed_dim >= 3, "embed_dim must be at least 3", embed_dim)
        require(window_size % 2 == 0, "window_size must be even", window_size)
        check_numbers(mlp_ratio=mlp_ratio, img_range=img_range)
        hidden = int(embed_dim * mlp_ratio)
        is_even = hidden >= 2 and hidden % 2 == 0
        require(is_even, f"mlp_ratio must make embed_dim ({embed_dim}) even", mlp_ratio)
        require(routing in ROUTINGS, f"routing must be one of {', '.join(ROUTINGS)}", routing)
        super().__init__()
        self.upscale = upscale
        self.img_range = img_range
        self.window_size = window_size
        mean = torch.tensor(RGB_MEAN) if in_chans == 3 else torch.zeros(in_chans)
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("relative_position_index_SA", position_index(window_size))
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)})
        mixing = (d_state, inner_rank, num_tokens, routing)

        def group(depth: int, heads: int) -> ResidualGroup:
            attention = [WindowMHSA(embed_dim, window_size, heads, shift=j % 2 == 1) for j in range(depth)]
            return ResidualGroup(
                [AttentiveLayer(embed_dim, hidden, a, *mixing) for a in attention], embed_dim
            )

        self.layers = nn.ModuleList(map(group, depths, num_heads))
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.upsample = nn.Sequential(nn.Conv2d(embed_dim, in_chans * upscale**2, 3, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Upscale a batch of images."""
        H, W = x.shape[-2:]
        x = (_mirror(x, self.window_size) - self.mean) * self.img_range
        feat = self.conv_first(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        out = self.patch_embed["norm"](feat)
        for group in self.layers:
            out = group(out, self.relative_position_index_SA)
        out = _convolve(self.conv_after_body, self.norm(out)) + feat
        sr = F.pixel_shuffle(self.upsample(out.permute(0, 3, 1, 2)), self.upscale)
        sr = sr / self.img_range + self.mean
        return sr[:, :, : H * self.upscale, : W * self.upscale]
