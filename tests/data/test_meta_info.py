import os
import pickle

import numpy as np
import pytest

from esc_basicsr.common.errors import UserError
from esc_basicsr.data import meta_info
from esc_basicsr.data.dflip_dataset import DFLIPDataset
from esc_basicsr.data.meta_info import read_meta_info
from esc_basicsr.options.data_check import count_images, data_problems


@pytest.fixture
def listing(tmp_path):
    file = tmp_path / "meta_info.txt"
    file.write_text("a_s001.png (480,360,3) 1\nbé.png (8, 9, 3) 0\nc.x.png (1,2,1) 6\n", encoding="utf-8")
    return file


def test_keys_and_sizes_are_read(listing):
    keys, sizes = read_meta_info(listing)
    assert [*keys] == ["a_s001", "bé", "c"] and len(keys) == 3
    assert (keys[0], keys[1], keys[-1]) == ("a_s001", "bé", "c")
    assert keys == ["a_s001", "bé", "c"] and keys != ["a_s001", "b", "c"] and keys != 3
    assert "bé" in keys and keys.index("c") == 2
    with pytest.raises(IndexError):
        keys[3]
    np.testing.assert_array_equal(sizes, [[480, 360], [8, 9], [1, 2]])
    with pytest.raises(ValueError, match="read-only"):
        sizes[0, 0] = 1


def test_keys_that_run_together_alike_are_not_equal(tmp_path):
    lists = []
    for name, keys in (("one", ("ab", "c")), ("two", ("a", "bc"))):
        (tmp_path / name).write_text("".join(f"{key}.png (8,8,3) 1\n" for key in keys))
        lists.append(read_meta_info(tmp_path / name)[0])
    assert lists[0] != lists[1]
    assert lists[0] == pickle.loads(pickle.dumps(lists[0]))


def test_unchanged_list_is_read_once(listing):
    first = read_meta_info(listing)
    assert read_meta_info(listing)[0] is first[0]
    before = listing.stat().st_mtime_ns
    listing.write_text("d.png (8,8,3) 1\n")
    os.utime(listing, ns=(before, before + 10**9))
    assert [*read_meta_info(listing)[0]] == ["d"]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"a",
        b"a.png 1",
        b"\xff.png (8,8,3) 1",
        b".png (8,8,3) 1",
        b"a.\xff (8,8,3) 1",
        b"a.png (99999999999,8,3) 1",
    ],
)
def test_malformed_line_is_told(listing, line):
    listing.write_bytes(b"a.png (8,8,3) 1\n" + line + b"\nb.png (8,8,3) 1\n")
    with pytest.raises(UserError, match=r"meta_info\.txt, line 2: expected 'name\.png \(height,width,"):
        read_meta_info(listing)


def test_missing_and_empty_lists_are_told(listing):
    listing.write_text("")
    with pytest.raises(UserError, match=r"meta_info\.txt lists no images: rebuild the LMDB"):
        read_meta_info(listing)
    listing.unlink()
    with pytest.raises(UserError, match=r"meta_info\.txt cannot be read: No such file"):
        read_meta_info(listing)


def test_option_check_and_data_set_read_a_list_once(hr_lmdb):
    opt = {
        "name": "x",
        "type": "DFLIPDataset",
        "sources": [{"dataroot_gt": str(hr_lmdb)}],
        "scale": 2,
        "phase": "train",
        "gt_size": 48,
        "use_hflip": True,
        "use_rot": True,
    }
    meta_info._read.cache_clear()
    assert [*data_problems(opt, 2, True)] == [] and count_images(opt) == 3
    DFLIPDataset(opt)
    assert meta_info._read.cache_info().misses == 1
