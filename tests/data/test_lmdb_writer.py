import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest

from esc_basicsr.__main__ import main
from esc_basicsr.data import lmdb_writer
from esc_basicsr.data.degradation import reduce_uint8
from esc_basicsr.data.lmdb_reader import ImageLMDB
from esc_basicsr.data.lmdb_writer import build_lmdb_sets, collect_images
from esc_basicsr.errors import UserError


def _all(folder):
    images = ImageLMDB(folder)
    return {key: images.read(index) for index, key in enumerate(images.keys)}


def _data(folder):
    return (folder / "data.mdb").read_bytes(), (folder / "meta_info.txt").read_text()


def test_whole_images_are_stored_losslessly_and_reduced_whole(tmp_path, photographs):
    sets = build_lmdb_sets(photographs, tmp_path / "new", "DIV2K", scales=[2, 3], crop_size=0)
    assert {scale: path.name for scale, path in sets.items()} == {
        1: "DIV2K_HR.lmdb",
        2: "DIV2K_LR_bicubic_X2.lmdb",
        3: "DIV2K_LR_bicubic_X3.lmdb",
    }
    hr = _all(sets[1])
    assert list(hr) == list(photographs)
    for key, photo in photographs.items():
        height, width = (side - side % 6 for side in photo.shape[:2])
        np.testing.assert_array_equal(hr[key], photo[:height, :width, ::-1])
        for scale in (2, 3):
            np.testing.assert_array_equal(_all(sets[scale])[key], reduce_uint8(hr[key], scale))


def test_sub_images_cover_the_same_area_of_hr_and_of_the_whole_reduced_image(tmp_path, photographs):
    photo = photographs["astronaut"]  # 113 x 125, that is 108 x 120 for the scales 2, 3 and 4
    sets = build_lmdb_sets({"a": photo}, tmp_path, "x", scales=[2, 3, 4], crop_size=48, step=36)
    assert [path.name for path in sets.values()][::3] == ["x_HR_sub.lmdb", "x_LR_bicubic_X4_sub.lmdb"]
    whole = np.ascontiguousarray(photo[:108, :120, ::-1])
    corners = [(top, left) for top in (0, 36, 60) for left in (0, 36, 72)]
    for scale, path in sets.items():
        expected = reduce_uint8(whole, scale)
        stored = _all(path)
        assert list(stored) == [f"a_s{number:03d}" for number in range(1, 10)]
        for image, (top, left) in zip(stored.values(), corners, strict=True):
            y, x, side = top // scale, left // scale, 48 // scale
            np.testing.assert_array_equal(image, expected[y : y + side, x : x + side])


@pytest.mark.parametrize(
    ("length", "starts"),
    [(480, [0]), (300, [0]), (720, [0, 240]), (721, [0, 240, 241]), (1200, [0, 240, 480, 720])],
)
def test_windows_reach_the_edge_and_no_further(length, starts):
    assert lmdb_writer._starts(length, 480, 240) == starts


def test_side_shorter_than_the_crop_is_not_cut_and_is_told(tmp_path, photographs, caplog):
    sets = build_lmdb_sets(photographs, tmp_path, "x", scales=[2], crop_size=100, step=10)
    assert "2 of 3 images are shorter than 100 pixels along a side" in caplog.text
    hr, lr = ImageLMDB(sets[1]), ImageLMDB(sets[2])
    sizes = dict(zip(hr.keys, hr.sizes.tolist(), strict=True))
    assert sizes["chelsea_s001"] == [96, 100] and sizes["coffee_s001"] == [96, 96]
    np.testing.assert_array_equal(hr.sizes, 2 * lr.sizes)


def test_basicsr_paired_data_set_reads_the_sets(tmp_path, photographs):
    from basicsr.data import build_dataset

    sets = build_lmdb_sets(photographs, tmp_path, "x", scales=[4], crop_size=48, step=24)
    opt = {
        "name": "x",
        "type": "PairedImageDataset",
        "dataroot_gt": str(sets[1]),
        "dataroot_lq": str(sets[4]),
        "io_backend": {"type": "lmdb"},
        "scale": 4,
        "phase": "val",
    }
    pairs = build_dataset(opt)
    hr, lr = _all(sets[1]), _all(sets[4])
    assert len(pairs) == len(hr) > 10
    for index in (0, 7, len(hr) - 1):
        item = pairs[index]
        for kind, images in (("gt", hr), ("lq", lr)):
            expected = images[item[f"{kind}_path"]][:, :, ::-1].transpose(2, 0, 1).astype(np.float32) / 255
            np.testing.assert_array_equal(item[kind].numpy(), expected)


