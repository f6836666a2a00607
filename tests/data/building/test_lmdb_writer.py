import csv
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from filelock import FileLock

from esc_basicsr.__main__ import main
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building import build_state, lmdb_set, lmdb_writer, publish, sub_images
from esc_basicsr.data.building.image_keys import find_keyed_images
from esc_basicsr.data.building.lmdb_set import CHECKSUMS, FILES, META_INFO, LmdbSet
from esc_basicsr.data.building.lmdb_verification import verify_lmdb
from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets
from esc_basicsr.data.building.skipped import Skipped, report_of
from esc_basicsr.data.building.sub_images import Cutting, space_needed
from esc_basicsr.data.degradation import reduce_uint8
from esc_basicsr.data.image_codec import encode_png
from esc_basicsr.data.lmdb_reader import ImageLMDB


def _all(folder):
    images = ImageLMDB(folder)
    return {key: images.read(index) for index, key in enumerate(images.keys)}


def _data(folder):
    return (folder / "data.mdb").read_bytes(), (folder / "meta_info.txt").read_text()


def _names(folder):
    """List what a folder holds, but for locks: they stay."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


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
    assert sorted(path.name for path in hr_lmdb.iterdir()) == sorted(FILES)
    assert _names(hr_lmdb.parent) == [hr_lmdb.name]


def test_checksums_are_of_the_records(hr_lmdb):
    lines = [line.split() for line in (hr_lmdb / "checksums.txt").read_text().splitlines()]
    assert [key for key, _, _ in lines] == ["astronaut", "chelsea", "coffee"]
    with lmdb.open(str(hr_lmdb), readonly=True) as environment, environment.begin() as transaction:
        for key, length, checksum in lines:
            record = transaction.get(key.encode())
            assert (len(record), f"{zlib.crc32(record):08x}") == (int(length), checksum)


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
    images = find_keyed_images([photo_folder])[0]
    many = {f"{key}{number}": path for number in range(4) for key, path in images.items()}
    one = build_lmdb_sets(many, tmp_path / "one", "x", scales=[2], crop_size=48, step=24)
    two = build_lmdb_sets(many, tmp_path / "two", "x", scales=[2], crop_size=48, step=24, workers=2)
    for scale in (1, 2):
        assert _all(one[scale]).keys() == _all(two[scale]).keys()
        assert _data(one[scale]) == _data(two[scale])


def test_set_larger_than_the_first_map_is_written_whole(tmp_path, photographs, monkeypatch):
    monkeypatch.setattr(lmdb_set, "_FIRST_MAP_SIZE", 2**16)
    stored = _all(build_lmdb_sets(photographs, tmp_path, "x", crop_size=0)[1])
    for key, photo in photographs.items():
        np.testing.assert_array_equal(stored[key], photo[:, :, ::-1])


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
def test_images_that_cannot_be_used_are_skipped_and_listed(tmp_path, photo_folder, workers, esc_log):
    (photo_folder / "broken.png").write_bytes((photo_folder / "chelsea.png").read_bytes()[:-200])
    (photo_folder / "dot.png").write_bytes(encode_png(np.zeros((5, 20, 3), np.uint8), 1))
    images = find_keyed_images([photo_folder])[0] | {"gone": tmp_path / "gone.png"}
    other = Skipped("two.png", "would be stored as 'one'")
    sets = build_lmdb_sets(
        images, tmp_path / "out", "x", scales=[2, 3], crop_size=0, workers=workers, skipped=[other]
    )
    assert [*_all(sets[1])] == [*_all(sets[3])] == ["astronaut", "chelsea", "coffee"]
    report = report_of(sets[1])
    assert report == tmp_path / "out" / "x_HR.skipped.csv"
    with report.open(newline="") as file:
        rows = [*csv.reader(file)]
    assert rows[:2] == [["image", "reason"], ["two.png", "would be stored as 'one'"]]
    assert [row[0] for row in rows[2:]] == [
        str(photo_folder / "broken.png"), str(photo_folder / "dot.png"), str(tmp_path / "gone.png")
    ]  # fmt: skip
    assert "truncated or damaged" in rows[2][1]
    assert rows[3][1] == "is 20x5: both sides must be at least 6; remove it"
    assert rows[4][1] == "cannot be read: No such file or directory"
    (message,) = esc_log
    assert message.startswith(f"4 of 7 images were skipped, as {report} lists: two.png would be stored")
    assert "dot.png is 20x5" in message

    build_lmdb_sets({"a": images["coffee"]}, tmp_path / "out", "x", crop_size=0, overwrite=True)
    assert not report.exists()


def test_sets_without_any_image_are_refused(tmp_path):
    (tmp_path / "a.png").touch()
    images = {"a": tmp_path / "a.png", "gone": tmp_path / "gone.png"}
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"none of the 2 images can be used, as .*csv lists: .*a\.png is empty"
    ):
        build_lmdb_sets(images, out, "x")
    assert _names(out) == ["x_HR_sub.skipped.csv"]


def test_record_that_does_not_come_back_is_skipped(tmp_path, photographs, monkeypatch):
    def encode(image, compression):
        return encode_png(image if image.shape != (96, 96, 3) else image + 1, compression)

    monkeypatch.setattr(sub_images, "encode_png", encode)
    sets = build_lmdb_sets(photographs, tmp_path, "x", crop_size=0)
    assert [*_all(sets[1])] == ["astronaut", "chelsea"]
    assert "image 'coffee',is not the same once it is encoded" in report_of(sets[1]).read_text()


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path, photographs, monkeypatch, esc_log):
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"has 0\.00 GB of free space, and the sets need .* GB: make room"):
        build_lmdb_sets(photographs, tmp_path / "out", "x", scales=[2], crop_size=0)
    assert _names(tmp_path / "out") == []
    build_lmdb_sets(photographs, tmp_path / "out", "x", scales=[2], crop_size=0, compression=1)
    (message,) = esc_log
    assert "need up to" in message


@pytest.mark.parametrize(("size", "scales"), [(8, []), (30, [2]), (96, [2, 3])])
def test_estimated_space_is_enough(tmp_path, size, scales):
    images = {f"image{i:04d}": np.full((size, size, 3), i % 251, np.uint8) for i in range(400)}
    sets = build_lmdb_sets(images, tmp_path, "x", scales=scales, crop_size=0)
    taken = sum(file.stat().st_size for folder in sets.values() for file in folder.iterdir())
    needed = space_needed([*images.values()], Cutting(tuple(scales), 0, 240, 0))
    assert taken <= needed + 2**16 <= 3 * taken


def _die(task, cutting):
    os._exit(1)


def test_worker_that_dies_is_told(tmp_path, photographs, monkeypatch):
    monkeypatch.setattr(lmdb_writer, "_work", _die)
    with pytest.raises(UserError, match=r"worker process died.* use fewer than 2 --workers"):
        build_lmdb_sets(photographs, tmp_path, "x", workers=2)
    assert not (tmp_path / "x_HR_sub.lmdb").exists()


_SLOW = """
import os, sys, time
from esc_basicsr.__main__ import main
from esc_basicsr.data.building import lmdb_writer

