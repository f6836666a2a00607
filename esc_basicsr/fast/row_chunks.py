"""Working through a feature map in chunks of rows, where no gradients are recorded.

A layer that looks no further than some rows up and down gives the same result chunk by chunk, when each chunk
brings its neighbouring rows along. What lies between its operations is then as large as a chunk, not as the
map: it stays in the processor's cache, its memory is used again, and an image of any size needs no more than
the few maps that outlive a layer.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Pixels of a chunk over all of its columns. On a CPU a chunk should fit the cache; a GPU should be kept busy.
_CHUNK_PIXELS = {"cpu": 2**14}
_CHUNK_PIXELS_ELSEWHERE = 2**21
# Neighbouring rows are worked on twice: in chunks that are too low, most of the work would be.
_LEAST_ROWS = 16


def empty_map(size: Sequence[int], like: Tensor) -> Tensor:
    """Allocate a map of ``size``, (B, C, H, W), for values of ``like``'s kind; laid out channels last."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def rows_of_chunks(x: Tensor, multiple: int = 1) -> Iterator[slice]:
    """Yield the rows of each chunk of a map (B, C, H, W): a multiple of ``multiple``, but for the last.

    The last has at least ``multiple`` if the map has, so that a reflection at the bottom stays within it.
    """
    height = x.shape[-2]
    pixels = _CHUNK_PIXELS.get(x.device.type, _CHUNK_PIXELS_ELSEWHERE)
    rows = max(pixels // (x.shape[-1] * len(x)), _LEAST_ROWS)
    step = max(rows // multiple, 1) * multiple
    top = 0
    while top + step + multiple <= height:
        yield slice(top, top + step)
        top += step
    yield slice(top, height)


def overlapping_chunks(x: Tensor, halo: int = 1) -> Iterator[tuple[slice, Tensor, slice]]:
    """Yield each chunk of a map, (B, C, H, W): its rows, it with ``halo`` rows around, and its rows in that.

    The caller may overwrite a chunk's rows of ``x`` before taking the next: that one still sees them as they
    were.
    """
    before: Tensor | None = None
    for rows in rows_of_chunks(x):
        first = max(rows.start - halo, 0)
        above = x[:, :, first : rows.start]
        overwritten = above.clone()
        if before is not None:
            above.copy_(before)
        before = x[:, :, max(rows.stop - halo, 0) : rows.stop].clone()
        surrounded = x[:, :, first : rows.stop + halo]
        yield rows, surrounded, slice(rows.start - first, rows.stop - first)
        above.copy_(overwritten)


def map_in_chunks(layer: Callable[[Tensor], Tensor], x: Tensor, halo: int = 1) -> Tensor:
    """Compute ``layer(x)`` for a layer that sees ``halo`` rows up and down, and may enlarge.

    Shape:
        x: (B, C, H, W). Output: (B, C', H·s, W·s), laid out in memory as ``layer`` does.
    """
    if len(list(rows_of_chunks(x))) == 1:
        return layer(x)
    out: Tensor | None = None
    for rows, surrounded, inner in overlapping_chunks(x, halo):
        y = layer(surrounded)
        scale = y.shape[-1] // x.shape[-1]
        if out is None:
            size = (len(y), y.shape[1], x.shape[-2] * scale, y.shape[-1])
            out = y.new_empty(size) if y.is_contiguous() else empty_map(size, like=y)
        out[:, :, rows.start * scale : rows.stop * scale] = y[:, :, inner.start * scale : inner.stop * scale]
    assert out is not None
    return out


def add_in_chunks(x: Tensor, layer: Callable[[Tensor], Tensor], source: Tensor, multiple: int) -> Tensor:
    """Compute ``x + layer(source)``, chunk by chunk in ``x``'s place, which must be the caller's own.

    Args:
        x: What is added to.
        layer: Works on each group of ``multiple`` rows, counted from the top, alone; where ``source`` is
            padded, on these with the border above and below.
        source: The layer's input; may be ``x`` itself.
        multiple: Rows of a group.

    Shape:
        x, output: (B, C, H, W). source: (B, C', H, W), or with a border that the layer takes off.
    """
    more = source.shape[-2] - x.shape[-2]
    for rows in rows_of_chunks(x, multiple):
        x[:, :, rows] += layer(source[:, :, rows.start : rows.stop + more])
    return x