def test_meta_info_is_in_basicsr_form(hr_lmdb):
    assert (hr_lmdb / "meta_info.txt").read_text().splitlines() == [
        "astronaut.png (113,125,3) 0",
        "chelsea.png (96,120,3) 0",
        "coffee.png (96,96,3) 0",
    ]
    assert sorted(path.name for path in hr_lmdb.iterdir()) == ["data.mdb", "lock.mdb", "meta_info.txt"]


def test_compression_changes_the_size_and_the_third_field_and_no_pixel(tmp_path, photographs):
    photo = photographs["chelsea"]
    sizes = []
    for level in (0, 1, 9):
        path = build_lmdb_sets({"a": photo}, tmp_path / str(level), "x", crop_size=0, compression=level)[1]
        assert (path / "meta_info.txt").read_text() == f"a.png (96,120,3) {level}\n"
        np.testing.assert_array_equal(_all(path)["a"], photo[:, :, ::-1])
        with lmdb.open(str(path), readonly=True) as environment, environment.begin() as transaction:
            sizes.append(len(transaction.get(b"a")))
    assert sizes[0] > photo.nbytes > sizes[1] > sizes[2]


def test_processes_write_the_same_bytes_as_one_process(tmp_path, photo_folder):
    images = collect_images([photo_folder])
    many = {f"{key}{number}": path for number in range(4) for key, path in images.items()}
    one = build_lmdb_sets(many, tmp_path / "one", "x", scales=[2], crop_size=48, step=24)
    two = build_lmdb_sets(many, tmp_path / "two", "x", scales=[2], crop_size=48, step=24, workers=2)
    for scale in (1, 2):
        assert _all(one[scale]).keys() == _all(two[scale]).keys()
        assert _data(one[scale]) == _data(two[scale])


def test_set_larger_than_the_first_map_is_written_whole(tmp_path, photographs, monkeypatch):
    monkeypatch.setattr(lmdb_writer, "_FIRST_MAP_SIZE", 2**16)
    stored = _all(build_lmdb_sets(photographs, tmp_path, "x", crop_size=0)[1])
    for key, photo in photographs.items():
        np.testing.assert_array_equal(stored[key], photo[:, :, ::-1])


def test_keys_are_paths_within_the_folder_as_ascii_without_dots(tmp_path):
    for name in (
        "0001/a.png",
        "0002/a.png",
        "b 1.5.JPG",
        "grün.webp",
        ".hidden.png",
        ".git/c.png",
        "notes.txt",
    ):
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert list(collect_images([tmp_path / "in"])) == ["0001_a", "0002_a", "b_1_5", "gru" + "fcn"]


@pytest.mark.parametrize(
    ("first", "second"), [("a.png", "a.jpg"), ("a b.png", "a_b.png"), ("a/b.png", "a_b.png")]
)
def test_two_images_of_one_key_are_refused_by_name(tmp_path, first, second):
    for name in (first, second):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"would both be stored as 'a_?b?': rename one") as caught:
        collect_images([tmp_path])
    assert Path(first).name in str(caught.value) and second in str(caught.value)