work_at_once = lmdb_writer._work

def work(task, cutting):
    if task[0] > "copy04":
        os.write(1, b"at copy05\\n")
        while not os.path.exists(FLAG):
            time.sleep(0.01)
    return work_at_once(task, cutting)

if __name__ == "__main__":
    lmdb_writer._work = work
    lmdb_writer._COMMIT_SECONDS = 0
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_interrupted_command_leaves_no_process_and_goes_on_when_it_is_given_again(
    tmp_path, photographs, number, code, esc_log
):
    folder = tmp_path / "photos"
    folder.mkdir()
    for copy in range(12):
        image = np.roll(photographs["coffee"], copy, axis=0)
        (folder / f"copy{copy:02d}.png").write_bytes(encode_png(image, 1))
    (folder / "copy02.png").write_bytes(b"")
    script = tmp_path / "slow.py"
    flag = tmp_path / "flag"
    script.write_text(_SLOW.replace("FLAG", repr(str(flag))))
    options = ["--name", "x", "--scales", "2", "--crop-size", "48", "--step", "24", "--workers", "2"]
    command = ["lmdb", str(folder), "-o", str(tmp_path / "out"), *options]
    process = subprocess.Popen(
        [sys.executable, str(script), *command],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # shells have what they start in the background ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "at copy05\n", process.stderr.read()
    if number == signal.SIGKILL:  # what is before it may take another moment to be committed
        journal = tmp_path / "out" / "x_HR_sub.lmdb.build" / "done.jsonl"
        deadline = time.monotonic() + 60
        while '"images": 5' not in journal.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
    process.send_signal(number)
    if number != signal.SIGKILL:  # after which nobody waits for the tasks at work
        flag.touch()
    _, errors = process.communicate(timeout=60)  # ends when the last process that holds the pipe has ended
    assert process.returncode == code, errors
    assert ("the same command goes on from there" in errors) == (number != signal.SIGKILL)

    assert main(command) == 3
    begin = int(re.search(r"continued from image (\d+) of 12 on", esc_log[0])[1])
    assert begin > 1 and (number != signal.SIGKILL or begin == 6)
    command[command.index(str(tmp_path / "out"))] = str(tmp_path / "at_once")
    assert main(command) == 3
    names = _names(tmp_path / "at_once")
    assert names == ["x_HR_sub.lmdb", "x_HR_sub.skipped.csv", "x_LR_bicubic_X2_sub.lmdb"]
    assert _names(tmp_path / "out") == names
    hr, report, lr = names
    assert (tmp_path / "out" / report).read_text() == (tmp_path / "at_once" / report).read_text()
    for name in (hr, lr):
        assert _records(tmp_path / "out" / name) == _records(tmp_path / "at_once" / name)


def _records(folder):
    """Everything that a set holds, in LMDB's order and in the lists'."""
    with lmdb.open(str(folder), readonly=True) as environment, environment.begin() as transaction:
        return [*transaction.cursor()], *((folder / name).read_text() for name in (META_INFO, CHECKSUMS))


def _build_until_killed(output, folder, kill_at, counter):
    """Build, and be killed at the ``kill_at``-th time that something is put on the disk or renamed."""

    torch.set_num_threads(1)  # a pool of threads that other tests have used does not survive the fork

    def counting(function):
        def counted(*args, **options):
            counter.value += 1
            if counter.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            counter.value += 1
            if counter.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    os.fsync = counting(os.fsync)
    LmdbSet.commit = counting(LmdbSet.commit)
    Path.rename = counting(Path.rename)
    Path.replace = counting(Path.replace)
    Path.mkdir = counting(Path.mkdir)
    publish.remove = lmdb_writer.remove = counting(publish.remove)
    lmdb_writer._COMMIT_SECONDS = 0
    _build(output, folder)


def _build(output, folder):
    build_lmdb_sets(
        find_keyed_images([folder])[0], output, "x", scales=[2], crop_size=48, step=48, overwrite=True
    )


def test_build_killed_at_any_step_ends_the_same(tmp_path, photo_folder):
    (photo_folder / "broken.png").write_bytes(b"no image")
    whole = tmp_path / "whole"
    _build(whole, photo_folder)
    names = _names(whole)
    context = multiprocessing.get_context("fork")
    is_killed, kill_at = True, 0
    while is_killed:
        kill_at += 1
        output = tmp_path / f"killed{kill_at}"
        build_lmdb_sets({"old": np.zeros((8, 8, 3), np.uint8)}, output, "x", crop_size=48, step=48)
        counter = context.Value("i", 0, lock=False)
        process = context.Process(target=_build_until_killed, args=(output, photo_folder, kill_at, counter))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        is_killed = process.exitcode != 0
        if is_killed:
            _build(output, photo_folder)
        assert _names(output) == names, kill_at
        for name in names:
            if name.endswith(".lmdb"):
                assert _records(output / name) == _records(whole / name), kill_at
        shutil.rmtree(output)
    assert kill_at > 60


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 16}, "step was 24 and is 16"),
        ({"scales": [3]}, r"scales was \[2\] and is \[3\]"),
        ({"compression": 1}, "compression was 0 and is 1"),
        ("changed", "image 'chelsea' has changed since"),
        ("more", "image 'd' was not among the images"),
        ("fewer", "image 'coffee' is no longer among the images"),
        ("others", "the images are others, from 'a' on"),
    ],
)
def test_interrupted_build_is_gone_on_with_only_by_asking_for_the_same(
    tmp_path, photographs, monkeypatch, change, said
):
    options = {"scales": [2], "crop_size": 48, "step": 24}
    with monkeypatch.context() as full, pytest.raises(UserError):
        full.setattr(LmdbSet, "commit", _disk_is_full)
        build_lmdb_sets(photographs, tmp_path, "x", **options)
    images = dict(photographs)
    if change == "changed":
        images["chelsea"] = 255 - images["chelsea"]
    elif change == "more":
        images["d"] = images["coffee"]
    elif change == "fewer":
        del images["coffee"]
    elif change == "others":
        images = {"a": images["coffee"], **images}
    else:
        options |= change
    with pytest.raises(UserError, match=f"interrupted build that was asked for something else: {said}"):
        build_lmdb_sets(images, tmp_path, "x", **options)
    sets = build_lmdb_sets(images, tmp_path, "x", **options, restart=True)
    assert _names(tmp_path) == sorted(path.name for path in sets.values())
    assert verify_lmdb(sets[1]) == len(ImageLMDB(sets[1]))


