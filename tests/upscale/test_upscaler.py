"""Upscaling arrays and tensors: shapes, types, memory.

Private names are reached for where a test stands for a GPU, or for memory that runs out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esc_basicsr.archs.variants import VARIANTS, build_variant
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.fast import kernels
from esc_basicsr.fast.tiles import MARGIN, run_in_tiles, tile_side, tiles
from esc_basicsr.upscale import Upscaler, upscaler
from esc_basicsr.weights.read import read_weights
from esc_basicsr.weights.shipped import load_network
from esc_basicsr.weights.write import write_safetensors


@pytest.fixture(scope="module")
def upscale(model: Path) -> Upscaler:
    return Upscaler(model, precision="fp32")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return load_sample_image("chelsea")[:61, :75]


def direct(model: Path, photo: np.ndarray) -> torch.Tensor:
    """Run the network on the image and its mirror image around it."""
    batch = torch.from_numpy(photo.astype(np.float32) / 255).permute(2, 0, 1)[None]
    edge = 2 * upscaler.BORDER
    with torch.inference_mode():
        sr = load_network(model).network(upscaler.mirrored(batch)).clamp(0, 1)
    return sr[:, :, edge:-edge, edge:-edge]


def test_array_comes_out_as_the_network_has_it(upscale: Upscaler, model: Path, photo: np.ndarray) -> None:
    sr = upscale(photo)
    assert (sr.shape, sr.dtype) == ((122, 150, 3), np.uint8)
    expected = (direct(model, photo)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    np.testing.assert_allclose(sr.astype(int), expected.astype(int), atol=1)  # a rounding apart
    assert np.mean(sr != expected) < 1e-3


def test_kinds_of_arrays_and_tensors_agree(upscale: Upscaler, photo: np.ndarray) -> None:
    expected = upscale(photo).astype(float) / 255
    deep = upscale(photo.astype(np.uint16) * 257)
    assert deep.dtype == np.uint16
    np.testing.assert_allclose(deep / 65535, expected, atol=0.6 / 255)
    floats = upscale(photo.astype(np.float64) / 255)
    assert floats.dtype == np.float64
    np.testing.assert_allclose(floats, deep / 65535, atol=1 / 65535)
    tensor = torch.from_numpy(photo).permute(2, 0, 1).float() / 255
    out = upscale(tensor)
    assert (out.shape, out.dtype) == ((3, 122, 150), torch.float32)
    np.testing.assert_allclose(out.permute(1, 2, 0).numpy(), floats, atol=1e-6)
    assert upscale(tensor.half()[None]).dtype == torch.float16


def test_batch_is_its_images(upscale: Upscaler, photo: np.ndarray) -> None:
    batch = np.stack([photo, photo[::-1]])
    singly = np.stack([upscale(photo), upscale(photo[::-1])])
    np.testing.assert_allclose(upscale(batch).astype(int), singly.astype(int), atol=1)  # a rounding apart
    assert np.mean(upscale(batch) != singly) < 1e-3


def test_gray_is_the_mean_of_what_it_becomes_as_colour(upscale: Upscaler, photo: np.ndarray) -> None:
    gray = photo[..., 1].astype(np.float32) / 255
    out = upscale(gray)
    assert out.shape == (122, 150)
    np.testing.assert_allclose(out, upscale(np.dstack([gray] * 3)).mean(2), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 8), (8, 8), (9, 33)])
def test_smallest_and_odd_sizes(upscale: Upscaler, photo: np.ndarray, size: tuple[int, int]) -> None:
    height, width = size
    assert upscale(photo[:height, :width]).shape == (2 * height, 2 * width, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            np.zeros((4, 4, 4), np.uint8),
            np.zeros((4, 4), np.int64),
            np.zeros((4, 4), np.longdouble),
            np.zeros((4,), np.uint8),
        ),
        *(np.zeros((0, 4, 3), np.uint8), torch.zeros(4, 4, 3), torch.zeros(3, 4, 4, dtype=torch.uint8)),
    ],
    ids=lambda wrong: f"{wrong.dtype} {tuple(wrong.shape)}",
)
def test_other_shapes_and_types_are_refused(upscale: Upscaler, wrong: Any) -> None:
    with pytest.raises(UserError, match="expected"):
        upscale(wrong)


# Memory


def test_tiles_cover_the_image_once_and_lie_on_the_grid() -> None:
    for height, width, side, window in ((61, 75, 16, 8), (8, 8, 8, 8), (100, 7, 32, 8)):
        seen = np.zeros((height, width), int)
        for tile in tiles(height, width, side, window):
            seen[tile.kept] += 1
            for part, length in zip(tile.seen, (height, width), strict=True):
                assert part.start % window == 0
                assert part.stop % window == 0 or part.stop == length
                assert part.stop - part.start <= side + 2 * MARGIN * window
            rows, columns = tile.kept_of_seen
            assert tile.seen[0].start + rows.start == tile.kept[0].start
            assert tile.seen[1].stop - tile.seen[1].start >= columns.stop
        assert (seen == 1).all()
    assert tile_side(10**6, 32) + 2 * MARGIN * 32 <= 1000
    assert tile_side(1, 32) == 64


def off_the_grid(
    run: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, scale: int, side: int, window: int
) -> torch.Tensor:
    """Tiles that begin half a window from the grid, with no less around them."""
    around = window // 2
    sides = ((0, 0), (0, 0), (around, 0), (around, 0))
    padded = torch.from_numpy(np.pad(images.numpy(), sides, mode="reflect"))
    out = run_in_tiles(run, padded, scale, side, window)
    return out[..., around * scale :, around * scale :]


def test_what_is_too_large_goes_in_tiles_with_little_difference(
    model: Path, photo: np.ndarray, esc_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Upscaler(model)
    tiled = Upscaler(model, memory=whole.bytes_per_pixel * 50**2)
    deep = photo.astype(np.uint16) * 257
    exact = whole(deep)
    error = np.mean((tiled(deep).astype(float) - exact) ** 2)
    assert any(
        "75 × 61 pixels are too many for the memory: they are worked through in tiles" in m for m in esc_log
    )
    assert 0 < error < 65535**2 / 10**4  # 40 dB, by random weights
    # Tiles off the grid of windows are farther from the whole.
    monkeypatch.setattr(upscaler, "run_in_tiles", off_the_grid)
    assert np.mean((tiled(deep).astype(float) - exact) ** 2) > 2 * error
    monkeypatch.undo()
    gray = np.ascontiguousarray(photo[..., 1])
    assert (tiled(gray).shape, tiled(gray).dtype) == ((122, 150), np.uint8)
    assert np.abs(tiled(gray).astype(int) - whole(gray)).max() <= 8
    batch = np.stack([photo[:30, :30], photo[20:50, 20:50]])
    np.testing.assert_allclose(tiled(batch), whole(batch).astype(int), atol=1)  # one by one, each whole


def test_it_goes_on_in_smaller_pieces_where_memory_runs_out(
    model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscale = Upscaler(model, precision="fp32")
    run, seen = upscale._run, []

    def run_in_little_memory(batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        seen.append(batch.shape[-1] * batch.shape[-2])
        if seen[-1] > 2500:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return run(batch, dtype)

    monkeypatch.setattr(upscale, "_run", run_in_little_memory)
    assert upscale(photo).shape == (122, 150, 3)
    assert seen[0] == (61 + 2 * upscaler.BORDER) * (75 + 2 * upscaler.BORDER)
    assert max(seen[-10:]) <= 2500
    count = len(seen)
    upscale(photo)
    assert max(seen[count:]) <= 2500  # it has learnt


def test_memory_that_is_not_enough_for_a_tile_is_told(
    model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscale = Upscaler(model)

    def run(*arguments: Any) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(upscale, "_run", run)
    with pytest.raises(UserError, match="not enough memory for 2,304 pixels at a time"):
        upscale(photo)


def test_result_that_the_memory_is_not_enough_for_is_told_before_the_work(
    model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiled = Upscaler(model, memory=10**6, precision="fp32")
    monkeypatch.setattr(upscaler, "available_memory", lambda device: 122 * 150 * 3 - 1)
    monkeypatch.setattr(tiled, "_run", lambda *arguments: pytest.fail("it worked"))
    with pytest.raises(UserError, match="a result of 150 × 122 pixels takes"):
        tiled(photo)


def test_tiles_leave_room_for_the_result(
    model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscale = Upscaler(model)
    sides = []
    there_is = 3600 * upscale.bytes_per_pixel / upscaler._SHARE
    monkeypatch.setattr(upscaler, "available_memory", lambda device: int(there_is))
    monkeypatch.setattr(upscaler, "tile_side", lambda pixels, window: sides.append(pixels) or 16)
    upscale(photo)
    floats = upscale(photo.astype(np.float32) / 255)
    of_bytes, of_floats = sides
    result = (122 + 4 * upscaler.BORDER) * (150 + 4 * upscaler.BORDER) * 3 / upscale.bytes_per_pixel
    assert of_bytes == pytest.approx(3600 - result, abs=2)
    assert of_floats == pytest.approx(3600 - 4 * result, abs=2)
    assert floats.dtype == np.float32


def test_half_precision_is_tried_in_the_middle(
    model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert upscaler._middle(61, 128) == slice(0, 128)
    assert upscaler._middle(1000, 128) == slice(436, 564)


def test_other_errors_are_not_taken_for_want_of_memory(
    model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscale = Upscaler(model)

    def run(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(upscale, "_run", run)
    with pytest.raises(RuntimeError, match="shapes"):
        upscale(photo)


# Precision


def test_half_precision_is_chosen_where_it_gives_the_same(
    model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, esc_log: list[str]
) -> None:
    part = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
    upscale = Upscaler(model)
    for noise, expected in ((1e-5, torch.float16), (1e-2, torch.float32)):
        outputs = {torch.float32: part, torch.float16: part + noise}
        monkeypatch.setattr(upscale, "_run", lambda batch, dtype, outputs=outputs: outputs[dtype])
        assert upscale._half_if_it_is_safe(part, "fp16") == expected
    assert any("fp16 differs from fp32 (40.0 dB)" in message for message in esc_log)


def test_half_precision_is_not_judged_by_a_flat_image(
    model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upscaler, "_half_of", lambda device: "bf16")
    upscale = Upscaler(model)
    upscale(np.zeros_like(photo))
    assert upscale._half is None
    upscale(photo)
    assert upscale._half is not None


def test_bfloat16_is_chosen_on_a_cpu_that_multiplies_it(photo: np.ndarray) -> None:
    if not kernels.load().has_bf16:
        pytest.skip("this processor has no instructions for bfloat16")
    name = "ESC-light_x2"
    exact, half = (Upscaler(name, precision=each)(photo) for each in ("fp32", "bf16"))
    upscale = Upscaler(name)
    assert upscale.chosen_half is None
    chosen = upscale(photo)
    assert upscale.chosen_half == "bf16"
    np.testing.assert_array_equal(chosen, half)
    difference = np.abs(exact.astype(int) - half)
    assert 0 < difference.mean() < 0.1 and difference.max() <= 2


def test_bfloat16_is_refused_and_not_tried_where_it_would_be_slower(
    model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, esc_log: list[str]
) -> None:
    library = kernels.load()._replace(has_bf16=False)
    monkeypatch.setattr(kernels, "load", lambda: library)
    with pytest.raises(UserError, match="bfloat16 would be slower than float32 on this CPU"):
        Upscaler(model, precision="bf16")
    upscale = Upscaler(model)
    np.testing.assert_array_equal(upscale(photo), Upscaler(model, precision="fp32")(photo))
    assert upscale.chosen_half is None and not esc_log


# Models


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_and_scale_are_told_from_the_weights(tmp_path: Path, variant: str) -> None:
    network = build_variant(variant, 3)
    bare, flat = tmp_path / "bare.pth", tmp_path / "flat.safetensors"
    torch.save(network.state_dict(), bare)
    write_safetensors(
        flat, {k: v.half() for k, v in network.state_dict().items()}, {"param_key": "params_ema"}
    )
    for file in (bare, flat):
        upscale = Upscaler(file)
        assert (upscale.variant, upscale.scale) == (variant, 3)
    assert upscale(np.zeros((9, 8, 3), np.uint8)).shape == (27, 24, 3)


def test_ema_is_taken_where_there_is_one(tmp_path: Path, model: Path, photo: np.ndarray) -> None:
    weights = read_weights(model, "params")
    torch.save(
        {"params": {k: v * 0 for k, v in weights.items()}, "params_ema": weights}, tmp_path / "both.pth"
    )
    np.testing.assert_array_equal(Upscaler(tmp_path / "both.pth")(photo), Upscaler(model)(photo))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "none.pth"}, "none.pth: there is no such file"),
        ({"scale": 4}, "scale ×2, not ×4"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not available"),
        ({"device": "meta"}, "expected auto, cpu or cuda"),
        ({"device": "nonsense"}, "device 'nonsense' is not available"),
        ({"precision": "fp8"}, "precision must be auto or one of fp32"),
        ({"precision": "fp16", "device": "cpu"}, "float16 would be slower than float32 on a CPU"),
    ],
)
def test_what_is_not_to_be_had_is_told(model: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Upscaler(**{"model": model, **arguments})


def test_half_precision_that_was_found_safe_is_for_8_bits_alone(
    model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscale = Upscaler(model)
    upscale._half = torch.float16  # as the first 8-bit image on a GPU may leave it
    seen = []
    monkeypatch.setattr(
        upscale, "_run", lambda batch, dtype: seen.append(dtype) or torch.zeros(1, 3, 122, 150)
    )
    for image in (photo, photo.astype(np.uint16) * 257, photo.astype(np.float32) / 255):
        upscale(image)
    assert seen == [torch.float16, torch.float32, torch.float32]


def test_foreign_byte_order_is_read(upscale: Upscaler, photo: np.ndarray) -> None:
    deep = photo.astype(np.uint16) * 257
    np.testing.assert_array_equal(upscale(deep.astype(">u2")), upscale(deep))


def test_what_is_no_array_is_refused(upscale: Upscaler) -> None:
    with pytest.raises(UserError, match="expected an array or a tensor, got list"):
        upscale([[0.5]])  # type: ignore[type-var]


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not weights of an ESC network"):
        Upscaler(tmp_path / "other.pth")


def test_without_a_compiler_it_runs_all_the_same(
    model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, esc_log: list[str]
) -> None:
    expected = Upscaler(model)(photo)

    def fail() -> None:
        raise UserError("no C++ compiler")

    monkeypatch.setattr("esc_basicsr.fast.kernels.load", fail)
    np.testing.assert_allclose(Upscaler(model)(photo).astype(int), expected.astype(int), atol=1)
    assert any("no C++ compiler" in message for message in esc_log)


@pytest.mark.parametrize("height, width", [(1, 1), (2, 7), (30, 5)])
def test_images_are_mirrored_at_any_size_as_numpy_does(height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width)
    border = [(0, 0), (0, 0), (upscaler.BORDER,) * 2, (upscaler.BORDER,) * 2]
    np.testing.assert_array_equal(upscaler.mirrored(images), np.pad(images, border, mode="symmetric"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_ensemble_is_the_mean_over_flips_and_turns(
    upscale: Upscaler, model: Path, photo: np.ndarray, dtype: type
) -> None:
    white = 1.0 if dtype is np.float32 else np.iinfo(dtype).max
    values = (photo / 255 * white).astype(dtype)
    floats = values.astype(np.float32) / np.float32(white)
    turns = [np.rot90(upscale(np.rot90(floats, count)), -count) for count in range(4)]
    turns += [np.rot90(upscale(np.rot90(floats[:, ::-1], count)), -count)[:, ::-1] for count in range(4)]
    sr = Upscaler(model, ensemble=True)(values)
    assert sr.dtype == dtype
    np.testing.assert_allclose(sr / white, np.mean(turns, 0), atol=0.51 / white if white > 1 else 1e-5)
    assert np.abs(np.mean(turns, 0) - upscale(floats)).max() > 1e-3


def test_ensemble_in_tiles_is_nearly_what_it_is_whole(model: Path) -> None:
    image = load_sample_image("chelsea")[:96, :128]
    whole = Upscaler(model, ensemble=True)
    in_tiles = Upscaler(model, ensemble=True, memory=whole.bytes_per_pixel * 60**2)
    assert np.abs(in_tiles(image).astype(int) - whole(image)).mean() < 0.5  # levels


def test_ensemble_of_gray_stays_gray(model: Path, photo: np.ndarray) -> None:
    assert Upscaler(model, ensemble=True)(photo[..., 0]).shape == (122, 150)
