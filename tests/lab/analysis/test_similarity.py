"""CKA and HSIC are the specification's, whatever the route; maps are compared where windows overlap."""

import numpy as np
import pytest
import torch

from esc_basicsr.lab.analysis.similarity import (
    ImageCKA,
    MapSimilarity,
    PixelCKA,
    WindowMaps,
    by_displacement,
    centred_cosine,
    cosine,
    uniform_cosine,
)

X = torch.tensor([[1.0, 2, 0], [0, 1, 1], [2, 0, 1], [1, 1, 3], [3, 2, 1]])
Y = torch.tensor([[0.0, 1, 2], [1, 0, 1], [2, 2, 0], [1, 3, 1], [0, 1, 4]])
A = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
B = torch.tensor([[0.4, 0.4, 0.2], [0.3, 0.5, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)


def linear_cka(x, y) -> float:
    """Linear CKA by its definition, columns centred: |YᵀX|² / (|XᵀX|·|YᵀY|)."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    cross, own, other = ((a.mT @ b).square().sum() for a, b in ((y, x), (x, x), (y, y)))
    return float(cross / (own * other).sqrt())


def oracle(x, y) -> float:
    """HSIC1 by its definition: kernels of rows by rows, their diagonals zeroed, nothing centred."""
    x, y = x.double().numpy(), y.double().numpy()
    K, L = x @ x.T, y @ y.T
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    n = len(x)
    one = np.ones(n)
    trace, product = np.trace(K @ L), one @ K @ L @ one
    mean = K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * product / (n - 2)
    return (trace + mean) / (n * (n - 3))


def layers(rows: int, *, mean: float = 0.0) -> list[torch.Tensor]:
    """Three layers of different width, of which the second depends on the first."""
    noise = torch.randn(rows, 9, dtype=torch.float64)
    first = noise[:, :4]
    return [first + mean, first @ torch.randn(4, 3, dtype=torch.float64) + noise[:, 4:7], noise[:, 7:] + mean]


def pooled(*batches) -> PixelCKA:
    cka = PixelCKA(["one", "two", "three"][: len(batches[0])])
    for batch in batches:
        cka.update(batch)
    return cka


def test_cka_of_the_specification():
    assert linear_cka(X, Y) == pytest.approx(0.6049357266, abs=1e-10)
    assert linear_cka(X, X * torch.tensor([1.0, 2, 3])) == pytest.approx(0.7935505838, abs=1e-10)
    cka = pooled([X, Y])
    np.testing.assert_allclose(cka.biased(), [[1, 0.6049357266], [0.6049357266, 1]], atol=1e-10)
    np.testing.assert_allclose(cka.unbiased(), [[1, 0.0973308036], [0.0973308036, 1]], atol=1e-10)


def test_hsic_of_the_specification():
    for x, y, expected in ((X, Y, 1 / 3), (X, X, 26 / 15), (Y, Y, 203 / 30)):
        assert oracle(x, y) == pytest.approx(expected, abs=1e-12)


def test_cka_does_not_see_rotation_scale_and_shift():
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    for same in (Y.double() @ rotation, 3.5 * Y, Y + torch.tensor([4.0, -1, 100])):
        cka = pooled([X.double(), same.double()])
        assert cka.biased()[0, 1] == pytest.approx(0.6049357266, abs=1e-9)
        assert cka.unbiased()[0, 1] == pytest.approx(0.0973308036, abs=1e-9)


def test_identity_with_itself_has_biased_cka_only():
    identity = torch.eye(5)
    assert linear_cka(identity, identity) == pytest.approx(1)
    cka = pooled([identity, identity])
    assert cka.biased()[0, 1] == pytest.approx(1)
    with pytest.raises(ValueError, match="one: unbiased HSIC of it with itself is 0"):
        cka.unbiased()


def test_batches_are_summed_and_then_divided():
    batches = [layers(rows, mean=3.0) for rows in (6, 11, 4)]
    cka = pooled(*batches)
    whole = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    sums = np.array([[sum(oracle(b[i], b[j]) for b in batches) for j in range(3)] for i in range(3)])
    own = np.sqrt(sums.diagonal())
    np.testing.assert_allclose(cka.unbiased(), sums / np.outer(own, own), atol=1e-10)
    expected = [[linear_cka(x, y) for y in whole] for x in whole]
    np.testing.assert_allclose(cka.biased(), expected, atol=1e-12)


def test_rows_taken_in_parts_are_the_same(monkeypatch):
    batch = layers(23)
    expected = pooled(batch)
    monkeypatch.setattr("esc_basicsr.lab.analysis.similarity._ROWS_AT_ONCE", 5)
    parts = pooled(batch)
    np.testing.assert_allclose(parts.biased(), expected.biased(), atol=1e-13)
    np.testing.assert_allclose(parts.unbiased(), expected.unbiased(), atol=1e-13)


def test_a_large_mean_costs_no_digits():
    x, y, _ = layers(50)
    far = [(x + 1e4).float(), (y - 1e4).float()]
    assert pooled(far).biased()[0, 1] == pytest.approx(linear_cka(x, y), abs=1e-3)
    # Uncentred, float32 loses the sign of HSIC1(K, K); with mean 10 and deviation 0.01 in 2 of 5 trials.
    for _ in range(20):
        pair = [(10 + 0.01 * torch.randn(16, 60, dtype=torch.float64)).float() for _ in range(2)]
        x, y = (z.double() - 10 for z in pair)
        expected = oracle(x, y) / np.sqrt(oracle(x, x) * oracle(y, y))
        assert pooled(pair).unbiased()[0, 1] == pytest.approx(expected, abs=1e-5)


def test_unbiased_cka_of_few_independent_rows_is_near_zero():
    found = []
    for _ in range(20):
        pair = [torch.randn(16, 960), torch.randn(16, 960)]
        cka = ImageCKA(["one", "two"])
        cka.update([list(rows) for rows in pair])
        found.append(cka.unbiased()[0, 1])
        assert linear_cka(*pair) > 0.97
    assert abs(np.mean(found)) < 0.15


def test_whole_images_as_rows_are_the_same_statistic():
    batches = [layers(5), layers(7)]
    images = ImageCKA(["one", "two", "three"])
    for batch in batches:
        images.update([[row.view(1, 1, -1) for row in x] for x in batch])
    np.testing.assert_allclose(images.unbiased(), pooled(*batches).unbiased(), atol=1e-12)


def test_what_has_no_cka_is_refused():
    with pytest.raises(ValueError, match="at least 4 rows, got 3"):
        pooled([X, Y], [X[:3], Y[:3]])
    constant = torch.full((5, 2), 0.1)
    for bad in (constant, X * torch.nan):
        with pytest.raises(ValueError, match="two: its features are constant, or not finite"):
            pooled([X, bad])
    with pytest.raises(ValueError, match="one: its features are constant"):
        ImageCKA(["one"]).update([list(constant)])


def test_cosines_of_the_specification():
    assert cosine(A, B) == pytest.approx(0.9685858235, abs=1e-10)
    assert uniform_cosine(A) == pytest.approx(0.8219949365, abs=1e-10)
    assert uniform_cosine(B) == pytest.approx(0.9205746178, abs=1e-10)
    assert centred_cosine(A, B) == pytest.approx(0.9525793444, abs=1e-10)
    assert np.isnan(centred_cosine(A, torch.full_like(A, 0.1)))


def dense(maps: WindowMaps) -> torch.Tensor:
    """Attention of each pixel of the image to each, (H·W, H·W); NaN where they are in no common window."""
    rows, columns = maps.weights.shape[:2]
    w, s = maps.window, maps.shift
    height, width = rows * w, columns * w
    whole = torch.full((height * width, height * width), torch.nan, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            places = [(s + r * w + y, s + c * w + x) for y in range(w) for x in range(w)]
            index = torch.tensor([y % height * width + x % width for y, x in places])
            seams = torch.tensor([(y >= height) + 2 * (x >= width) for y, x in places])
            block = maps.weights[r, c].double().masked_fill(seams[:, None] != seams, torch.nan)
            whole[index[:, None], index] = block
    return whole


def random_maps(window: int, shift: int, rows: int = 3, columns: int = 4) -> WindowMaps:
    scores = torch.randn(rows, columns, window**2, window**2)
    return WindowMaps(scores.softmax(-1), window, shift)


PAIRS = [
    (random_maps(4, 0), random_maps(4, 2)),  # quadrants
    (random_maps(4, 2), random_maps(4, 2)),  # whole windows, some masked
    (random_maps(4, 1), random_maps(4, 2)),
    (random_maps(4, 0, 2, 3), random_maps(2, 1, 4, 6)),
    (random_maps(2, 0), random_maps(2, 0)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: str([(m.window, m.shift) for m in pair]))
@pytest.mark.parametrize("at_once", [1, 2**21])
def test_pixels_are_compared_on_the_keys_of_both_windows(pair, at_once, monkeypatch):
    monkeypatch.setattr("esc_basicsr.lab.analysis.similarity._WEIGHTS_AT_ONCE", at_once)
    similarity = MapSimilarity(2)
    similarity.update(pair)
    a, b = map(dense, pair)
    expected = {"pixel": [], "pixel_centred": [], "uniform": []}
    for row, other in zip(a, b, strict=True):
        both = ~(row.isnan() | other.isnan())
        row, other = row[both], other[both]
        expected["pixel"].append(cosine(row, other))
        expected["pixel_centred"].append(centred_cosine(row, other))
        expected["uniform"].append([uniform_cosine(row), uniform_cosine(other)])
    pairs, uniform, centred = similarity.pixel()
    assert pairs[0, 1] == pytest.approx(np.mean(expected["pixel"]), abs=1e-10)
    assert pairs[0, 0] == pytest.approx(1)
    assert centred[1, 0] == pytest.approx(np.mean(expected["pixel_centred"]), abs=1e-10, nan_ok=True)
    np.testing.assert_allclose((uniform[0, 1], uniform[1, 0]), np.mean(expected["uniform"], 0), atol=1e-10)


def test_keys_of_a_regular_and_a_shifted_window_are_a_quadrant():
    regular, shifted = (dense(random_maps(8, shift, 2, 2)) for shift in (0, 4))
    assert set((~(regular.isnan() | shifted.isnan())).sum(1).tolist()) == {16}


def test_a_row_that_is_uniform_has_no_centred_cosine():
    flat = WindowMaps(torch.full((2, 2, 4, 4), 0.25), 2, 0)
    similarity = MapSimilarity(2)
    similarity.update([flat, random_maps(2, 0, 2, 2)])
    _, uniform, centred = similarity.pixel()
    assert np.isnan(centred[0, 1])
    assert uniform[0, 1] == pytest.approx(1)


def test_window_means_leave_masked_windows_out():
    images = [random_maps(2, 1, 3, 3), random_maps(2, 1, 2, 4)]
    similarity = MapSimilarity(1)
    for image in images:
        similarity.update([image])
    kept = torch.cat([image.weights[:-1, :-1].flatten(0, 1) for image in images]).double()
    torch.testing.assert_close(similarity.window_means(), [kept.mean(0)])
    with pytest.raises(ValueError, match="two windows a side"):
        similarity.update([random_maps(2, 1, 1, 3)])


def test_pairs_are_averaged_by_displacement():
    window = 3
    table = torch.randn(25, dtype=torch.float64)
    weights = torch.empty(9, 9, dtype=torch.float64)
    for query in range(9):
        for key in range(9):
            dy, dx = key // 3 - query // 3, key % 3 - query % 3
            weights[query, key] = table[(dy + 2) * 5 + dx + 2]
    torch.testing.assert_close(by_displacement(weights, window), table)
    weights[0, 0] += 9  # one of nine pairs that are not displaced
    assert float(by_displacement(weights, window)[12] - table[12]) == pytest.approx(1)
