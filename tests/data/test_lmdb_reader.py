import multiprocessing
import pickle
import shutil

import cv2
import lmdb
import numpy as np
import pytest

from esc_basicsr.common.errors import UserError
from esc_basicsr.data import lmdb_reader
from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets
from esc_basicsr.data.lmdb_reader import ImageLMDB


def _read(images, index, queue):
    queue.put(images.read(index))


def test_images_are_read_in_bgr_with_keys_and_sizes(hr_lmdb, photographs):
    images = ImageLMDB(hr_lmdb)
    assert images.keys == list(photographs) and len(images) == 3
    np.testing.assert_array_equal(images.sizes, [photo.shape[:2] for photo in photographs.values()])
    for index, photo in enumerate(photographs.values()):
        np.testing.assert_array_equal(images.read(index), photo[:, :, ::-1])


def test_forked_process_reads_after_the_main_process_has_read(hr_lmdb, photographs):
    images = ImageLMDB(hr_lmdb)
    images.read(0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_read, args=(images, 1, queue))
    process.start()
    from_child = queue.get(timeout=120)
    process.join()
    np.testing.assert_array_equal(from_child, photographs["chelsea"][:, :, ::-1])
    np.testing.assert_array_equal(images.read(2), photographs["coffee"][:, :, ::-1])


def _environments_differ(images, inherited, queue):
    images.read(0)
    queue.put(images._environment is not inherited)


def test_forked_process_never_uses_the_environment_opened_before_the_fork(hr_lmdb):
    images = ImageLMDB(hr_lmdb)
    images.read(0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_environments_differ, args=(images, images._environment, queue))
    process.start()
    assert queue.get(timeout=60)
    process.join()


def test_pickle_leaves_the_environment_behind(hr_lmdb):
    images = ImageLMDB(hr_lmdb)
    expected = images.read(1)
    copy = pickle.loads(pickle.dumps(images))
    assert copy._environment is None
    np.testing.assert_array_equal(copy.read(1), expected)


def test_two_readers_of_one_lmdb_live_in_one_process(hr_lmdb):
    first, second = ImageLMDB(hr_lmdb), ImageLMDB(str(hr_lmdb) + "/")
    np.testing.assert_array_equal(first.read(0), second.read(0))
    del first
    second.read(1)


def test_lmdb_replaced_under_the_same_name_is_read_anew(tmp_path, photographs):
    old = ImageLMDB(build_lmdb_sets(photographs, tmp_path, "x", crop_size=0)[1])
    old.read(0)
    inverted = {key: 255 - photo for key, photo in photographs.items()}
    new = ImageLMDB(build_lmdb_sets(inverted, tmp_path, "x", crop_size=0, overwrite=True)[1])
    np.testing.assert_array_equal(new.read(0), 255 - old.read(0))


def test_lmdb_written_by_basicsr_is_read(tmp_path, photo_folder, photographs):
    from basicsr.utils.lmdb_util import make_lmdb_from_imgs

    keys = sorted(photographs)
    path = tmp_path / "basicsr.lmdb"
    make_lmdb_from_imgs(str(photo_folder), str(path), [f"{key}.png" for key in keys], keys)
    images = ImageLMDB(path)
    assert images.keys == keys
    np.testing.assert_array_equal(images.read(2), photographs["coffee"][:, :, ::-1])


def test_gray_record_is_read_in_three_channels(hr_lmdb):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    _put(hr_lmdb, b"chelsea", cv2.imencode(".png", gray)[1].tobytes())
    np.testing.assert_array_equal(ImageLMDB(hr_lmdb).read(1), np.repeat(gray[..., None], 3, axis=2))


@pytest.mark.parametrize("compression", [0, 1])
def test_windows_are_those_of_the_image(tmp_path, photographs, compression):
    images = ImageLMDB(build_lmdb_sets(photographs, tmp_path, "x", crop_size=0, compression=compression)[1])
    for index, photo in enumerate(photographs.values()):
        for window in ((0, 0, *photo.shape[:2]), (photo.shape[0] - 40, photo.shape[1] - 50, 40, 50)):
            top, left, height, width = window
            expected = photo[top : top + height, left : left + width, ::-1]
            np.testing.assert_array_equal(images.read_crop(index, *window), expected)


