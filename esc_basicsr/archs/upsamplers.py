"""The ends of the real-world networks: from feature maps to an image of another scale.

Source: the ESC release (arXiv:2503.06671) and, for "transpose+conv", the community's trainer. Every layer
counts in the names of parameters: activations and shuffles must not leave their places.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.validation import require

__all__ = ["UPSAMPLERS", "DySample", "Upsampler", "nearest_upsampler"]

# In the order of the indices that checkpoints hold. The last two are the community's and are not built here.
UPSAMPLERS = (
    "conv",
    "pixelshuffledirect",
    "pixelshuffle",
    "nearest+conv",
    "dysample",
    "transpose+conv",
    "lda",
    "pa_up",
)
_GROUPS = 4  # of DySample


class DySample(nn.Module):
    """Sample the input at points that it chooses itself. Source: arXiv:2308.15085.

    Args:
        dim: Channels of the input, a multiple of ``groups``.
        out_channels: Channels of the output.
        scale: Upscaling factor.
        groups: Groups of channels, each with points of its own.

    Shape:
        Input: (B, dim, H, W). Output: (B, out_channels, H·scale, W·scale).
    """

    init_pos: Tensor

    def __init__(self, dim: int, out_channels: int, scale: int, groups: int = _GROUPS) -> None:
        require(dim % groups == 0, f"dysample needs channels that are a multiple of {groups}", dim)
        super().__init__()
        self.scale = scale
        self.groups = groups
        values = 2 * groups * scale**2
        self.end_conv = nn.Conv2d(dim, out_channels, 1)
        self.offset = nn.Conv2d(dim, values, 1)
        self.scope = nn.Conv2d(dim, values, 1, bias=False)
        nn.init.trunc_normal_(self.offset.weight, std=0.02)
        nn.init.zeros_(self.scope.weight)
        # A pixel's s² points, (x, y), at the centres of its s² parts.
        line = (torch.arange(scale) - (scale - 1) / 2) / scale
        points = torch.stack(torch.meshgrid(line, line, indexing="xy"))  # (2, s, s)
        self.register_buffer("init_pos", points.repeat(1, groups, 1).reshape(1, values, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Upscale ``x``."""
        sampled = F.grid_sample(self.grouped(x), self.points(x), padding_mode="border", align_corners=False)
        return self.end_conv(sampled.view(x.shape[0], -1, *sampled.shape[2:]).to(x.dtype))

    def grouped(self, x: Tensor) -> Tensor:
        """View what is sampled by groups: (B·groups, dim / groups, H, W), in float32 at least."""
        B, C, H, W = x.shape
        # Half precision cannot tell the pixels of a large image apart.
        precise = torch.promote_types(x.dtype, torch.float32)
        return x.reshape(B * self.groups, C // self.groups, H, W).to(precise)

    def points(self, x: Tensor) -> Tensor:
        """Choose where to sample: (B·groups, H·scale, W·scale, 2), (x, y) in [-1, 1] over the image."""
        B, _, H, W = x.shape
        offset = self.offset(x) * self.scope(x).sigmoid() * 0.5 + self.init_pos
        precise = torch.promote_types(x.dtype, torch.float32)
        offset = offset.to(precise).view(B, 2, -1, H, W)  # [B, (x, y), (group, point), H, W]
        # Tensors on ``x``'s device throughout, so that a recording serves every device.
        columns, rows = (x.new_ones(side, dtype=precise).cumsum(0) - 0.5 for side in (W, H))
        x_position = 2 * (columns + offset[:, 0]) / W - 1
        y_position = 2 * (rows[:, None] + offset[:, 1]) / H - 1
        # (B, g·s², H, W) twice -> (B·g, s·H, s·W, 2)
        shuffled = [F.pixel_shuffle(position, self.scale) for position in (x_position, y_position)]
        return torch.stack(shuffled, dim=-1).flatten(0, 1)


class Upsampler(nn.Sequential):
    """An upsampler by its name, as ESCRealM has it.

    Args:
        name: One of `UPSAMPLERS`.
        scale: Upscaling factor.
        dim: Channels of the input.
        out_channels: Channels of the output.
        mid_dim: Channels between, in ``pixelshuffle`` and ``dysample``.

    Shape:
        Input: (B, dim, H, W). Output: (B, out_channels, H·scale, W·scale).

    Raises:
        ValueError: A name that is unknown or not built here, or a scale that the upsampler does not have.
    """

    MetaUpsample: Tensor

    def __init__(self, name: str, scale: int, dim: int, out_channels: int, mid_dim: int) -> None:
        require(name in UPSAMPLERS[:-2], f"upsampler must be one of {', '.join(UPSAMPLERS[:-2])}", name)
        require(name != "conv" or scale == 1, "upsampler conv is for scale 1", scale)
        version = 3 if name == "transpose+conv" else 2
        meta = [version, UPSAMPLERS.index(name), scale, dim, out_channels, mid_dim, _GROUPS]
        require(max(meta) <= 255, "scale, dim, out_channels and mid_dim must be at most 255", meta[2:6])
        super().__init__(*_layers(name, scale, dim, out_channels, mid_dim))
        self.meta = meta
        self.register_buffer("MetaUpsample", torch.tensor(self.meta, dtype=torch.uint8))

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object, **kwargs: object
    ) -> None:
        # It also says who wrote the file, which is no weight: the network keeps its own.
        own = {f"{prefix}MetaUpsample": torch.tensor(self.meta, dtype=torch.uint8)}
        super()._load_from_state_dict({**state_dict, **own}, prefix, *args, **kwargs)