def test_file_that_was_touched_since_is_another_image(tmp_path, photo_folder, monkeypatch):
    with monkeypatch.context() as full, pytest.raises(UserError):
        full.setattr(LmdbSet, "commit", _disk_is_full)
        build_lmdb_sets(find_keyed_images([photo_folder])[0], tmp_path, "x")
    os.utime(photo_folder / "coffee.png", (1, 1))
    with pytest.raises(UserError, match="image 'coffee' has changed since"):
        build_lmdb_sets(find_keyed_images([photo_folder])[0], tmp_path, "x")


def test_sets_that_are_not_what_was_written_do_not_appear(tmp_path, photographs, monkeypatch):
    real = LmdbSet.close

    def damage(self):
        real(self)
        with lmdb.open(str(self._folder)) as environment, environment.begin(write=True) as transaction:
            transaction.put(b"coffee", transaction.get(b"chelsea"))

    monkeypatch.setattr(LmdbSet, "close", damage)
    with pytest.raises(
        UserError, match=r"1 of 3 .* 'coffee' has other bytes .* Build the set anew, by --restart"
    ):
        build_lmdb_sets(photographs, tmp_path, "x", crop_size=0)
    assert not (tmp_path / "x_HR.lmdb").exists()
    monkeypatch.undo()
    assert verify_lmdb(build_lmdb_sets(photographs, tmp_path, "x", crop_size=0, restart=True)[1]) == 3


