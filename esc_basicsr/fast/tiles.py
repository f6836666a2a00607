"""Cutting what is too large for the memory into tiles.

ESC's windows lie on a grid; tiles begin and end on it, so that every window of a tile is one of the image.
A tile's surroundings, which are cut off the result, give its convolutions something to look at. Two things
still differ from the whole image: the dynamic kernels pool over a tile, and convolutions see no further than
the surroundings. docs/upscale.md has how much that is.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

_WINDOW = 32
MARGIN = 2  # windows around a tile
_LEAST_WINDOWS = 2  # of a tile's side: smaller ones would be little but margins


class Tile(NamedTuple):
    """A part of an image, in LR pixels: what the network sees, and what of its result is kept."""

    seen: tuple[slice, slice]  # rows, columns of the image
    kept: tuple[slice, slice]  # rows, columns of the image

    @property
    def kept_of_seen(self) -> tuple[slice, slice]:
        """Return the rows and columns that are kept, counted from where the tile begins."""
        rows, columns = (
            slice(kept.start - seen.start, kept.stop - seen.start)
            for kept, seen in zip(self.kept, self.seen, strict=True)
        )
        return rows, columns


def grid_of(network: nn.Module, options: Mapping[str, Any]) -> int:
    """Give the distance of a network's windows, in pixels of its input; 32 where its options have none.

    Args:
        network: Some make one pixel of their features of several.
        options: Its ``network_g``.
    """
    return options.get("window_size", _WINDOW) * getattr(network, "unshuffle", 1)


def tile_side(pixels: int, window: int) -> int:
    """Find the side of square tiles of at most so many pixels, margins included; two windows at least."""
    windows = int(pixels**0.5) // window - 2 * MARGIN
    return max(windows, _LEAST_WINDOWS) * window


def least_pixels(window: int) -> int:
    """Pixels of the smallest tile with its margins: the least that can be worked on."""
    return ((_LEAST_WINDOWS + 2 * MARGIN) * window) ** 2


def tiles(height: int, width: int, side: int, window: int, margin: int = MARGIN) -> Iterator[Tile]:
    """Tiles of an image, row by row.

    Args:
        height: Of the image, in LR pixels.
        width: Of the image, in LR pixels.
        side: Of the kept parts, a multiple of ``window``.
        window: Distance of the grid.
        margin: Windows around a tile.
    """
    for top in range(0, height, side):
        rows = slice(top, min(top + side, height))
        for left in range(0, width, side):
            columns = slice(left, min(left + side, width))
            seen = (_widened(rows, height, margin * window), _widened(columns, width, margin * window))
            yield Tile(seen, (rows, columns))


def run_in_tiles(
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    scale: int,
    side: int,
    window: int,
    margin: int = MARGIN,
) -> Tensor:
    """Upscale images tile by tile.

    Args:
        run: Upscales a part of them; of any type and number of channels, the same for every part.
        images: (N, C, H, W).
        scale: Upscaling factor.
        side: As `tiles` takes it.
        window: As `tiles` takes it.
        margin: As `tiles` takes it.

    Returns:
        (N, C, H·scale, W·scale), of the type of what ``run`` returns, on the CPU: a GPU may have no room.
    """
    *_, height, width = images.shape
    out: Tensor | None = None
    for tile in tiles(height, width, side, window, margin):
        sr = run(images[:, :, tile.seen[0], tile.seen[1]])
        if out is None:
            out = sr.new_empty(*sr.shape[:2], height * scale, width * scale, device="cpu")
        rows, columns = (_enlarged(part, scale) for part in tile.kept_of_seen)
        target_rows, target_columns = (_enlarged(part, scale) for part in tile.kept)
        out[:, :, target_rows, target_columns] = sr[:, :, rows, columns]
    assert out is not None
    return out


def _enlarged(part: slice, scale: int) -> slice:
    return slice(part.start * scale, part.stop * scale)


def _widened(part: slice, length: int, by: int) -> slice:
    return slice(max(part.start - by, 0), min(part.stop + by, length))
