"""Convolution with the large kernel, which is symmetric, by overlap-save in the real Fourier basis.

The kernel is equal to its own flips. On a tile that wraps around, such a kernel is diagonal in the real
Fourier basis but for the channels: the cosine and the sine of each frequency and direction are multiplied by
one real matrix, of in channels by out channels, the kernel's frequency response. So the tiles are taken to
that basis, mixed there, and taken back: exact but for rounding, and all of it matrix products, which a CPU
does best. What wraps around lies within half a kernel of a tile's border and is cut off (overlap-save).

For 13×13 taps and 16 channels this takes an eighth of the multiplications of the direct form.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.conv_attention import average_over_symmetries
from esc_basicsr.fast.precision import without_autocast

# below this size of kernel or of image the direct form is as fast
LEAST_KERNEL = 7
_LEAST_PIXELS = 48 * 48

_TILES_AT_ONCE = 24


# A kernel on tiles of one side: the orthonormal real Fourier basis of the side, (tile, tile), a vector a row;
# and the response, (tile, tile, in channels, out channels), by vertical and horizontal basis vector.
_Frequencies = tuple[Tensor, Tensor]


class SymmetricKernel:
    """A square kernel, averaged over its symmetries, ready to convolve with.

    Args:
        weight: (out channels, in channels, k, k), k odd; averaged over the 8 flips and quarter turns.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = average_over_symmetries(weight)
        self._by_tile: dict[int, _Frequencies] = {}

    def convolve(self, x: Tensor, directly: bool = False) -> Tensor:
        """Convolve with zero padding, without gradients.

        Args:
            x: The map.
            directly: Whether tiles would be slower, as where a processor's products cost next to nothing.

        Shape:
            x: (B, in channels, H, W). Output: (B, out channels, H, W).
        """
        size = self.weight.shape[-1]
        # Tiles pay on a CPU, which multiplications limit. Low precision needs the direct sums.
        is_exact = x.dtype in (torch.float32, torch.float64)
        pays = is_exact and x.device.type == "cpu" and size >= LEAST_KERNEL
        if directly or not (pays and x.shape[-2] * x.shape[-1] >= _LEAST_PIXELS):
            return F.conv2d(x, self.weight, padding=size // 2)
        with without_autocast(x.device):
            tile = best_tile(*x.shape[-2:], size, x.shape[1])
            if tile not in self._by_tile:
                self._by_tile[tile] = _frequencies(self.weight.to(x.dtype), tile)
            return _convolve_tiles(x, self._by_tile[tile], size)


@functools.cache
def best_tile(height: int, width: int, size: int, channels: int) -> int:
    """Find the even side of tiles that costs least: multiplications, and memory traffic beside them."""

    def cost(tile: int) -> float:
        kept = tile - size + 1
        tiles = -(-height // kept) * -(-width // kept)
        transforms = tile * (2 + kept / tile + (kept / tile) ** 2)
        return tiles * tile**2 * channels * (transforms + channels + 60)

    return min(range(size + 11, size + 76, 4), key=cost)


def _frequencies(weight: Tensor, tile: int) -> _Frequencies:
    """Build the basis of an even side ``tile`` and the frequency response of ``weight`` in it."""
    device, exact = weight.device, torch.float64
    position = torch.arange(tile, dtype=exact, device=device)
    frequency = (position + 1).div(2, rounding_mode="floor")
    phase = 2 * math.pi * frequency[:, None] * position / tile
    # 1; then a cosine and a sine of each frequency; last the cosine that alternates
    is_cosine = position[:, None] % 2 == 1
    basis = torch.where(is_cosine, phase.cos(), phase.sin()) * math.sqrt(2 / tile)
    basis[0] = math.sqrt(1 / tile)
    basis[-1] /= math.sqrt(2)
    size = weight.shape[-1]
    offset = torch.arange(size, dtype=exact, device=device) - size // 2
    cosines = (2 * math.pi * frequency[:, None] * offset / tile).cos().to(weight.dtype)
    # [out, in, ky, kx] -> [u, v, in, out]
    response = (cosines @ weight @ cosines.T).permute(2, 3, 1, 0).contiguous()
    return basis.to(weight.dtype), response


def _convolve_tiles(x: Tensor, frequencies: _Frequencies, size: int) -> Tensor:
    B, _, H, W = x.shape
    basis, response = frequencies
    T, margin = len(basis), size // 2
    kept = T - 2 * margin
    columns = -(-W // kept)
    out = x.new_empty(B, H, W, response.shape[-1])
    # in bands of tiles: what they need meanwhile stays in the cache
    band = max(1, _TILES_AT_ONCE // columns) * kept
    for image, target in zip(x.permute(0, 2, 3, 1), out, strict=True):
        for top in range(0, H, band):
            bottom = min(top + band, H)
            rows = -(-(bottom - top) // kept)
            first, last = max(top - margin, 0), min(top + rows * kept + margin, H)
            left_right = (margin, columns * kept + margin - W)
            top_bottom = (margin - top + first, top + rows * kept + margin - last)
            padded = F.pad(image[first:last], (0, 0, *left_right, *top_bottom))
            convolved = _convolve_band(padded, frequencies, rows, columns, margin)
            target[top:bottom] = convolved[: bottom - top, :W]
    return out.permute(0, 3, 1, 2)


def _convolve_band(x: Tensor, frequencies: _Frequencies, rows: int, columns: int, margin: int) -> Tensor:
    """Convolve (H, W, C) with its margins, in rows × columns tiles."""
    basis, response = frequencies
    T, C = len(basis), x.shape[-1]
    kept = T - 2 * margin
    # [H, W, C] -> [T, rows, W, C]: a tile's lines come first, to be one matrix product
    x = x.unfold(0, T, kept).permute(3, 0, 1, 2).reshape(T, -1)
    x = (basis @ x).view(T, rows, -1, C)
    # [u, rows, W, C] -> [u, rows, columns, v, C] -> [u, v, (rows columns), C]
    x = torch.matmul(basis, x.unfold(2, T, kept).permute(0, 1, 2, 4, 3))
    x = x.view(T, rows * columns, T, C).transpose(1, 2)
    mixed = x.new_empty(T, T, rows * columns, response.shape[-1])
    for at_u, response_u, mixed_u in zip(x, response, mixed, strict=True):
        torch.bmm(at_u, response_u, out=mixed_u)
    inner = basis[:, margin : margin + kept].T
    x = torch.matmul(inner, mixed.view(T, T, -1))  # [u, x, (rows columns C)]
    x = (inner @ x.view(T, -1)).view(kept, kept, rows, columns, -1)
    # [y, x, rows, columns, C] -> [(rows y), (columns x), C]
    return x.permute(2, 0, 3, 1, 4).reshape(rows * kept, columns * kept, -1)
