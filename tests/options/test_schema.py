"""The schema: its kinds mean the same in Python and in JSON Schema, its defaults fit, and fill options."""

import copy
import math
import pickle
from typing import Any

import pytest
from basicsr.data import build_dataset
from jsonschema import Draft7Validator
from PIL import Image

from esc_basicsr.options.check import check_options
from esc_basicsr.options.kinds import Kind
from esc_basicsr.options.reference import json_schema
from esc_basicsr.options.schema import DATASETS, SECTIONS, UNSET, Option, fill_defaults, filled

TABLES = {**SECTIONS, **DATASETS}
OPTIONS = {f"{where}.{key}": option for where, table in TABLES.items() for key, option in table.items()}

VALUES: list[Any] = [
    # no 1.0, which for JSON Schema is an integer
    *(None, True, False, 0, 1, -1, -2, 2, 0.5, 0.999, -0.5, 1.5, 1e-9),
    *(10**6, 10**6 + 1, 65535, 65536, 10**9, 10**9 + 1, 1000, 1001),
    *("", "x", ".", "..", "a/b", "a\\\\b", "{}", "{}x4", "mean", "auto", "bf16", "nccl", "5e-4", "~", "y"),
    *([], [1], [0], ["x"], [0.5, 0.5], [0.5], [0.5, 1], [1, 2, 3], [True], {}, {"a": 1}, [{}]),
]


@pytest.mark.parametrize("key", OPTIONS)
def test_a_kind_accepts_the_same_in_python_and_in_json_schema(key):
    kind: Kind = OPTIONS[key].kind
    validator = Draft7Validator(dict(kind.json))
    differ = [value for value in VALUES if kind.accepts(value) != validator.is_valid(value)]
    assert differ == []


@pytest.mark.parametrize("key", OPTIONS)
def test_an_option_is_described_and_its_default_fits(key):
    option: Option = OPTIONS[key]
    assert option.doc.endswith(".")
    if option.default is not UNSET:
        assert option.kind.accepts(option.default)


def test_numbers_that_are_none_are_no_numbers():
    for option in OPTIONS.values():
        if option.kind.json.get("type") in ("number", "integer"):
            assert not option.kind.accepts(math.nan)
            assert not option.kind.accepts(math.inf)


def test_filled_options_have_every_default_and_what_was_given(sound_options):
    sound_options["model_type"] = "ESCModel"
    sound_options["train"]["max_skipped"] = 3
    before = copy.deepcopy(sound_options)
    full = filled(sound_options)
    assert sound_options == before
    assert (full.train.max_skipped, full.train.accumulate, full.train.clip_grad_norm) == (3, 1, None)
    assert (full.val.batch_size, full.logger.wandb.resume_id, full.dist_params.timeout) == (1, None, 60)
    assert full.datasets.train.max_unreadable == 10
    assert (full.find_unused_parameters, full.path.param_key_g) == (False, "params")
    # these sections are arguments of a class
    for key in ("optim_g", "scheduler", "pixel_opt"):
        assert full.train[key] == before["train"][key]
    assert full.network_g == before["network_g"]
    assert full.val.metrics == before["val"]["metrics"]


def test_filled_options_fill_the_sources_of_a_data_set():
    train = {"type": "DFLIPDataset", "sources": [{"dataroot_gt": "x"}, {"dataroot_gt": "y", "weight": 2}]}
    full = filled({"model_type": "ESCModel", "datasets": {"train": train}})
    assert [source.weight for source in full.datasets.train.sources] == [1, 2]
    assert full.val is None
    assert full.datasets.train.lq_on_device is False


def test_basicsr_builds_a_data_set_of_single_images_from_filled_options(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    test = {"name": "x", "type": "SingleImageDataset", "dataroot_lq": str(tmp_path)}
    test["io_backend"] = {"type": "disk"}
    full = filled({"model_type": "ESCModel", "datasets": {"test_1": test}})
    assert len(build_dataset(full["datasets"]["test_1"])) == 1


@pytest.mark.parametrize("model", ["SRModel", "ESCModel"])
def test_filled_options_are_sound_and_stay_so(sound_options, model):
    sound_options["model_type"] = model
    sound_options["datasets"]["train"]["global_batch_size"] = 4
    full = filled(sound_options)
    check_options(full, "filled.yml", is_train=True)
    assert filled(full) == full
    assert "amp" in full.train and ("channels_last" in full) == (model == "ESCModel")


def test_filled_options_can_be_pickled_and_name_what_is_missing(sound_options):
    full = filled(sound_options)
    assert pickle.loads(pickle.dumps(full)) == full
    with pytest.raises(AttributeError, match="clip_grad_nrom"):
        _ = full.train.clip_grad_nrom


def test_defaults_that_are_filled_in_are_nobody_elses() -> None:
    before = json_schema()
    opt: dict[str, Any] = {
        "model_type": "ESCModel",
        "train": {},
        "val": {},
        "logger": {},
        "path": {},
        "datasets": {},
    }
    fill_defaults(opt)
    for section in [opt, *opt.values()]:
        for value in section.values() if isinstance(section, dict) else ():
            if isinstance(value, list):
                value.append("mine")
            elif isinstance(value, dict):
                value["mine"] = True
    assert json_schema() == before
