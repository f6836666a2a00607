"""ESCReal and ESCRealM without gradients: their skips and upsamplers go chunk by chunk, too."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from esc_basicsr.archs.esc_real_arch import ESCRealM
from esc_basicsr.archs.layers import pad_to_multiple, reflect_border
from esc_basicsr.archs.upsamplers import DySample
from esc_basicsr.fast.network import FastNetwork
from esc_basicsr.fast.row_chunks import add_in_chunks, empty_map, map_in_chunks, rows_of_chunks

__all__ = ["FastRealNetwork"]

# Rows that an upsampler sees up and down: 3×3 convolutions, two at most before it enlarges and one after each
# doubling, 1 + 1 + 1/2 + 1/4 + ... < 3. DySample sees all.
_HALO = 3


class FastRealNetwork(FastNetwork):
    """The fast implementation of `ESCReal` and `ESCRealM`; see `FastNetwork`."""

    net: ESCRealM

    def upscale(self, x: Tensor) -> Tensor:
        """Restore and upscale a batch of images, without gradients."""
        height, width = (side * self.net.upscaling_factor for side in x.shape[-2:])
        x = pad_to_multiple(x, self.net.unshuffle)
        out = _add_skip(self.features(x), self.net.skip, x)
        return _enlarge(self.net.to_img, out)[:, :, :height, :width]


def _add_skip(out: Tensor, skip: nn.Module, x: Tensor) -> Tensor:
    """Compute ``out + skip(x)`` in ``out``'s place.

    To reflect before the 1×1 convolution is to reflect after it, with fewer channels.
    """
    layers: list[Any] = list(skip.children())
    *first, conv, depthwise, activation, last = layers
    border = depthwise.kernel_size[0] // 2
    padded = reflect_border(nn.Sequential(*first)(x), border)

    def layer(chunk: Tensor) -> Tensor:
        mixed = F.conv2d(conv(chunk), depthwise.weight, depthwise.bias, groups=depthwise.groups)
        return last(activation(mixed))

    return add_in_chunks(out, layer, padded, multiple=1)


def _enlarge(to_img: nn.Module, x: Tensor) -> Tensor:
    *first, last = to_img if isinstance(to_img, nn.Sequential) else [to_img]
    if not isinstance(last, DySample):
        return map_in_chunks(to_img, x, _HALO)
    return _sample(last, map_in_chunks(nn.Sequential(*first), x))


def _sample(sampler: DySample, x: Tensor) -> Tensor:
    """Compute ``sampler(x)``, in chunks of the output's rows."""
    grouped, points = sampler.grouped(x), sampler.points(x)
    _, H, W, _ = points.shape
    out = empty_map((len(x), sampler.end_conv.out_channels, H, W), like=x)
    for rows in rows_of_chunks(out):
        sampled = F.grid_sample(grouped, points[:, rows], padding_mode="border", align_corners=False)
        sampled = sampled.reshape(len(x), -1, *sampled.shape[2:]).to(x.dtype)
        out[:, :, rows] = sampler.end_conv(sampled)
    return out
