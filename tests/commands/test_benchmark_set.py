import cv2
import numpy as np
import pytest

from esc_basicsr.__main__ import main
from esc_basicsr.commands.benchmark_set import lay_out_benchmark
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.degradation import reduce_uint8


def _files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_set_is_laid_out_as_the_options_expect(tmp_path, photo_folder, photographs, capsys):
    out = tmp_path / "Set3"
    assert main(["benchmark-set", str(photo_folder), "-o", str(out), "--scales", "2", "3"]) == 0
    kinds = [("HR", ""), ("LR_bicubic", "x{}")]
    assert _files(out) == sorted(
        f"{kind}/X{scale}/{stem}{suffix.format(scale)}.png"
        for kind, suffix in kinds
        for scale in (2, 3)
        for stem in photographs
    )
    captured = capsys.readouterr()
    assert str(out / "LR_bicubic" / "X3") in captured.out.splitlines()
    assert captured.err == ""  # where there is no terminal
    for scale in (2, 3):
        for stem, photo in photographs.items():
            height, width = (side - side % scale for side in photo.shape[:2])
            hr = cv2.imread(str(out / "HR" / f"X{scale}" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
            lr = cv2.imread(
                str(out / "LR_bicubic" / f"X{scale}" / f"{stem}x{scale}.png"), cv2.IMREAD_UNCHANGED
            )
            np.testing.assert_array_equal(hr, photo[:height, :width, ::-1])
            np.testing.assert_array_equal(lr, reduce_uint8(hr, scale))


def test_basicsr_paired_data_set_reads_the_set(tmp_path, photo_folder):
    from basicsr.data import build_dataset

    hr, lr = lay_out_benchmark(photo_folder, tmp_path / "Set3", [4])
    opt = {
        "name": "Set3",
        "type": "PairedImageDataset",
        "dataroot_gt": str(hr),
        "dataroot_lq": str(lr),
        "filename_tmpl": "{}x4",
        "io_backend": {"type": "disk"},
        "scale": 4,
        "phase": "test",
    }
    pairs = build_dataset(opt)
    assert len(pairs) == 3
    for item in (pairs[i] for i in range(3)):
        assert [4 * side for side in item["lq"].shape[1:]] == list(item["gt"].shape[1:])


@pytest.mark.parametrize(
    ("name", "scale"), [("Set5", 2), ("Set5", 3), ("Set5", 4), ("Set14", 2), ("Set14", 3), ("Set14", 4)]
)
def test_lr_equals_the_reference_lr_of_the_benchmark(tmp_path, data_root, name, scale):
    # The reference rounds the few values that lie between two levels the other way.
    reference = data_root / name
    lay_out_benchmark(reference / "HR" / f"X{scale}", tmp_path, [scale])
    different = total = 0
    for path in sorted((reference / "LR_bicubic" / f"X{scale}").iterdir()):
        expected = cv2.imread(str(path)).astype(int)
        ours = cv2.imread(str(tmp_path / "LR_bicubic" / f"X{scale}" / path.name))
        difference = np.abs(ours - expected)
        assert difference.max() <= 1, path.name
        different += int((difference > 0).sum())
        total += difference.size
    assert total > 100_000 and different / total < 1e-4


def test_gray_image_becomes_three_equal_channels(tmp_path):
    (tmp_path / "in").mkdir()
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
    cv2.imwrite(str(tmp_path / "in" / "gray.png"), gray)
    hr, _ = lay_out_benchmark(tmp_path / "in", tmp_path / "out", [2])
    stored = cv2.imread(str(hr / "gray.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(stored, np.repeat(gray[..., None], 3, axis=2))


def test_existing_scale_is_refused_unless_overwrite(tmp_path, photo_folder, capsys):
    out = tmp_path / "Set3"
    lay_out_benchmark(photo_folder, out, [2])
    before = _files(out)
    command = ["benchmark-set", str(photo_folder), "-o", str(out), "--scales", "2", "3"]
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert _files(out) == before
    assert main([*command, "--overwrite"]) == 0
    assert len(_files(out)) == 12


def test_unreadable_image_is_named_and_nothing_is_left(tmp_path, photo_folder, capsys):
    (photo_folder / "zebra.png").write_bytes(b"no image")
    assert main(["benchmark-set", str(photo_folder), "-o", str(tmp_path / "Set3"), "--scales", "2"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "zebra.png cannot be decoded" in message
    assert _files(tmp_path / "Set3") == []


def test_two_files_of_one_name_are_refused(tmp_path, photo_folder):
    (photo_folder / "coffee.bmp").write_bytes((photo_folder / "coffee.png").read_bytes())
    with pytest.raises(UserError, match=r"has both coffee\.bmp and coffee\.png"):
        lay_out_benchmark(photo_folder, tmp_path / "Set3", [2])


@pytest.mark.parametrize("scales", [[1], [2, 2]])
def test_impossible_scales_are_refused(tmp_path, photo_folder, scales):
    with pytest.raises(UserError, match="scales must be different integers of at least 2"):
        lay_out_benchmark(photo_folder, tmp_path / "Set3", scales)