def test_two_builds_of_one_set_at_once_are_refused(tmp_path, photographs, monkeypatch):
    monkeypatch.setattr(build_state, "_PATIENCE", 0.1)
    lock = FileLock(tmp_path / ".x_HR.lmdb.build.lock")
    with lock, pytest.raises(UserError, match="another process is building these sets"):
        build_lmdb_sets(photographs, tmp_path, "x", crop_size=0)


def test_builds_of_one_set_at_once_leave_one_whole_set(tmp_path, photographs):
    build = partial(build_lmdb_sets, photographs, tmp_path, "x", crop_size=0)
    with ThreadPoolExecutor(4) as pool:
        errors = [future.exception() for future in [pool.submit(build) for _ in range(4)]]
    refused = [error for error in errors if error is not None]
    assert len(refused) == 3 and all("exists already" in str(error) for error in refused)
    assert _names(tmp_path) == ["x_HR.lmdb"]
    assert verify_lmdb(tmp_path / "x_HR.lmdb") == 3


def test_full_disk_is_told(tmp_path, photographs, monkeypatch, esc_log):
    monkeypatch.setattr(LmdbSet, "commit", _disk_is_full)
    with pytest.raises(UserError, match=r"x_HR_sub\.lmdb cannot be written: .*No space left on device"):
        build_lmdb_sets(photographs, tmp_path, "x")
    assert esc_log == ["0 of 3 images are stored; the same command goes on from there"]
    monkeypatch.undo()
    assert len(_all(build_lmdb_sets(photographs, tmp_path, "x")[1])) == 3


