import collections
import random
from functools import partial

import lmdb
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets
from esc_basicsr.data.degradation import make_pair, reduce_uint8
from esc_basicsr.data.dflip_dataset import DFLIPDataset
from esc_basicsr.data.lmdb_reader import ImageLMDB


@pytest.fixture
def opt(hr_lmdb):
    """Training options over the three photographs."""
    return {
        "name": "photos",
        "type": "DFLIPDataset",
        "sources": [{"dataroot_gt": str(hr_lmdb)}],
        "gt_size": 48,
        "use_hflip": True,
        "use_rot": True,
        "scale": 4,
        "phase": "train",
    }


@pytest.fixture
def numbered(tmp_path):
    """LMDBs of n flat images each, image i of the value i."""

    def build(name, n):
        images = {f"{name}{i:03d}": np.full((4, 4, 3), i, np.uint8) for i in range(n)}
        return str(build_lmdb_sets(images, tmp_path, name, crop_size=0)[1])

    return build


def _mix(opt, *sources):
    return DFLIPDataset(opt | {"sources": list(sources), "gt_size": 4, "use_hflip": False, "use_rot": False})


def _epoch(data_set):
    """Visits of one epoch: key -> how often."""
    return collections.Counter(data_set[i]["gt_path"].rsplit("/")[-1] for i in range(len(data_set)))