def test_same_name_in_two_folders_is_refused(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").touch()
    with pytest.raises(UserError, match=r"one.a\.png and .*two.a\.png would both be stored as 'a'"):
        collect_images([tmp_path / "one", tmp_path / "two"])


def test_key_too_long_for_lmdb_is_refused(tmp_path):
    folder = tmp_path / ("x" * 250) / ("y" * 250)
    folder.mkdir(parents=True)
    (folder / "a.png").touch()
    with pytest.raises(UserError, match=r"503 letters, at most 500"):
        collect_images([tmp_path])


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="none is not a folder"):
        collect_images([tmp_path / "none"])
    with pytest.raises(UserError, match=r"holds no images \(\.png"):
        collect_images([tmp_path])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": [1]}, r"scales must be different integers of at least 2, got \[1\]"),
        ({"scales": [2, 2]}, "scales must be different"),
        ({"scales": [2, 3], "crop_size": 100}, "crop size must be 0 or a multiple of 6 .* got 100"),
        ({"crop_size": -4}, "crop size must be 0 or a multiple of 1 .* got -4"),
        ({"scales": [4], "crop_size": 48, "step": 6}, "step must be a positive multiple of 4 .* got 6"),
        ({"crop_size": 48, "step": 0}, "step must be a positive multiple of 1 .* got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"compression": 10}, r"compression must be from 0 \(none\) to 9 \(smallest\), got 10"),
        ({"compression": -1}, "compression must be from 0 .* got -1"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path, photographs, options, message):
    with pytest.raises(UserError, match=message):
        build_lmdb_sets(photographs, tmp_path / "out", "x", **options)
    assert not (tmp_path / "out").exists()


def test_step_that_leaves_gaps_is_told(tmp_path, photographs, esc_log):
    build_lmdb_sets(photographs, tmp_path, "close", crop_size=24, step=24)
    assert esc_log == []
    build_lmdb_sets(photographs, tmp_path, "apart", crop_size=24, step=25)
    (message,) = esc_log
    assert "the step, 25, is larger than the crop size, 24" in message


@pytest.mark.parametrize("key", ["", "a.b", "ä", "a b"])
def test_key_that_basicsr_cannot_read_is_refused(tmp_path, key):
    with pytest.raises(UserError, match="must consist of ASCII letters"):
        build_lmdb_sets({key: np.zeros((8, 8, 3), np.uint8)}, tmp_path, "x")


def test_no_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="no images to make an LMDB of"):
        build_lmdb_sets({}, tmp_path, "x")


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_image_is_named_and_nothing_is_left(tmp_path, photo_folder, workers):
    (photo_folder / "broken.png").write_bytes((photo_folder / "chelsea.png").read_bytes()[:20])
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"broken\.png cannot be decoded as an image \(20 bytes\)"):
        build_lmdb_sets(collect_images([photo_folder]), out, "x", scales=[2], workers=workers)
    assert list(out.iterdir()) == []


def test_image_that_vanished_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png cannot be read: No such file"):
        build_lmdb_sets({"gone": tmp_path / "gone.png"}, tmp_path, "x")


def test_image_smaller_than_the_scales_is_named(tmp_path):
    with pytest.raises(UserError, match="image 'dot' is 20x5: both sides must be at least 6"):
        build_lmdb_sets({"dot": np.zeros((5, 20, 3), np.uint8)}, tmp_path, "x", scales=[2, 3], crop_size=0)


def test_interruption_leaves_the_old_sets_as_they_were(tmp_path, photographs, monkeypatch):
    sets = build_lmdb_sets(photographs, tmp_path, "x", scales=[2], crop_size=0)
    before = [_data(path) for path in sets.values()]
    real = lmdb_writer._make_records

    def interrupted(task):
        if task.key == "coffee":
            raise KeyboardInterrupt
        return real(task)

    monkeypatch.setattr(lmdb_writer, "_make_records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_lmdb_sets(photographs, tmp_path, "x", scales=[2], crop_size=48, step=24, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        build_lmdb_sets(photographs, tmp_path, "x", scales=[2], crop_size=0, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_HR.lmdb", "x_LR_bicubic_X2.lmdb"]
    assert [_data(path) for path in sets.values()] == before


def _die(task):
    os._exit(1)


def test_worker_that_dies_is_told_and_nothing_is_left(tmp_path, photographs, monkeypatch):
    monkeypatch.setattr(lmdb_writer, "_make_records", _die)
    with pytest.raises(UserError, match=r"worker process died.* use fewer than 2 --workers"):
        build_lmdb_sets(photographs, tmp_path, "x", workers=2)
    assert list(tmp_path.iterdir()) == []