def nearest_upsampler(dim: int, out_channels: int) -> nn.Sequential:
    """Build ESCReal's own upsampler, of scale 4: nearest neighbours, each time with a convolution after it.

    Shape:
        Input: (B, dim, H, W). Output: (B, out_channels, 4·H, 4·W).
    """
    twice = [layer for _ in range(2) for layer in (nn.Upsample(scale_factor=2), _conv(dim, dim), _leaky())]
    return nn.Sequential(*twice, _conv(dim, dim), _leaky(), _conv(dim, out_channels))


def _layers(name: str, scale: int, dim: int, out_channels: int, mid_dim: int) -> list[nn.Module]:
    if scale == 1:
        return [_conv(dim, out_channels)]
    match name:
        case "pixelshuffledirect":
            return [_conv(dim, out_channels * scale**2), nn.PixelShuffle(scale)]
        case "dysample":
            head = [] if mid_dim == dim else [_conv(dim, mid_dim), nn.LeakyReLU(0.01)]
            return [*head, DySample(mid_dim, out_channels, scale)]
        case "pixelshuffle":
            layers = [_conv(dim, mid_dim), nn.LeakyReLU(0.01)]
            for factor in _factors(name, scale):
                layers += [_conv(mid_dim, factor**2 * mid_dim), nn.PixelShuffle(factor)]
            return [*layers, _conv(mid_dim, out_channels)]
        case "nearest+conv":
            layers = []
            for factor in _factors(name, scale):
                layers += [_conv(dim, dim), nn.Upsample(scale_factor=factor), _leaky()]
            return [*layers, _conv(dim, dim), _leaky(), _conv(dim, out_channels)]
        case _:
            return [*_transposed(scale, dim, out_channels), _conv(out_channels, out_channels)]


def _transposed(scale: int, dim: int, out_channels: int) -> list[nn.Module]:
    require(scale in (2, 3, 4), "upsampler transpose+conv has the scales 2, 3 and 4", scale)
    if scale == 3:
        return [nn.ConvTranspose2d(dim, out_channels, 3, 3)]
    last = nn.ConvTranspose2d(dim, out_channels, 4, 2, 1)
    return [last] if scale == 2 else [nn.ConvTranspose2d(dim, dim, 4, 2, 1), nn.GELU(), last]


def _factors(name: str, scale: int) -> list[int]:
    """Split a scale into the steps that are made one after the other."""
    is_power_of_two = scale & (scale - 1) == 0
    require(scale == 3 or is_power_of_two, f"upsampler {name} has scale 3 and the powers of 2", scale)
    return [3] if scale == 3 else [2] * (scale.bit_length() - 1)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def _leaky() -> nn.LeakyReLU:
    return nn.LeakyReLU(0.2)
