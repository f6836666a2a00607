"""Likeness of the layers of a network: CKA of their features, cosine of their attention maps.

Sources: linear CKA, Kornblith et al., arXiv:1905.00414; its unbiased form summed over batches, Nguyen et al.,
arXiv:2010.15327. How attention maps are compared is ours: ESC (arXiv:2503.06671) names a cosine, and no more.

All statistics are in float64. Features are centred before anything is multiplied, since what is left of
products of uncentred ones is rounding; and where rows are pixels no matrix of rows by rows is made.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.lab.analysis.features import Values

# of unbiased HSIC, which divides by n - 3
LEAST_ROWS = 4
# what of a figure is rounding, relative to what it was made of
_ROUNDING = 1e-12
_ROWS_AT_ONCE = 2**13
_WEIGHTS_AT_ONCE = 2**21


def _hsic1(inner: Tensor, lengths: Tensor) -> Tensor:
    """Unbiased HSIC of each pair of layers.

    Args:
        inner: |XᵀY|² of each pair, centred: (layers, layers).
        lengths: Squared length of each row, centred: (n, layers).

    Raises:
        ValueError: There are fewer than 4 rows.
    """
    n = len(lengths)
    if n < LEAST_ROWS:
        raise ValueError(f"unbiased HSIC needs at least {LEAST_ROWS} rows, got {n}")
    # Of kernels with zeroed diagonals: rows of centred ones add up to 0, so that these add up to -lengths.
    products, sums = lengths.mT @ lengths, lengths.sum(0)
    trace = inner - products
    return (trace + sums.outer(sums) / ((n - 1) * (n - 2)) - 2 * products / (n - 2)) / (n * (n - 3))


def _check_varies(deviation: Tensor, largest: Tensor, name: str) -> None:
    if not deviation > _ROUNDING * largest:
        raise ValueError(f"{name}: its features are constant, or not finite")


class _CKA:
    """CKA of all pairs of layers, by minibatches: HSIC1 is summed over batches, and divided at the end."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._total = self._magnitude = torch.zeros(())

    def _add(self, inner: Tensor, lengths: Tensor) -> None:
        """Add a batch; arguments are those of `_hsic1`."""
        n = len(lengths)
        self._total = self._total + _hsic1(inner, lengths)
        self._magnitude = self._magnitude + inner.diagonal() / (n * (n - 3))

    def unbiased(self) -> Values:
        """Return Nguyen et al.'s minibatch CKA of each pair of layers.

        Σ HSIC1(K, L) / √(Σ HSIC1(K, K)·Σ HSIC1(L, L)).
        """
        own = self._total.diagonal()
        for name, value, magnitude in zip(self.names, own, self._magnitude, strict=True):
            if not value > _ROUNDING * magnitude:
                raise ValueError(f"{name}: unbiased HSIC of it with itself is 0, so that CKA is undefined")
        return (self._total / own.outer(own).sqrt()).cpu().numpy()