_ENDLESS = """
import os, sys, time
from esc_basicsr.__main__ import main
from esc_basicsr.data import lmdb_writer

def work(task):
    os.write(1, b"working\\n")
    time.sleep(SECONDS)
    return [[lmdb_writer._Record(task.key, 9, 9, b"png")]]

if __name__ == "__main__":
    lmdb_writer._make_records = work
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_main_process(tmp_path, photo_folder, number):
    for copy in range(50):
        (photo_folder / f"copy{copy}.png").write_bytes((photo_folder / "coffee.png").read_bytes())
    script = tmp_path / "endless.py"
    # SIGTERM waits for the tasks at work; after SIGKILL nobody does.
    script.write_text(_ENDLESS.replace("SECONDS", "0.1" if number == signal.SIGTERM else "600"))
    process = subprocess.Popen(
        [
            sys.executable,
            str(script),
            "lmdb",
            str(photo_folder),
            "-o",
            "out",
            "--name",
            "x",
            "--workers",
            "2",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout.readline() == "working\n"
    os.kill(process.pid, number)
    process.communicate(timeout=60)  # ends when the last process that holds the pipe has ended
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert list((tmp_path / "out").iterdir()) == []


def test_full_disk_is_told_and_nothing_is_left(tmp_path, photographs, monkeypatch):
    class FullTransaction:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def put(self, key, value):
            raise lmdb.DiskError("No space left on device")

    class FullEnvironment:
        def begin(self, write):
            return FullTransaction()

        def close(self):
            pass

    monkeypatch.setattr(lmdb, "open", lambda *_, **__: FullEnvironment())
    with pytest.raises(UserError, match=r"writing .*x_HR_sub\.lmdb\.partial failed: No space left"):
        build_lmdb_sets(photographs, tmp_path, "x")
    assert list(tmp_path.iterdir()) == []


def test_existing_set_is_refused_unless_overwrite(tmp_path, photographs):
    sets = build_lmdb_sets(photographs, tmp_path, "x", crop_size=0)
    fewer = {"chelsea": photographs["chelsea"]}
    with pytest.raises(UserError, match=r"x_HR\.lmdb exists already: .*--overwrite"):
        build_lmdb_sets(fewer, tmp_path, "x", crop_size=0)
    assert len(ImageLMDB(sets[1])) == 3
    build_lmdb_sets(fewer, tmp_path, "x", crop_size=0, overwrite=True)
    assert list(_all(sets[1])) == ["chelsea"]


def test_error_begins_a_line_of_its_own(tmp_path, photo_folder, capsys):
    (photo_folder / "broken.png").write_bytes(b"no image")
    assert (
        main(["lmdb", str(photo_folder), "-o", str(tmp_path / "out"), "--name", "x", "--workers", "1"]) == 2
    )
    label, bar, error, rest = capsys.readouterr().err.split("\n")
    assert (label[:6], bar[:1], error[:7], rest) == ("making", "[", "error: ", "")


def test_command_makes_the_sets_and_prints_them(tmp_path, photo_folder, capsys):
    out = tmp_path / "datasets" / "DIV2K"
    command = ["lmdb", str(photo_folder), "-o", str(out), "--name", "DIV2K_train", "--workers", "2"]
    sizes = ["--scales", "2", "4", "--crop-size", "48", "--step", "24"]
    assert main([*command, *sizes, "--compression", "3"]) == 0
    assert (out / "DIV2K_train_HR_sub.lmdb/meta_info.txt").read_text().endswith("(48,48,3) 3\n")
    names = [
        "DIV2K_train_HR_sub.lmdb",
        "DIV2K_train_LR_bicubic_X2_sub.lmdb",
        "DIV2K_train_LR_bicubic_X4_sub.lmdb",
    ]
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(out / name) for name in names]
    assert captured.err.startswith(f"making LMDB sets DIV2K_train in {out}\n[")
    assert "3/3" in captured.err and "ETA" in captured.err and captured.err.endswith("\n")
    assert sorted(path.name for path in out.iterdir()) == names
    assert main([*command, "--scales", "2", "4"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a/b", ".x", ".."])
def test_command_refuses_a_name_that_is_a_path(photo_folder, tmp_path, capsys, name):
    assert main(["lmdb", str(photo_folder), "-o", str(tmp_path), "--name", name]) == 2
    assert "beginning of folder names, not a path" in capsys.readouterr().err


def test_every_format_is_read_as_8_bit_colour(tmp_path, photographs):
    image = np.ascontiguousarray(photographs["coffee"][:, :, ::-1])
    files = {suffix: tmp_path / f"in_{suffix}.{suffix}" for suffix in ("png", "bmp", "tiff", "jpg", "webp")}
    for path in files.values():
        cv2.imwrite(str(path), image)
    files["deep"] = tmp_path / "deep.png"
    cv2.imwrite(str(files["deep"]), image.astype(np.uint16) * 257)
    files["alpha"] = tmp_path / "alpha.png"
    cv2.imwrite(str(files["alpha"]), np.dstack([image, image[..., :1]]))
    stored = _all(build_lmdb_sets(files, tmp_path, "x", crop_size=0)[1])
    for key in ("png", "bmp", "tiff", "deep", "alpha"):
        np.testing.assert_array_equal(stored[key], image, err_msg=key)
    for key in ("jpg", "webp"):
        assert np.abs(stored[key].astype(int) - image).mean() < 5
