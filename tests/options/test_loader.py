"""Option files are read as BasicSR reads them, safely, and mistakes are reported with file and line."""

import os
import time
from collections import OrderedDict
from pathlib import Path

import pytest

from esc_basicsr.common.errors import UserError
from esc_basicsr.options.loader import MAX_BYTES, load_options


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "options.yml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_options(path, overrides)
    return str(caught.value)


def test_values_follow_yaml_1_1(tmp_path):
    text = "a: 5e-4\nb: 5.0e-4\nc: on\nd: 010\ne: ~\nf: [1, 2.5, x]\ng: !!float 5e3\nh: '1'\n"
    expected = {
        "a": "5e-4",
        "b": 0.0005,
        "c": True,
        "d": 8,
        "e": None,
        "f": [1, 2.5, "x"],
        "g": 5000.0,
        "h": "1",
    }
    assert load_options(write(tmp_path, text)) == expected


def test_order_of_keys_is_the_files_order_at_every_depth(tmp_path):
    options = load_options(write(tmp_path, "z: 1\na:\n  y: 1\n  b: 2\nm: 3\n"))
    assert isinstance(options["a"], OrderedDict)
    assert list(options) == ["z", "a", "m"]
    assert list(options["a"]) == ["y", "b"]


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert load_options(write(tmp_path, "\ufeffname: x\n")) == {"name": "x"}


def test_anchors_aliases_and_merge_keys_work(tmp_path):
    text = (
        "scale: &scale 4\n"
        "disk: &disk\n  type: disk\n  size: *scale\n"
        "val_1: &val\n  <<: *disk\n  size: 2\n"
        "val_2:\n  <<: [*val, *disk]\n  name: x\n"
    )
    options = load_options(write(tmp_path, text))
    assert options["disk"] == {"type": "disk", "size": 4}
    assert options["val_1"] == {"type": "disk", "size": 2}
    assert options["val_2"] == {"type": "disk", "size": 2, "name": "x"}


def test_a_key_given_twice_is_refused_with_file_line_and_key(tmp_path):
    path = write(tmp_path, "train:\n  lr: 1\n  gamma: 2\n  lr: 3\n")
    assert refusal(path) == f"{path}, line 4: the key 'lr' is given twice, first on line 2. Keep one."


@pytest.mark.parametrize(
    ("text", "line", "got"),
    [
        ("num_gpu:0\nname: x\n", 1, "num_gpu:0"),
        ("name: x\nnum_gpu:0\n", 2, "num_gpu:0"),
        ("train:\n  lr: 1\n  gamma:0.5  # half\n\n  # more\nname: x\n", 3, "gamma:0.5"),
        ("sources:\n- weight:1\n  dataroot_gt: x\n", 2, "weight:1"),
    ],
)
def test_a_space_missing_after_a_colon_is_reported_with_its_line(tmp_path, text, line, got):
    path = write(tmp_path, text)
    assert refusal(path) == f"{path}, line {line}: got '{got}'. Is a space missing after the colon?"


def test_another_mistake_after_a_line_with_a_web_address_is_not_taken_for_a_missing_space(tmp_path):
    path = write(tmp_path, "a: http://x.y\nb: c: d\n")
    assert refusal(path) == f"{path}, line 2: mapping values are not allowed here."


def test_a_merge_key_given_twice_is_refused(tmp_path):
    path = write(tmp_path, "a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n")
    assert "line 4: the key '<<' is given twice" in refusal(path)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch ran']",
        "!!python/tuple [1, 2]",
        "!!python/name:os.system",
        "!mine 1",
    ],
)
def test_tags_that_make_python_objects_are_refused(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, f"name: x\nscale: {tag}\n")
    message = refusal(path)
    assert message.startswith(f"{path}, line 2: the tag '")
    assert message.endswith("Remove the tag.")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "expected 'key: value' lines, got nothing"),
        ("- 1\n- 2\n", "got a list"),
        ("just words", "got a str"),
        ("a: [1, 2\nb: 3\n", "line 2: while parsing a flow sequence"),
        ("a: 1\n\tb: 2\n", "line 2: "),
        ("a: *nowhere\n", "line 1: found undefined alias"),
        ("a: &a [*a]\n", "line 1: an alias that contains itself"),
        ("[a, b]: 1\n", "line 1: expected a plain name as key"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a: !!bool perhaps\n", "not readable as YAML"),
        ("a: !!int ''\n", "not readable as YAML"),
        ("a: 2024-99-99\n", "not readable as YAML"),
        ("a: 9223372036854775808\n", "line 1: a number of more than 64 bits"),
        ("a: 1" + ":1" * 5000, "line 1: a number of more than 64 bits"),
        ("!!map x: 1\n", "expected 'key: value' lines after the tag !!map"),
        ("a: \x00\n", "not readable as YAML: unacceptable character"),
        ("a: " + "[" * 2000, "nested too deeply"),
    ],
)
def test_what_is_not_an_option_file_is_refused(tmp_path, text, part):
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(str(path))
    assert part in message