def test_windows_of_a_gray_record_have_three_channels(hr_lmdb):
    gray = np.arange(120 * 96, dtype=np.uint8).reshape(96, 120)
    _put(hr_lmdb, b"chelsea", cv2.imencode(".png", gray)[1].tobytes())
    crop = ImageLMDB(hr_lmdb).read_crop(1, 5, 6, 20, 30)
    np.testing.assert_array_equal(crop, np.repeat(gray[5:25, 6:36, None], 3, axis=2))


def test_window_of_a_stored_record_is_read_without_decoding(hr_lmdb, photographs, monkeypatch):
    def refuse(data, origin):
        raise AssertionError(f"{origin} is decoded")

    monkeypatch.setattr(lmdb_reader, "decode_image", refuse)
    crop = ImageLMDB(hr_lmdb).read_crop(2, 8, 4, 32, 16)
    np.testing.assert_array_equal(crop, photographs["coffee"][8:40, 4:20, ::-1])


@pytest.mark.parametrize("compression", [0, 1])
def test_record_of_another_size_than_meta_info_states_is_named(tmp_path, photographs, compression):
    path = build_lmdb_sets(photographs, tmp_path, "x", crop_size=0, compression=compression)[1]
    (path / "meta_info.txt").write_text("astronaut.png (480,480,3) 0\n")
    with pytest.raises(UserError, match=r"record 'astronaut' of .* is 125x113, but meta_info.txt says 480"):
        ImageLMDB(path).read_crop(0, 0, 0, 48, 48)


@pytest.mark.parametrize(
    "window", [(-1, 0, 8, 8), (0, -1, 8, 8), (89, 0, 8, 8), (0, 113, 8, 8), (0, 0, 0, 8), (0, 0, 8, 0)]
)
def test_window_outside_the_image_is_refused(hr_lmdb, window):
    with pytest.raises(ValueError, match="is not within 120x96"):
        ImageLMDB(hr_lmdb).read_crop(1, *window)


def _put(path, key, value):
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        if value is None:
            transaction.delete(key)
        else:
            transaction.put(key, value)


def test_missing_folder_is_told_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"none\.lmdb does not exist.*python -m esc_basicsr lmdb"):
        ImageLMDB(tmp_path / "none.lmdb")


@pytest.mark.parametrize("name", ["data.mdb", "meta_info.txt"])
def test_missing_file_is_told(hr_lmdb, name):
    (hr_lmdb / name).unlink()
    with pytest.raises(UserError, match=rf"has no {name}"):
        ImageLMDB(hr_lmdb)


@pytest.mark.parametrize("line", ["astronaut", "", "astronaut.png 113 125 3"])
def test_malformed_meta_info_is_told_with_its_line(hr_lmdb, line):
    (hr_lmdb / "meta_info.txt").write_text(f"chelsea.png (96,120,3) 1\n{line}\n")
    with pytest.raises(UserError, match=r"meta_info\.txt, line 2: expected 'name\.png"):
        ImageLMDB(hr_lmdb)


def test_empty_meta_info_is_told(hr_lmdb):
    (hr_lmdb / "meta_info.txt").write_text("")
    with pytest.raises(UserError, match="lists no images"):
        ImageLMDB(hr_lmdb)


def test_missing_record_is_told_with_its_key(hr_lmdb):
    _put(hr_lmdb, b"chelsea", None)
    for read in (lambda images: images.read(1), lambda images: images.read_crop(1, 0, 0, 8, 8)):
        with pytest.raises(UserError, match=r"photos_HR\.lmdb has no record 'chelsea'"):
            read(ImageLMDB(hr_lmdb))


@pytest.mark.parametrize("value", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_undecodable_record_is_told_with_its_key(hr_lmdb, value):
    _put(hr_lmdb, b"chelsea", value)
    with pytest.raises(UserError, match=r"record 'chelsea' of the LMDB .* cannot be decoded"):
        ImageLMDB(hr_lmdb).read(1)


def test_damaged_data_file_is_told(hr_lmdb):
    (hr_lmdb / "data.mdb").write_bytes(b"damaged" * 2000)
    with pytest.raises(UserError, match=r"cannot be (read|opened)"):
        ImageLMDB(hr_lmdb).read(0)


def test_data_file_removed_after_the_keys_were_read_is_told(hr_lmdb):
    images = ImageLMDB(hr_lmdb)
    shutil.rmtree(hr_lmdb)
    with pytest.raises(UserError, match=r"cannot be (read|opened)"):
        images.read(0)