def _to_uint8(tensor):
    return (tensor * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_item_is_a_crop_in_rgb_and_its_reduction(opt, hr_lmdb, photographs):
    data_set = DFLIPDataset(opt | {"use_hflip": False, "use_rot": False})
    assert len(data_set) == 3
    for index, (key, photo) in enumerate(photographs.items()):
        item = data_set[index]
        assert item["gt"].shape == (3, 48, 48) and item["lq"].shape == (3, 12, 12)
        assert item["gt"].dtype == item["lq"].dtype == torch.float32
        assert item["gt_path"] == item["lq_path"] == f"{hr_lmdb}/{key}"
        windows = np.lib.stride_tricks.sliding_window_view(photo, (48, 48, 3))
        crop = _to_uint8(item["gt"])
        assert (windows == crop).all(axis=(2, 3, 4, 5)).any()
        np.testing.assert_array_equal(_to_uint8(item["lq"]), reduce_uint8(crop, 4))


@pytest.mark.parametrize("compression", [0, 1])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_items_are_to_the_bit_what_decoding_cropping_and_reducing_in_turn_give(
    opt, tmp_path, photographs, scale, compression
):
    path = build_lmdb_sets(photographs, tmp_path, "x", crop_size=0, compression=compression)[1]
    data_set = DFLIPDataset(opt | {"scale": scale, "sources": [{"dataroot_gt": str(path)}]})
    random.seed(3)
    items = [data_set[index] for index in (0, 1, 2) * 8]
    random.seed(3)
    for item, photo in zip(items, list(photographs.values()) * 8, strict=True):
        top, left = (random.randint(0, side - 48) for side in photo.shape[:2])
        hr = photo[top : top + 48, left : left + 48]
        hr = hr[:, ::-1] if random.random() < 0.5 else hr
        hr = hr[::-1] if random.random() < 0.5 else hr
        hr = hr.transpose(1, 0, 2) if random.random() < 0.5 else hr
        for kind, expected in (("gt", hr), ("lq", reduce_uint8(hr, scale))):
            tensor = torch.from_numpy(np.ascontiguousarray(expected.transpose(2, 0, 1))).float().div_(255)
            assert torch.equal(item[kind], tensor)


@pytest.mark.parametrize("phase", ["train", "val"])
def test_left_to_the_model_lr_is_the_loaders_to_one_level(opt, phase):
    opt["phase"] = phase
    data_set, hr_alone = DFLIPDataset(opt), DFLIPDataset(opt | {"lq_on_device": True})
    for index in (0, 1, 2):
        random.seed(index)
        expected = data_set[index]
        random.seed(index)
        item = hr_alone[index]
        assert set(item) == {"gt", "gt_path", "lq_path"} and item["gt"].dtype == torch.uint8
        pair = make_pair(item["gt"][None], 4, torch.float64)
        assert torch.equal(pair["gt"][0], expected["gt"])
        difference = (_to_uint8(pair["lq"][0]).astype(int) - _to_uint8(expected["lq"])).ravel()
        assert np.abs(difference).max() <= 1 and np.count_nonzero(difference) <= 1


def test_values_equal_basicsr_float_conversion(opt):
    item = DFLIPDataset(opt)[0]
    for kind in ("gt", "lq"):
        eight_bit = _to_uint8(item[kind]).transpose(2, 0, 1)
        np.testing.assert_array_equal(item[kind].numpy(), eight_bit.astype(np.float32) / 255.0)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_lr_is_the_reduction_of_the_augmented_crop(opt, scale):
    data_set = DFLIPDataset(opt | {"scale": scale})
    for index in (0, 1, 2) * 4:
        item = data_set[index]
        np.testing.assert_array_equal(_to_uint8(item["lq"]), reduce_uint8(_to_uint8(item["gt"]), scale))


@pytest.mark.parametrize(
    ("hflip", "rot", "variants"), [(False, False, 1), (True, False, 2), (False, True, 4), (True, True, 8)]
)
def test_flips_and_turns_are_those_asked_for(opt, tmp_path, hflip, rot, variants):
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    image = np.repeat(image[..., None], 3, axis=2)
    path = build_lmdb_sets({"a": image}, tmp_path, "one", crop_size=0)[1]
    changes = {"sources": [{"dataroot_gt": path}], "gt_size": 4, "use_hflip": hflip, "use_rot": rot}
    data_set = DFLIPDataset(opt | changes)
    random.seed(0)
    seen = {_to_uint8(data_set[0]["gt"])[..., 0].tobytes() for _ in range(100)}
    group = {np.ascontiguousarray(np.rot90(view, turns)).tobytes()
             for view in (image[..., 0], image[:, ::-1, 0]) for turns in range(4)}  # fmt: skip
    assert len(seen) == variants and seen <= group


def test_crops_reach_every_edge(opt, tmp_path):
    image = np.zeros((50, 50, 3), np.uint8)
    image[0], image[-1], image[:, 0], image[:, -1] = 10, 20, 30, 40
    path = build_lmdb_sets({"a": image}, tmp_path, "one", crop_size=0)[1]
    data_set = DFLIPDataset(opt | {"sources": [{"dataroot_gt": path}], "use_hflip": False, "use_rot": False})
    random.seed(0)
    edges = set()
    for _ in range(60):
        crop = _to_uint8(data_set[0]["gt"])
        edges |= {int(crop[0, 20, 0]), int(crop[-1, 20, 0]), int(crop[20, 0, 0]), int(crop[20, -1, 0])}
    assert edges == {0, 10, 20, 30, 40}


def test_equal_seeds_give_equal_items(opt):
    data_set = DFLIPDataset(opt)
    random.seed(7)
    first = [data_set[i]["gt"] for i in range(3)]
    random.seed(7)
    assert all(torch.equal(data_set[i]["gt"], one) for i, one in enumerate(first))
    assert not all(torch.equal(data_set[i]["gt"], one) for i, one in enumerate(first))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_after_the_main_process_has_read(opt, method):
    from basicsr.data import worker_init_fn

    data_set = DFLIPDataset(opt)
    data_set[0]
    loader = DataLoader(
        data_set,
        batch_size=3,
        num_workers=1,
        multiprocessing_context=method,
        worker_init_fn=partial(worker_init_fn, num_workers=1, rank=0, seed=5),
    )
    (batch,) = list(loader)
    random.seed(5)
    assert torch.equal(batch["gt"], torch.stack([data_set[i]["gt"] for i in range(3)]))
    assert batch["lq"].shape == (3, 3, 12, 12)


def test_two_sets_over_one_lmdb_share_forked_workers(opt):
    both = DFLIPDataset(opt), DFLIPDataset(opt | {"phase": "val"})
    both[0][0], both[1][0]
    joined = torch.utils.data.ConcatDataset(both)
    sizes = [
        item["gt"].shape
        for item in DataLoader(joined, batch_size=None, num_workers=2, multiprocessing_context="fork")
    ]
    assert sizes == [(3, 48, 48)] * 3 + [(3, 112, 124), (3, 96, 120), (3, 96, 96)]


@pytest.mark.parametrize("phase", ["val", "test"])
def test_validation_takes_whole_images_cut_to_the_scale_each_once(opt, photographs, phase):
    opt["sources"][0]["weight"] = 3.0
    data_set = DFLIPDataset({key: opt[key] for key in ("name", "sources")} | {"scale": 3, "phase": phase})
    assert len(data_set) == 3
    for item, photo in zip(data_set, photographs.values(), strict=True):
        height, width = (side - side % 3 for side in photo.shape[:2])
        np.testing.assert_array_equal(_to_uint8(item["gt"]), photo[:height, :width])
        np.testing.assert_array_equal(
            _to_uint8(item["lq"]), reduce_uint8(np.ascontiguousarray(photo[:height, :width]), 3)
        )


def test_epoch_is_as_long_as_the_weights_say(opt, numbered):
    a, b, c = numbered("a", 10), numbered("b", 7), numbered("c", 5)
    sources = {"dataroot_gt": a}, {"dataroot_gt": b, "weight": 0.5}, {"dataroot_gt": c, "weight": 2}
    data_set = _mix(opt, *sources)
    assert len(data_set) == 10 + 4 + 10
    visits = _epoch(data_set)
    assert [sum(n for key, n in visits.items() if key[0] == name) for name in "abc"] == [10, 4, 10]


@pytest.mark.parametrize("weight", [1, 2, 3])
def test_whole_weight_visits_every_image_that_often(opt, numbered, weight):
    data_set = _mix(opt, {"dataroot_gt": numbered("a", 9), "weight": weight})
    assert set(_epoch(data_set).values()) == {weight} and len(_epoch(data_set)) == 9


def test_half_weight_visits_one_of_each_successive_two(opt, numbered):
    data_set = _mix(opt, {"dataroot_gt": numbered("a", 20), "weight": 0.5})
    random.seed(0)
    total = collections.Counter()
    for _ in range(200):
        visits = _epoch(data_set)
        assert sorted(int(key[1:]) // 2 for key in visits) == list(range(10))
        total += visits
    # 200 fair coins: standard deviation 7
    assert len(total) == 20 and all(65 <= n <= 135 for n in total.values())


@pytest.mark.parametrize(("n", "weight"), [(7, 0.3), (7, 1.5), (3, 0.5), (5, 2.7)])
def test_any_weight_visits_images_evenly(opt, numbered, n, weight):
    data_set = _mix(opt, {"dataroot_gt": numbered("a", n), "weight": weight})
    random.seed(1)
    total = collections.Counter()
    for _ in range(400):
        total += _epoch(data_set)
    mean = 400 * len(data_set) / n
    assert len(total) == n and all(abs(visits - mean) < 5 * mean**0.5 for visits in total.values())


def test_items_come_through_basicsr_loader(opt):
    from basicsr.data import build_dataloader, build_dataset

    loader_keys = {"batch_size_per_gpu": 2, "num_worker_per_gpu": 1}
    data_set = build_dataset(opt | loader_keys)
    assert isinstance(data_set, DFLIPDataset) and data_set.opt["name"] == "photos"
    (batch,) = list(build_dataloader(data_set, opt | loader_keys, seed=3))
    assert batch["gt"].shape == (2, 3, 48, 48)


def test_index_beyond_the_epoch_is_refused(opt):
    with pytest.raises(IndexError, match="index 3 is not below its length 3"):
        DFLIPDataset(opt)[3]


def test_weight_that_visits_nothing_is_refused(opt):
    opt["sources"][0]["weight"] = 0.1
    with pytest.raises(UserError, match=r"with weight 0\.1 none of its 3 images is visited"):
        DFLIPDataset(opt)


def test_missing_lmdb_is_told(opt):
    with pytest.raises(UserError, match=r"datasets/none\.lmdb does not exist"):
        DFLIPDataset(opt | {"sources": [{"dataroot_gt": "datasets/none.lmdb"}]})


def test_image_smaller_than_gt_size_is_named_before_training(opt):
    message = (
        r"'chelsea' of .*photos_HR\.lmdb is 120x96, smaller than gt_size 100 \(2 such in all\): take its line"
    )
    with pytest.raises(UserError, match=message):
        DFLIPDataset(opt | {"gt_size": 100})


def test_image_of_another_size_than_meta_info_says_is_named(opt, hr_lmdb):
    (hr_lmdb / "meta_info.txt").write_text("astronaut.png (480,480,3) 1\n")
    with pytest.raises(UserError, match=r"'astronaut' of .* is 125x113, but meta_info.txt says 480x480"):
        DFLIPDataset(opt | {"gt_size": 120})[0]


def test_undecodable_record_in_a_worker_is_named(opt, hr_lmdb):
    with lmdb.open(str(hr_lmdb)) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"chelsea", b"no image")
    loader = DataLoader(DFLIPDataset(opt), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(UserError, match=r"record 'chelsea' of the LMDB .*photos_HR\.lmdb cannot be decoded"):
        list(loader)


def test_reading_leaves_the_lmdb_unchanged(opt, hr_lmdb):
    before = (hr_lmdb / "data.mdb").read_bytes()
    data_set = DFLIPDataset(opt)
    for index in range(3):
        data_set[index]
    assert (hr_lmdb / "data.mdb").read_bytes() == before
    assert ImageLMDB(hr_lmdb).keys == ["astronaut", "chelsea", "coffee"]