def _disk_is_full(self):
    raise OSError(28, "No space left on device")


def test_existing_set_is_refused_unless_overwrite(tmp_path, photographs):
    sets = build_lmdb_sets(photographs, tmp_path, "x", crop_size=0)
    fewer = {"chelsea": photographs["chelsea"]}
    with pytest.raises(UserError, match=r"x_HR\.lmdb exists already: .*--overwrite"):
        build_lmdb_sets(fewer, tmp_path, "x", crop_size=0)
    assert len(ImageLMDB(sets[1])) == 3
    build_lmdb_sets(fewer, tmp_path, "x", crop_size=0, overwrite=True)
    assert list(_all(sets[1])) == ["chelsea"]


def test_error_begins_a_line_of_its_own(tmp_path, photo_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for file in photo_folder.iterdir():
        file.write_bytes(b"no image")
    command = ["lmdb", str(photo_folder), "-o", str(tmp_path / "out"), "--name", "x", "--workers", "1"]
    assert main(command) == 2
    *_, bar, error, rest = capsys.readouterr().err.split("\n")
    assert "making x in" in bar and "3/3" in bar and (error[:7], rest) == ("error: ", "")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_command_makes_the_sets_and_prints_them(tmp_path, photo_folder, capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
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
    labels = [f"estimating the space for DIV2K_train in {out}", f"making DIV2K_train in {out}"]
    labels += [f"checking {out / name}.partial" for name in names]
    bars = captured.err.split("\n")[:-1] if is_terminal else []
    assert all(f"{label}: 100%" in bar for label, bar in zip(labels, bars, strict=is_terminal)), bars
    assert captured.err.endswith("\n") if is_terminal else captured.err == ""
    assert _names(out) == names
    assert main([*command, "--scales", "2", "4"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a/b", ".x", ".."])
def test_command_refuses_a_name_that_is_a_path(photo_folder, tmp_path, capsys, name):
    assert main(["lmdb", str(photo_folder), "-o", str(tmp_path), "--name", name]) == 2
    assert "beginning of folder names, not a path" in capsys.readouterr().err


def test_command_tells_by_its_exit_code_that_images_were_skipped(tmp_path, photo_folder, capsys):
    (photo_folder / "coffee.jpg").write_bytes((photo_folder / "coffee.png").read_bytes())
    (photo_folder / "empty.png").touch()
    out = tmp_path / "out"
    assert main(["lmdb", str(photo_folder), "-o", str(out), "--name", "x", "--workers", "1"]) == 3
    assert capsys.readouterr().out == f"{out / 'x_HR_sub.lmdb'}\n"
    report = (out / "x_HR_sub.skipped.csv").read_text()
    assert "coffee.png,\"would be stored as 'coffee', as " in report and "is empty (0 bytes)" in report


def test_command_verifies_sets_and_names_each_that_is_damaged(tmp_path, photographs, capsys):
    sets = build_lmdb_sets(photographs, tmp_path, "x", scales=[2], crop_size=0)
    assert main(["lmdb", "--verify", *map(str, sets.values())]) == 0
    said = [f"{folder}: 3 records are as they should be" for folder in sets.values()]
    assert capsys.readouterr().out.splitlines() == said
    for folder in sets.values():
        (folder / "meta_info.txt").write_text("other.png (5,5,3) 0\n")
    assert main(["lmdb", "--verify", *map(str, sets.values())]) == 2
    errors = capsys.readouterr().err
    assert all(f"{folder}: 1 of 1 records are not what they should be" in errors for folder in sets.values())


def test_command_needs_a_place_and_a_name_to_make_sets(photo_folder, capsys):
    assert main(["lmdb", str(photo_folder)]) == 2
    assert "-o OUTPUT --name NAME" in capsys.readouterr().err