class PixelCKA(_CKA):
    """CKA of all pairs of layers, rows being pixels: biased of all pixels pooled, unbiased by batches."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._count = 0
        self._mean = self._moments = self._layers = torch.zeros(())

    def update(self, features: Sequence[Tensor]) -> None:
        """Add a batch, as an image is: features of each layer, (n, C), n at least 4.

        Raises:
            ValueError: There are fewer rows, or a layer's are constant.
        """
        widths = [x.shape[1] for x in features]
        mean = torch.cat([x.mean(0, dtype=torch.float64) for x in features])
        moments = mean.new_zeros(len(mean), len(mean))
        n, lengths = len(features[0]), []
        for start in range(0, n, _ROWS_AT_ONCE):
            rows = torch.cat([x[start : start + _ROWS_AT_ONCE].double() for x in features], 1) - mean
            moments += rows.mT @ rows
            lengths.append(torch.stack([part.square().sum(1) for part in rows.split(widths, 1)], 1))
        squares = torch.cat(lengths)
        for name, x, largest in zip(self.names, features, squares.amax(0).sqrt(), strict=True):
            _check_varies(largest, x.abs().max(), name)
        index = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
        self._layers = F.one_hot(index).to(mean)
        self._add(self._norms(moments), squares)
        # Pooled with those before by its own mean: Σxxᵀ - nμμᵀ would lose the digits that matter.
        total = self._count + n
        shift = mean - self._mean
        self._moments = self._moments + moments + shift.outer(shift) * (self._count * n / total)
        self._mean = self._mean + shift * (n / total)
        self._count = total

    def _norms(self, moments: Tensor) -> Tensor:
        """Compute |XᵀY|² of each pair of layers."""
        return self._layers.mT @ moments.square() @ self._layers

    def biased(self) -> Values:
        """Return linear CKA of each pair of layers, all pixels pooled: |YᵀX|² / (|XᵀX|·|YᵀY|)."""
        norms = self._norms(self._moments)
        own = norms.diagonal().sqrt()
        return (norms / own.outer(own)).cpu().numpy()


class ImageCKA(_CKA):
    """Minibatch CKA of all pairs of layers, rows being whole images, as Nguyen et al. take them."""

    def update(self, features: Sequence[Sequence[Tensor]]) -> None:
        """Add a batch of images, at least 4 of one size: features of each layer, of each image.

        Raises:
            ValueError: There are fewer, or a layer's are the same in all.
        """
        # Rows are few here, and long: their products are what is small.
        products = []
        for name, images in zip(self.names, features, strict=True):
            x = torch.stack([image.flatten() for image in images]).double()
            rows = x - x.mean(0)
            _check_varies(rows.abs().max(), x.abs().max(), name)
            products.append(rows @ rows.mT)
        kernels = torch.stack(products)
        flat = kernels.flatten(1)
        self._add(flat @ flat.mT, kernels.diagonal(dim1=1, dim2=2).mT)


class Statistic(NamedTuple):
    """One comparison of layers: matrices, (layers, layers); NaN where it is undefined."""

    pairs: Values
    uniform: Values | None = None  # of each layer's map with a uniform one, on the keys shared with another
    centred: Values | None = None  # of maps, after subtracting means


class WindowMaps(NamedTuple):
    """One layer's attention in one image.

    Windows begin ``shift`` pixels down and right of the image's corner; the last of a row or column reach
    round to its beginning, if there is a shift.
    """

    # after softmax, mean over heads: (rows, columns, w², w²), windows by queries by keys, pixels row by row
    weights: Tensor
    window: int  # side w
    shift: int  # in pixels, from 0 to w - 1

    @property
    def whole(self) -> Tensor:
        """The windows in which nothing is masked: (windows, w², w²)."""
        inner = self.weights[:-1, :-1] if self.shift else self.weights
        return inner.flatten(0, 1)


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two maps, of any one shape; NaN if one is 0."""
    a, b = a.double(), b.double()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def uniform_cosine(a: Tensor) -> float:
    """Return the cosine of a map with a uniform one."""
    return cosine(a, torch.ones_like(a))


def centred_cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two maps after subtracting each one's mean; NaN if one is uniform."""
    a, b = a.double(), b.double()
    a, b = (x - x.mean() if _varies(x) else torch.zeros_like(x) for x in (a, b))
    return cosine(a, b)


def _varies(x: Tensor) -> bool:
    return bool((x - x.mean()).square().sum() > _ROUNDING * x.square().sum())


def by_displacement(weights: Tensor, window: int) -> Tensor:
    """Average a map over pairs of a query and a key that are equally far apart.

    Shape:
        weights: (w², w²), queries by keys. Output: ((2w-1)²), by key minus query.
    """
    side = torch.arange(window, device=weights.device)
    distance = side - side[:, None] + window - 1
    index = (distance[:, None, :, None] * (2 * window - 1) + distance[None, :, None, :]).flatten()
    size = (2 * window - 1) ** 2
    total = weights.new_zeros(size).index_add_(0, index, weights.flatten())
    return total / torch.bincount(index, minlength=size)


class _Cells(NamedTuple):
    """A layer's attention by square cells of the image, of a size that divides all windows and shifts."""

    weights: Tensor  # (rows, columns, queries in a cell, cells of a window, keys in a cell)
    # for rows and for columns, the cells that a cell's window has: (rows or columns, cells of a side); below
    # 0 or beyond the last are those that a shifted window reaches round to, masked
    keys: tuple[Tensor, Tensor]


def _in_cells(maps: WindowMaps, cell: int) -> _Cells:
    rows, columns = maps.weights.shape[:2]
    side, shift = maps.window // cell, maps.shift // cell
    # [rows, columns, (qr y qc x), (kr i kc j)] -> [(rows qr), (columns qc), (y x), (kr kc), (i j)]
    split = maps.weights.view(rows, columns, *(side, cell) * 4).permute(0, 2, 1, 4, 3, 5, 6, 8, 7, 9)
    weights = split.reshape(rows * side, columns * side, cell**2, side**2, cell**2)
    row_keys, column_keys = (
        (cells - (cells - shift) % side)[:, None] + torch.arange(side, device=cells.device)
        for cells in (torch.arange(count * side, device=weights.device) for count in (rows, columns))
    )
    return _Cells(weights.roll((shift, shift), (0, 1)), (row_keys, column_keys))