def test_aliases_of_aliases_cannot_grow_without_bound(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "more than 20,000 values, aliases written out" in refusal(write(tmp_path, "\n".join(lines)))


def test_binary_garbage_is_refused(tmp_path):
    path = tmp_path / "net_g_latest.pth"
    path.write_bytes(b"PK\x03\x04\n\xff\xfe\x00")
    assert refusal(path) == f"{path}, line 2: not UTF-8 text. Is this an option file?"


def test_a_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "huge.yml"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert f"has {MAX_BYTES + 1:,} bytes" in refusal(path)


def test_a_folder_is_refused(tmp_path):
    assert f"{tmp_path} is a folder; expected an option file" in refusal(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a device or a pipe" in refusal(tmp_path / "pipe")


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    (tmp_path / "ESC_x2_DIV2K.yml").write_text("name: x\n")
    message = refusal(tmp_path / "ESC_x2_DIV2k.yml")
    assert "no such option file" in message
    assert "Did you mean 'ESC_x2_DIV2K.yml'?" in message


def test_a_path_that_cannot_exist_is_refused():
    assert "cannot read the option file" in refusal(Path("a\x00b.yml"))


def test_overrides_set_values_of_each_kind(tmp_path):
    path = write(
        tmp_path,
        "name: x\ntrain:\n  lr: 1.0\n  milestones: [1]\n  pixel_opt: {type: A}\nval: {suffix: y, pbar: no}\n",
    )
    options = load_options(
        path,
        [
            "name = other",
            "train:lr=5e-4",
            "train:milestones=[1e5, 200000]",
            "train:pixel_opt:type=L1Loss",
            "val:suffix=None",
            "val:pbar=true",
        ],
    )
    assert options == {
        "name": "other",
        "train": {"lr": 0.0005, "milestones": [1e5, 200000], "pixel_opt": {"type": "L1Loss"}},
        "val": {"suffix": None, "pbar": True},
    }


@pytest.mark.parametrize(
    ("entry", "changes"),
    [
        ("train:clip_grad_norm=1", {"train": {"lr": 1.0, "clip_grad_norm": 1}}),
        ("cpu_kernels=true", {"cpu_kernels": True}),
        ("dist_params:timeout=90", {"dist_params": {"timeout": 90}}),
        ("logger:wandb:project=mine", {"logger": {"wandb": {"project": "mine"}}}),
        ("train:pixel_opt:type=L1Loss", {"train": {"lr": 1.0, "pixel_opt": {"type": "L1Loss"}}}),
        ("network_g:dim=32", {"network_g": {"type": "ESC", "dim": 32}}),
        (
            "datasets:val:pin_memory=true",
            {"datasets": {"val": {"type": "PairedImageDataset", "pin_memory": True}}},
        ),
        (
            "datasets:val:filename_tmpl='{}x2'",
            {"datasets": {"val": {"type": "PairedImageDataset", "filename_tmpl": "{}x2"}}},
        ),
        ("val:metrics:niqe:type=calculate_niqe", {"val": {"metrics": {"niqe": {"type": "calculate_niqe"}}}}),
        (
            "datasets:val_2:name=Set14",
            {"datasets": {"val": {"type": "PairedImageDataset"}, "val_2": {"name": "Set14"}}},
        ),
        (
            "datasets:val:io_backend:type=disk",
            {"datasets": {"val": {"type": "PairedImageDataset", "io_backend": {"type": "disk"}}}},
        ),
    ],
)
def test_an_override_sets_any_key_that_the_file_lacks(tmp_path, entry, changes):
    text = "train: {lr: 1.0}\nlogger: {wandb: ~}\nnetwork_g: {type: ESC}\n"
    path = write(tmp_path, f"{text}datasets: {{val: {{type: PairedImageDataset}}}}\n")
    assert load_options(path, [entry]) == {**load_options(path), **changes}


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("-2E5", -2e5), (".5e1", 5.0), ("1e", "1e"), ("a=b", "a=b")]
)
def test_override_numbers_are_read_as_python_reads_them(tmp_path, text, value):
    assert load_options(write(tmp_path, "a: 0\n"), [f"a={text}"]) == {"a": value}


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("train:ema_decay", "expected keys and a value"),
        ("=3", "expected keys and a value"),
        ("train::lr=3", "expected keys and a value"),
        ("name:lr=3", "'name' is not a section"),
        ("train={lr: 3}", "expected one value or a list"),
        ("name=[1", "while parsing a flow sequence"),
        ("name=!!python/object/apply:os.getcwd []", "is not allowed"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(tmp_path, entry, part):
    message = refusal(write(tmp_path, "name: x\ntrain: {lr: 1.0}\n"), entry)
    assert message.startswith(f"--force_yml {entry}")
    assert part in message


def test_an_override_evaluates_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = load_options(write(tmp_path, "a: 1\n"), ["a=[__import__('os').mkdir('ran')]"])
    assert options == {"a": ["__import__('os').mkdir('ran')"]}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("line", [" " * 90_000 + "x y", "a:b" + " " * 90_000 + "c", " " * 90_000 + "#"])
def test_long_lines_of_spaces_are_read_at_once(tmp_path, line):
    before = time.process_time()
    refusal(write(tmp_path, f"{line}\nb: c: d\n"))
    assert time.process_time() - before < 5