def _common(a: Tensor, b: Tensor) -> Tensor:
    """Tell which cells two layers' windows share: (positions, cells of a's side, cells of b's)."""
    inside = (a >= 0) & (a < len(a))
    return ((a[:, :, None] == b[:, None, :]) & inside[:, :, None]).double()


class MapSimilarity:
    """Cosine of the attention maps of all pairs of layers, maps being means over heads."""

    def __init__(self, count: int) -> None:
        self._pixel = np.zeros((3, count, count))
        self._queries = 0
        self._totals: list[Tensor] = []
        self._windows: list[int] = []
        self._seen = [0] * count

    def update(self, maps: Sequence[WindowMaps]) -> None:
        """Add an image: maps of each layer, whose windows tile it.

        Raises:
            ValueError: A shifted layer has no window without a mask.
        """
        if not self._totals:
            self._windows = [layer.window for layer in maps]
            self._totals = [layer.weights.new_zeros(layer.weights.shape[2:]).double() for layer in maps]
        for index, layer in enumerate(maps):
            if not len(layer.whole):
                raise ValueError("every window is masked somewhere: the image needs two windows a side")
            self._totals[index] += layer.whole.sum(0, dtype=torch.float64)
            self._seen[index] += len(layer.whole)
        cell = math.gcd(*(number for layer in maps for number in (layer.window, layer.shift)))
        layers = [_in_cells(layer, cell) for layer in maps]
        rows, columns = layers[0].weights.shape[:2]
        self._queries += rows * columns * cell**2
        most = max(layer.weights[0].numel() for layer in layers)
        step = max(_WEIGHTS_AT_ONCE // most, 1)
        for start in range(0, rows, step):
            self._add_rows(layers, slice(start, start + step))

    def _add_rows(self, layers: Sequence[_Cells], rows: slice) -> None:
        weights = [layer.weights[rows].double() for layer in layers]
        squares = [layer.square().sum(-1) for layer in weights]
        sums = [layer.sum(-1) for layer in weights]
        for i, a in enumerate(layers):
            for j, b in enumerate(layers[: i + 1]):
                # [rows, columns, cells of a's window, cells of b's]
                shared = torch.einsum(
                    "rab,cde->rcadbe", _common(a.keys[0], b.keys[0])[rows], _common(a.keys[1], b.keys[1])
                )
                shared = shared.flatten(4, 5).flatten(2, 3)[:, :, None]
                product = (weights[i] @ weights[j].mT * shared).sum((-1, -2))
                keys = shared.sum((-1, -2)) * weights[i].shape[-1]
                (aa, sa), (bb, sb) = (
                    ((square * mask).sum(-1), (total * mask).sum(-1))
                    for square, total, mask in (
                        (squares[i], sums[i], shared.sum(-1)),
                        (squares[j], sums[j], shared.sum(-2)),
                    )
                )
                around_a, around_b = (
                    torch.where(variance > _ROUNDING * square, variance, torch.nan)
                    for variance, square in ((aa - sa**2 / keys, aa), (bb - sb**2 / keys, bb))
                )
                plain = product / (aa * bb).sqrt()
                centred = (product - sa * sb / keys) / (around_a * around_b).sqrt()
                uniform = (sa / (aa * keys).sqrt(), sb / (bb * keys).sqrt())
                for k, (upper, lower) in enumerate(((plain, plain), (centred, centred), uniform)):
                    self._pixel[k, i, j] += float(upper.sum())
                    if i != j:
                        self._pixel[k, j, i] += float(lower.sum())

    def pixel(self) -> Statistic:
        """Average over queries the cosines of their rows, on the keys that both layers' windows have."""
        pairs, centred, uniform = self._pixel / self._queries
        return Statistic(pairs, uniform, centred)

    def window_means(self) -> list[Tensor]:
        """Average each layer's map over images and over windows without a mask: (w², w²)."""
        return [total / seen for total, seen in zip(self._totals, self._seen, strict=True)]

    def displacement_means(self) -> list[Tensor]:
        """Average `window_means` by displacement: ((2w-1)²)."""
        return [by_displacement(*pair) for pair in zip(self.window_means(), self._windows, strict=True)]
