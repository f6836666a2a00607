"""What `fuzz` tries: hostile inputs by kind, and the entries of the package that they go through."""

import contextlib
import copy
import io
import logging
import os
import pickle
import random
import socket
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.utils.tensorboard
import yaml
from PIL import Image
from safetensors.torch import save as save_safetensors
from tiny_training import SCALE, paired, training_options, write_images

from esc_basicsr.__main__ import main
from esc_basicsr.archs import ESC
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building.lmdb_verification import verify_lmdb
from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets
from esc_basicsr.data.image_codec import decode_image
from esc_basicsr.data.lmdb_reader import ImageLMDB
from esc_basicsr.data.loaders import create_train_val_dataloader
from esc_basicsr.data.source_image import decode_source_image, source_image_size
from esc_basicsr.options.check import check_options
from esc_basicsr.options.data_check import data_problems
from esc_basicsr.options.loader import load_options
from esc_basicsr.options.recipes import option_files
from esc_basicsr.training.checkpoints import load_resume_state
from esc_basicsr.training.esc_model import ESCModel
from esc_basicsr.weights.fit import load_weights
from esc_basicsr.weights.read import read_safetensors_metadata, read_weights

Attempt = Callable[[], Any]  # gives an exit code, or None


class Place(NamedTuple):
    """Folders: where a try runs, what it may read, and where nothing may appear."""

    work: Path
    data: Path
    outside: Path


class Kind(NamedTuple):
    """One kind of input.

    Args:
        what: It, and what it goes through, in a line.
        share: Tries in each turn.
        group: Tries of one process: 1 where a try changes what it runs in.
        prepare: Makes valid samples, in the folder for data.
        make: Writes one input into the working directory. Gives what is to be done with it, and texts of
            which a refusal must contain one.
        seconds: How long a try may take.
    """

    what: str
    share: int
    group: int
    prepare: Callable[[Place], Any]
    make: Callable[[Any, random.Random], tuple[Attempt, Sequence[str]]]
    seconds: float = 10


# Bytes


def mutated(data: bytes, chance: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Some bytes changed: bits flipped, cut out, repeated, cut short, spliced, or set to extreme numbers."""
    content = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 4, 16])):
        size = len(content)
        # heads, where the structure is, more often than the rest
        place = chance.randrange(min(size, chance.choice([16, 128, 4096, 1 << 62])) or 1)
        length = chance.choice([1, 2, 4, 8, 64, 1024])
        match chance.randrange(8):
            case 0 | 1 if size:
                content[place] ^= 1 << chance.randrange(8)
            case 2:
                del content[place : place + length]
            case 3:
                content[place:place] = content[place : place + length] * chance.choice([1, 2, 100])
            case 4:
                del content[chance.choice([place, size - place]) :]
            case 5 if others:
                other = chance.choice(others)
                cut = chance.randrange(len(other) + 1)
                content[place:] = other[cut:]
            case 6:
                extreme = chance.choice([0, 1, -1, 127, -128, 2**15, 2**31 - 1, -(2**31), 2**32, 2**63 - 1])
                width = chance.choice([1, 2, 4, 8])
                order: Any = chance.choice(["little", "big"])
                content[place : place + width] = (extreme % (1 << 8 * width)).to_bytes(width, order)
            case _:
                content[place : place + length] = chance.randbytes(length)
    return bytes(content)


# Options


def _hostile(chance: random.Random, outside: Path) -> Any:
    """A value that no option should have, or that only some should."""
    return chance.choice(
        [
            *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, -(2**31), 2**62, 0.0, -0.0, 0.5, 1.0, 2.5),
            *(1e308, 1e-320, -1e300, float("nan"), float("inf"), float("-inf"), 1000003, 99999),
            *("", " ", "~", "x", "1", "5e-4", "none", "true", "auto", ".", ".."),
            *("{}", "{0.__class__}", "%s%n", "../x", "../../x", "../../../x", f"{outside}/x"),
            *("a/b", "a\\b", ".hidden", "x\0y", "x\ny", "x\ty"),
            *("\x1b[2Jx", "\u202ex", "naïve 名前", "x" * 300, "x" * 5000, "-x", "--help", "CON", "x" * 255),
            *("/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "~nobody/x", "~/x", "debug_x"),
            *([], {}, [[]], [None], [1], [-1], [1, 2], [2, 1], ["x"], {"type": "x"}, {"x": {"x": 1}}, [{}]),
            [0] * 1000,
            [1.5, "x", None, True],
            f"__import__('os').system('touch {outside}/marker')",
            f"$(touch {outside}/marker)",
            bytes(range(8)),
            {"x"},
            {1: 2, None: 3, False: 4, 2.5: 1},
        ]
    )


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every value within a tree of dicts and lists, as what it is in and its key there."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def mutated_tree(
    tree: Any, chance: random.Random, hostile: Callable[[], Any], changes: Sequence[int] = (1, 1, 1, 2, 3)
) -> Any:
    """A tree of dicts and lists with some values or keys changed, moved, or gone."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.choice(changes)):
        places = [*_places(tree)]
        if not places:
            break
        parent, key = chance.choice(places)
        value = parent[key]
        match chance.randrange(9):
            case 0 | 1 | 2:
                parent[key] = hostile()
            case 3 if isinstance(value, bool | int | float) and not isinstance(value, bool):
                parent[key] = chance.choice(
                    [-value, value * 1000, value + 1, value - 1, value / 3, str(value)]
                )
            case 3 | 4:
                parent[key] = chance.choice([str(value), [value], {"type": value}, {"x": value}])
            case 5:
                del parent[key]
            case 6 if isinstance(parent, dict):
                parent[chance.choice([f"{key}x", str(key)[:-1], "x.y", "", "../x", "\x1b[2J", "x" * 200])] = (
                    value
                )
            case 7:
                other, place = chance.choice(places)
                if other is not parent or place != key:
                    with contextlib.suppress(LookupError):
                        other[place] = copy.deepcopy(value)
            case _ if isinstance(parent, list):
                parent.extend([value] * chance.choice([1, 100]))
            case _:
                parent[f"{key}2"] = hostile()
    return tree


def _odd_yaml(chance: random.Random, outside: Path) -> str:
    """YAML, or nearly, that is made up."""
    n = chance.choice([1, 3, 30, 300, 3000, 20000])
    command = f"touch {outside}/marker"
    levels = "\n".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, chance.randrange(2, 30))
    )
    merges = "\n".join(
        f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, chance.randrange(2, 40))
    )
    return chance.choice(
        [
            f"a0: &a0 [x]\n{levels}\n",
            f"a0: &a0 {{k: v}}\n{merges}\n",
            "[" * n,
            "[" * n + "]" * n,
            "{a: " * n + "}" * n,
            "- " * n + "x",
            "\n".join(" " * i + "a:" for i in range(min(n, 400))),
            "a: &a [*a]\nname: *a\n",
            "a: &a {b: *a}\n",
            "a: &a {<<: *a}\n",
            f"a: !!python/object/apply:os.system ['{command}']\n",
            f"!!python/object/new:os.system ['{command}']: x\n",
            f"a: !!python/object/apply:subprocess.Popen [['touch', '{outside}/marker']]\n",
            f"a: !!python/name:os.system\n? !!python/tuple [1]\n: {n}\n",
            f"a: !!python/object/apply:builtins.eval [\"open('{outside}/marker', 'w')\"]\n",
            "a: !!binary x\n",
            "a: !!set {x, y}\nb: !!omap [x: 1]\nc: !!pairs [x: 1]\n",
            "a: 2001-99-99\n",
            "a: 9999-12-31T23:59:59.999999999+99:99\n",
            "a: !!timestamp x\n",
            "a: " + "9" * n,
            "a: " + "1:" * n + "1",
            "a: -0x" + "f" * n,
            "a: 1" + "0" * n + ".0e+99999999",
            "a: !!float .inf\nb: .NaN\nc: !!int ''\nd: !!bool x\ne: !!null x\nf: !!float _\n",
            "a: !!int 0b\nb: !!map [x]\n",
            "a: !!seq {x: 1}\n",
            "a: !!str {x: 1}\n",
            "? [a, b]\n: c\n",
            "? {a: b}\n: c\n",
            "%TAG ! tag:yaml.org,2002:python/\n---\na: !object/apply:os.system ['x']\n",
            "%YAML 9.9\n---\na: b\n",
            "a: b\n---\nc: d\n",
            "a: b\n...\n\0",
            "\ufeff\ufeffa: b\n",
            "a:\tb\n\tc: d\n",
            "a: 'b\n",
            'a: "\\x"\n',
            'a: "\\ud800"\n',
            "x" * n + ": 1\n",
            "a: " + "é" * n,
            "a: |" + str(n) + "\n x\n",
            "a: *nothing\n",
            "&a a: 1\n&a b: *a\n",
            "a: 1\n" * min(n, 300),
            "\n".join(f"k{i}: {i}" for i in range(min(n, 9000))),
            "- a\n- b\n",
            "x",
            "",
            "~",
            "\x85\u2028\u2029",
            "<<: 1\n",
            "a: {<<: [1, 2]}\n",
            "a: {<<: {b: 1}, <<: {c: 2}}\n",
            "=: 1\na: =\n",
        ]
    )


class _Options(NamedTuple):
    place: Place
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    shipped: list[bytes]


def _prepare_options(place: Place) -> _Options:
    images = place.data / "images"
    if not images.exists():
        write_images(images, 6, 32, 24)
    lmdbs = build_lmdbs(place)
    val = paired("Val", images)
    disk = {"gt_size": 16, "use_hflip": True, "use_rot": True}
    mix = {
        "name": "Mix",
        "type": "DFLIPDataset",
        "sources": [{"dataroot_gt": str(lmdbs), "weight": 2.0}],
        **disk,
    }
    train = [
        training_options(data | {"dataset_enlarge_ratio": 2}, val)
        for data in (paired("Disk", images, **disk), paired("LMDB", images, ".lmdb", **disk), mix)
    ]
    checkpoint = place.data / "net.pth"
    if not checkpoint.exists():
        torch.save({"params": _tiny_network().state_dict()}, checkpoint)
    test = []
    for opt in train:
        # a validation of 2 iterations, in this process: as short as training can be
        opt["num_gpu"] = 0
        opt["train"] |= {"total_iter": 2}
        opt["datasets"]["train"] |= {"num_worker_per_gpu": 0, "persistent_workers": False}
        opt["logger"] |= {"keep_checkpoints": 2}
        shared = {
            key: copy.deepcopy(opt[key]) for key in ("model_type", "scale", "num_gpu", "network_g", "val")
        }
        sets = {"test_1": val, "test_2": paired("Second", images, ".lmdb")}
        shared["val"] |= {"save_img": True, "suffix": "x"}
        del shared["val"]["val_freq"]
        path = {"pretrain_network_g": str(checkpoint), "param_key_g": "params", "strict_load_g": True}
        test.append({"name": "tested", **shared, "datasets": copy.deepcopy(sets), "path": path})
    shipped = [text.encode() for text in option_files().values()]
    return _Options(place, train, test, shipped)


def _tiny_network() -> ESC:
    torch.manual_seed(0)
    return ESC(SCALE, dim=16, pdim=4, kernel_size=5, n_blocks=1, conv_blocks=1, window_size=4, num_heads=2)


def _text_of(options: Any) -> bytes:
    return yaml.dump(options, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def _mutated_options(
    samples: _Options, chance: random.Random, is_train: bool, changes: Sequence[int] = (1, 1, 1, 2, 3)
) -> bytes:
    sound = chance.choice(samples.train if is_train else samples.test)
    return _text_of(mutated_tree(sound, chance, lambda: _hostile(chance, samples.place.outside), changes))


def _odd_options(samples: _Options, chance: random.Random, is_train: bool) -> bytes:
    """Options with one number, text or list that is another of its kind: a check passes more of these."""
    options = copy.deepcopy(chance.choice(samples.train if is_train else samples.test))
    places = [
        (parent, key) for parent, key in _places(options) if isinstance(parent[key], str | int | float | list)
    ]
    parent, key = chance.choice(places)
    kind = type(parent[key])
    kinds = (int, float) if kind in (int, float) else (kind,)
    parent[key] = next(
        value
        for value in iter(lambda: _hostile(chance, samples.place.outside), object())
        if type(value) in kinds
    )
    return _text_of(options)


def _make_options(samples: _Options, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    is_train = chance.random() < 0.6
    match chance.randrange(8):
        case 0:
            content = _odd_yaml(chance, samples.place.outside).encode("utf-8", "surrogatepass")
        case 1:
            content = mutated(chance.choice(samples.shipped), chance, samples.shipped)
        case 2:
            content = mutated(_mutated_options(samples, chance, is_train), chance, samples.shipped)
        case 3:
            sound = _text_of(chance.choice(samples.train)).decode()
            content = f"{sound}\n{_odd_yaml(chance, samples.place.outside)}".encode("utf-8", "surrogatepass")
        case _:
            content = _mutated_options(samples, chance, is_train)
    file = Path("options.yml")
    file.write_bytes(content)

    def attempt() -> None:
        check_options(load_options(file), file, is_train)

    return attempt, ["options.yml"]


def _entry(samples: _Options, chance: random.Random) -> str:
    keys = []
    section: Any = chance.choice(samples.train)
    while isinstance(section, dict) and section:
        keys.append(chance.choice(list(section)))
        section = section[keys[-1]]
        if chance.random() < 0.1:
            break
    if chance.random() < 0.15:
        keys[chance.randrange(len(keys))] = str(_hostile(chance, samples.place.outside))
    value = chance.choice(
        [str(_hostile(chance, samples.place.outside)), _odd_yaml(chance, samples.place.outside)[:5000]]
    )
    entry = ":".join(map(str, keys)) + chance.choice(["=", "=", "=", "=", "", "=="]) + value
    return mutated(entry.encode(), chance).decode(errors="replace") if chance.random() < 0.2 else entry


def _make_overrides(samples: _Options, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    file = Path("options.yml")
    file.write_bytes(_text_of(chance.choice(samples.train)))
    entries = [_entry(samples, chance) for _ in range(chance.choice([1, 1, 2]))]

    def attempt() -> None:
        check_options(load_options(file, entries), file, is_train=True)

    return attempt, ["--force_yml", "options.yml"]


def _make_run(samples: _Options, chance: random.Random, command: str) -> tuple[Attempt, Sequence[str]]:
    make = _odd_options if chance.random() < 0.7 else _mutated_options
    content = make(samples, chance, command == "train")
    Path("options.yml").write_bytes(content)
    arguments = [command, "-opt", "options.yml"]
    if chance.random() < 0.2:
        arguments += ["--debug"]
    if chance.random() < 0.2:
        entry = _entry(samples, chance)
        if entry.partition("=")[0] in ("name", "val:suffix", "datasets:val:name", "manual_seed"):
            arguments += ["--force_yml", entry]
    if command == "train" and chance.random() < 0.2:
        arguments += ["--auto_resume"]
    return lambda: main(arguments), [
        "options.yml",
        "datasets",
        "--force_yml",
        "Val",
        "Second",
        "train.",
        "network_g",
    ]


# Checkpoints


class _Checkpoints(NamedTuple):
    place: Place
    files: list[bytes]
    content: dict[str, dict[str, torch.Tensor]]


def _saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _prepare_checkpoints(place: Place) -> _Checkpoints:
    state = dict(_tiny_network().state_dict())
    content = {"params": state, "params_ema": state}
    files = [_saved(content), _saved(state), _saved(content, _use_new_zipfile_serialization=False)]
    return _Checkpoints(place, files, content)


def _prepare_safetensors(place: Place) -> _Checkpoints:
    state = dict(_tiny_network().state_dict())
    files = [save_safetensors(state, about) for about in ({}, {"param_key": "params_ema", "x": "\x1b[2J"})]
    return _Checkpoints(place, files, {"params": state})


def rezipped(
    data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A zip file whose records were changed, with sums that fit."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as archive,
        zipfile.ZipFile(buffer, "w", compression) as changed,
    ):
        for name in archive.namelist():
            changed.writestr(name, change(name, archive.read(name)))
    return buffer.getvalue()


def _hostile_tensor(chance: random.Random) -> Any:
    base = torch.ones(4)
    return chance.choice(
        [
            lambda: base.as_strided((1 << 20, 1 << 20), (0, 0)),
            lambda: base.expand(1 << 30, 4),
            lambda: torch.full((16,), float("nan")),
            lambda: torch.zeros(
                16, dtype=chance.choice([torch.int64, torch.bool, torch.complex64, torch.uint8])
            ),
            lambda: torch.zeros(16, dtype=torch.float8_e4m3fn),
            lambda: torch.eye(4).to_sparse(),
            lambda: torch.eye(4).to_sparse_csr(),
            lambda: torch.quantize_per_tensor(base, 0.1, 0, torch.qint8),
            lambda: torch.zeros(1 << 40, device="meta"),
            lambda: torch.zeros(0),
            lambda: torch.zeros(()),
            lambda: torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
            lambda: torch.nn.Parameter(base),
            lambda: base.conj(),
            lambda: torch.zeros(4, dtype=torch.complex64).imag.neg(),
            lambda: torch.zeros(3 << 20, dtype=torch.float16),
        ]
    )()


def _hostile_leaf(chance: random.Random, outside: Path) -> Any:
    if chance.random() < 0.5:
        return _hostile_tensor(chance)
    value = _hostile(chance, outside)
    return Counter("xy") if isinstance(value, bytes) else value


class _Called:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _pickles(chance: random.Random, outside: Path) -> bytes:
    """A pickle that would run something, or take much."""
    marker = f"{outside}/marker"
    huge = chance.choice([1 << 33, 1 << 40, 1 << 62])

    def op(module: str, name: str, arguments: bytes = b"(t") -> bytes:
        return b"c%s\n%s\n" % (module.encode(), name.encode()) + arguments + b"R."

    def number(value: int) -> bytes:
        return b"(\x8a\x08" + value.to_bytes(8, "little", signed=True) + b"t"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    proto = b"\x80\x02"
    return chance.choice(
        [
            lambda: pickle.dumps({"params": _Called(os.system, f"touch {marker}")}, chance.randrange(5)),
            lambda: pickle.dumps({"params": _Called(eval, f"open({marker!r}, 'w')")}, chance.randrange(5)),
            lambda: pickle.dumps({"params": _Called(exec, f"open({marker!r}, 'w')")}, 2),
            lambda: pickle.dumps(_Called(getattr, "x", "format"), 2),
            lambda: pickle.dumps({"params": _Called(bytearray, huge)}, 2),
            lambda: proto + op("os", "system", b"(" + text(f"touch {marker}") + b"t"),
            lambda: proto + op("builtins", "bytearray", number(huge)),
            lambda: proto + op("torch", "Size", number(huge)),
            lambda: proto + op("torch", "FloatStorage", number(huge)),
            lambda: proto + op("torch", "FloatTensor", number(huge)),
            lambda: proto + op("torch", "Tensor", number(huge)),
            lambda: proto + op("torch.storage", "UntypedStorage", number(huge)),
            lambda: proto + op("torch.storage", "TypedStorage", number(huge)),
            lambda: proto + op("torch._utils", "_rebuild_tensor", b"(t"),
            lambda: proto + op("torch.jit", "load", b"(" + text(marker) + b"t"),
            lambda: proto + op("torch.hub", "load", b"(" + text(marker) + b"t"),
            lambda: proto + op("_codecs", "encode", b"(" + text("x" * 1000) + text("idna") + b"t"),
            lambda: proto + b"]q\x00h\x00a.",  # a list that holds itself
            lambda: proto + b"}q\x00X\x01\x00\x00\x00xh\x00s.",
            lambda: proto + b"r\xff\xff\xff\x7f" * 3 + b".",
            lambda: proto + b"(" * 100000 + b"." + b"t" * 100000 + b".",
            lambda: proto + b"]" + b"\x85" * 200000 + b".",
            lambda: proto + b"X\xff\xff\xff\xffx.",
            lambda: proto + b"\x8a\xff" + b"\xff" * 255 + b".",
            lambda: proto + b"\x8b\xff\xff\xff\x7f.",
        ]
    )()


def _wrapped(stream: bytes, chance: random.Random) -> bytes:
    """A pickle as a checkpoint of one of PyTorch's forms."""
    match chance.randrange(3):
        case 0:
            return stream
        case 1:
            head = _saved({}, _use_new_zipfile_serialization=False)
            return head[: head.rindex(b"\x80\x02", 0, len(head) - 8)] + stream + head[-8:]
        case _:
            return rezipped(_saved({}), lambda name, data: stream if name.endswith("data.pkl") else data)


def _reading(file: Path, chance: random.Random) -> Attempt:
    key = chance.choice(["params", "params_ema", None])
    is_strict = chance.random() < 0.5

    def attempt() -> None:
        load_weights(_tiny_network(), read_weights(file, key), file, is_strict)

    return attempt


def _make_pth(samples: _Checkpoints, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    file = Path("net.pth")
    data = chance.choice(samples.files)
    match chance.randrange(6):
        case 0 | 1:
            data = mutated(data, chance, samples.files)
        case 2 | 3:
            weights = rezipped(
                chance.choice(samples.files[:2]),
                lambda name, record: mutated(record, chance) if name.endswith("data.pkl") else record,
            )
            data = weights
        case 4:
            tree = mutated_tree(samples.content, chance, lambda: _hostile_leaf(chance, samples.place.outside))
            data = _saved(tree, _use_new_zipfile_serialization=chance.random() < 0.7)
        case _:
            compression = chance.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
            data = rezipped(
                samples.files[1],
                lambda name, record: bytes(1 << 24) if chance.random() < 0.1 else record,
                compression,
            )
    file.write_bytes(data)
    return _reading(file, chance), ["net.pth"]


def _make_pickle(samples: _Checkpoints, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    file = Path("net.pth")
    stream = _pickles(chance, samples.place.outside)
    file.write_bytes(_wrapped(mutated(stream, chance) if chance.random() < 0.3 else stream, chance))
    return _reading(file, chance), ["net.pth"]


def _make_safetensors(samples: _Checkpoints, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    file = Path("net.safetensors")
    data = chance.choice(samples.files)
    length = int.from_bytes(data[:8], "little")
    match chance.randrange(3):
        case 0:
            data = mutated(data, chance, samples.files)
        case 1:
            header = mutated(data[8 : 8 + length], chance)
            data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        case _:
            header = yaml.safe_load(data[8 : 8 + length])
            header = mutated_tree(header, chance, lambda: _hostile(chance, samples.place.outside))
            text = repr(header).replace("'", '"').replace("None", "null").replace("True", "true").encode()
            data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    file.write_bytes(data)
    read = _reading(file, chance)

    def attempt() -> None:
        read_safetensors_metadata(file)
        read()

    return attempt, ["net.safetensors"]


# Training states


class _States(NamedTuple):
    options: _Options
    model: ESCModel
    opt: dict[str, Any]
    state: dict[str, Any]
    files: list[bytes]
    weights: bytes


def _prepare_states(place: Place) -> _States:
    samples = _prepare_options(place)
    options = copy.deepcopy(samples.train[2])
    options["train"]["total_iter"] = 4
    file = place.data / "states.yml"
    file.write_bytes(_text_of(options))
    experiment = place.data / "experiments" / options["name"]
    if not experiment.exists():
        process = os.fork()  # training changes the process that it is in
        if not process:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            os._exit(main(["train", "-opt", str(file)]))
        assert os.waitpid(process, 0)[1] == 0
    state_file, weights = experiment / "training_states" / "2.state", experiment / "models" / "net_g_2.pth"
    opt = _as_basicsr_gives_it(options, place.work)
    return _States(
        samples,
        ESCModel(opt),
        opt,
        torch.load(state_file, weights_only=True),
        [state_file.read_bytes(), weights.read_bytes()],
        weights.read_bytes(),
    )


def _as_basicsr_gives_it(options: dict[str, Any], root: Path) -> dict[str, Any]:
    """Options as BasicSR's parse_options makes them for a model to train."""
    opt = copy.deepcopy(options)
    opt |= {"dist": False, "rank": 0, "world_size": 1, "is_train": True, "auto_resume": False}
    for phase, section in opt["datasets"].items():
        section |= {"phase": phase, "scale": opt["scale"]}
    folder = root / "experiments" / opt["name"]
    opt["path"] |= {key: str(folder / key) for key in ("models", "training_states", "visualization")}
    opt["path"] |= {"experiments_root": str(folder), "log": str(folder)}
    return opt


def _mutated_state(samples: _States, chance: random.Random) -> bytes:
    if chance.random() < 0.2:
        return mutated(samples.files[0], chance, samples.files)
    if chance.random() < 0.2:
        return rezipped(
            samples.files[0],
            lambda name, record: mutated(record, chance) if name.endswith("data.pkl") else record,
        )
    state = samples.state
    if chance.random() < 0.3:  # one part, of which the whole has few values
        part = chance.choice([key for key in state if isinstance(state[key], dict | list)])
        outside = samples.options.place.outside
        return _saved(
            {**state, part: mutated_tree(state[part], chance, lambda: _hostile_leaf(chance, outside))}
        )
    return _saved(mutated_tree(state, chance, lambda: _hostile_leaf(chance, samples.options.place.outside)))


def _make_state(samples: _States, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    experiment = Path("experiments", samples.opt["name"])
    for folder in ("models", "training_states"):
        (experiment / folder).mkdir(parents=True)
    state = experiment / "training_states" / "2.state"
    state.write_bytes(_mutated_state(samples, chance))
    weights = samples.weights if chance.random() < 0.9 else mutated(samples.weights, chance)
    (experiment / "models" / "net_g_2.pth").write_bytes(weights)
    opt, model = samples.opt, samples.model
    opt["path"]["resume_state"] = str(state)

    def attempt() -> None:
        """As train_pipeline does it, without setting all up anew."""
        found = load_resume_state(opt)
        loader, sampler, _, epochs, _ = create_train_val_dataloader(opt, logging.getLogger("basicsr"))
        model.load_network(model.net_g, opt["path"]["pretrain_network_g"], True, "params")
        model.resume_training(found)
        iteration = found["iter"]
        for epoch in range(found["epoch"], min(epochs, found["epoch"] + 2) + 1):
            sampler.set_epoch(epoch)
            for batch in _first(loader, 2):
                iteration += 1
                if iteration > 4:
                    break
                model.update_learning_rate(iteration, -1)
                model.feed_data(batch)
                model.optimize_parameters(iteration)
                model.save(epoch, iteration)

    return attempt, ["2.state", "net_g_2.pth"]


def _first(values: Any, count: int) -> Iterator[Any]:
    """The first few of them."""
    for _, value in zip(range(count), values, strict=False):
        yield value


def _make_resumed_run(samples: _States, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    _, names = _make_state(samples, chance)
    options = copy.deepcopy(samples.options.train[2])
    options["train"]["total_iter"] = 4
    Path("options.yml").write_bytes(_text_of(options))
    return lambda: main(["train", "-opt", "options.yml", "--auto_resume"]), [
        *names,
        "training_states",
        "options.yml",
    ]


# LMDBs


class _Lmdbs(NamedTuple):
    place: Place
    files: list[dict[str, bytes]]  # of each set
    options: dict[str, Any]
    records: list[bytes]


def build_lmdbs(place: Place) -> Path:
    """Sets of small images, by this package; the folder of the one that is stored uncompressed."""
    folder = place.data / "sets"
    rng = np.random.default_rng(0)
    if not folder.exists():
        folder.mkdir()
        small = {f"i{n:03d}": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for n in range(40)}
        large = {f"i{n}": rng.integers(0, 256, (64, 48, 3), dtype=np.uint8) for n in range(4)}
        build_lmdb_sets({**small, **large}, folder, "stored", crop_size=0)
        build_lmdb_sets(large, folder, "compressed", crop_size=0, compression=1)
        # more than one level of pages
        flat = {f"{n:04d}_{'x' * 200}": np.zeros((16, 16, 3), np.uint8) for n in range(300)}
        build_lmdb_sets(flat, folder, "deep", crop_size=0, compression=9)
    return folder / "stored_HR.lmdb"


def _prepare_lmdbs(place: Place) -> _Lmdbs:
    stored = build_lmdbs(place)
    sets = [
        {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in sorted(stored.parent.glob("*.lmdb"))
    ]
    options = {
        "name": "Mix",
        "type": "DFLIPDataset",
        "scale": 2,
        "gt_size": 8,
        "use_hflip": True,
        "use_rot": True,
    }
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    records = [
        cv2.imencode(".png", noise, [cv2.IMWRITE_PNG_COMPRESSION, level])[1].tobytes() for level in (0, 9)
    ]
    return _Lmdbs(place, sets, options, records)


def _reading_lmdb(samples: _Lmdbs, chance: random.Random) -> Attempt:
    """Read by the reader, by the training loader, or by BasicSR's data set; or verify."""
    folder = Path("set.lmdb")
    way = chance.randrange(4)
    image_keys = [*range(400)]
    chance.shuffle(image_keys)

    def attempt() -> None:
        if way == 0:
            verify_lmdb(folder)
        elif way == 1:
            images = ImageLMDB(folder)
            for index in image_keys:
                if index < len(images):
                    with contextlib.suppress(UserError):
                        images.read(index)
                        images.read_crop(index, 0, 0, 1, 1)
        else:
            mix = {**samples.options, "sources": [{"dataroot_gt": str(folder)}], "batch_size_per_gpu": 2}
            two = {
                **mix,
                **paired("Two", folder, ".lmdb"),
                "dataroot_gt": str(folder),
                "dataroot_lq": str(folder),
            }
            section = mix if way == 2 else {**two, "scale": 1}
            opt = {
                "datasets": {
                    "train": {**section, "phase": "train", "num_worker_per_gpu": 0, "max_unreadable": 10}
                },
                "dist": False,
            }
            opt |= {"world_size": 1, "rank": 0, "num_gpu": 0, "manual_seed": 0, "train": {"total_iter": 10}}
            for key, problem in data_problems(section, section["scale"], is_training_set=True):
                raise UserError(f"{section['name']}: {key}: {problem}")
            loader, sampler, *_ = create_train_val_dataloader(opt, logging.getLogger("basicsr"))
            sampler.set_epoch(0)
            for _ in loader:
                pass

    return attempt


def _make_pages(samples: _Lmdbs, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    _write_set(chance.choice(samples.files), {"data.mdb": lambda data: _mutated_pages(data, chance)})
    return _reading_lmdb(samples, chance), ["set.lmdb", "Mix", "Two", "datasets.train"]


def _write_set(files: dict[str, bytes], changes: dict[str, Callable[[bytes], bytes]]) -> None:
    Path("set.lmdb").mkdir()
    for name, data in files.items():
        Path("set.lmdb", name).write_bytes(changes[name](data) if name in changes else data)


def _mutated_pages(data: bytes, chance: random.Random) -> bytes:
    """An LMDB's file changed: its heads, heads of pages, places of nodes, or anything; or cut short."""
    content = bytearray(data)
    size, page = len(data), 4096
    if chance.random() < 0.1:
        return bytes(content[: chance.choice([0, 1, page, 2 * page, chance.randrange(size), size - page])])
    if chance.random() < 0.2:
        return mutated(data, chance)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        number = chance.choice([0, 1, chance.randrange(size // page), chance.randrange(size // page)])
        flags = int.from_bytes(data[number * page + 10 : number * page + 12], "little")
        if flags & 4 or not flags:  # records: more often where the tree is
            number = chance.choice([0, 1, number])
        place = number * page + chance.choice(
            [chance.randrange(200), chance.randrange(24), chance.randrange(page)]
        )
        match chance.randrange(4):
            case 0:
                content[place] ^= 1 << chance.randrange(8)
            case 1:
                width = chance.choice([2, 4, 8])
                extreme = chance.choice(
                    [0, 1, 2, 0xFFFF, 0x7FFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1, size // page]
                )
                content[place : place + width] = (extreme % (1 << 8 * width)).to_bytes(width, "little")
            case 2:
                content[place : place + 16] = chance.randbytes(16)
            case _:
                other = chance.randrange(size // page)
                content[number * page : (number + 1) * page] = data[other * page : (other + 1) * page]
    # both heads alike, so that the change is what counts
    if chance.random() < 0.3:
        content[page : 2 * page] = content[:page]
    return bytes(content[:size])


def _make_lists(samples: _Lmdbs, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    files = chance.choice(samples.files)
    lines = files["meta_info.txt"].splitlines(keepends=True)
    keys = [b"../../x", b"x" * 600, b"\xff\xfe", "é".encode(), b"a\0b", b"", b"\x1b[2J", b"i000", b"/x"]
    sizes = [
        b"(0,0,3)",
        b"(999999999,999999999,3)",
        b"(16,17,3)",
        b"(-1,1,3)",
        b"(1e9,1,3)",
        b"(8,8,3)",
        b"(8,8)",
    ]

    def change(data: bytes) -> bytes:
        if chance.random() < 0.4:
            return mutated(data, chance)
        for _ in range(chance.choice([1, 5])):
            line = b"%s.png %s 0\n" % (chance.choice(keys), chance.choice(sizes))
            lines[chance.randrange(len(lines))] = line
        return b"".join(lines)

    which = chance.choice(["meta_info.txt", "meta_info.txt", "checksums.txt"])
    _write_set(files, {which: change})
    return _reading_lmdb(samples, chance), ["set.lmdb", "Mix", "Two", "datasets.train"]


def _make_records(samples: _Lmdbs, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    """Change bytes of records in place; or put other records."""
    files = chance.choice(samples.files)
    if chance.random() < 0.5:
        data = bytearray(files["data.mdb"])
        starts = [place for place in range(0, len(data), 16) if b"\x89PNG" in data[place : place + 20]]
        for _ in range(chance.choice([1, 10, 100])):
            place = chance.choice(starts) + 16 + chance.randrange(chance.choice([8, 60, 600]))
            if place < len(data):
                data[place] = chance.randrange(256)
        _write_set(files, {"data.mdb": lambda _: bytes(data)})
    else:
        import lmdb

        Path("set.lmdb").mkdir()
        with (
            lmdb.open("set.lmdb", map_size=1 << 22) as environment,
            environment.begin(write=True) as transaction,
        ):
            lines = []
            for number in range(8):
                record = chance.choice(samples.records)
                if chance.random() < 0.5:
                    record = _hostile_image(samples.records, chance)
                transaction.put(b"%d" % number, record or b"x")
                lines.append(f"{number}.png (16,16,3) 0\n")
        Path("set.lmdb", "meta_info.txt").write_text("".join(lines))
    return _reading_lmdb(samples, chance), ["set.lmdb", "Mix", "Two", "datasets.train"]


# Images


class _Images(NamedTuple):
    place: Place
    files: dict[str, bytes]


def _prepare_images(place: Place) -> _Images:
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    image = Image.fromarray(noise[..., :3])
    files: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, **options: Any) -> None:
        buffer = io.BytesIO()
        image.save(
            buffer, name.rpartition(".")[2].upper().replace("JPG", "JPEG").replace("TIF", "TIFF"), **options
        )
        files[name] = buffer.getvalue()

    add("rgb.png", image)
    add("gray.png", image.convert("L"))
    add("palette.png", image.convert("P"), transparency=3)
    add("alpha.png", Image.fromarray(noise))
    files["deep.png"] = cv2.imencode(".png", noise[..., :3].astype(np.uint16) * 257)[1].tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    add("turned.jpg", image, exif=exif)
    add("progressive.jpg", image, progressive=True)
    add("cmyk.jpg", image.convert("CMYK"))
    add("lossy.webp", image)
    add("lossless.webp", image, lossless=True)
    add("plain.bmp", image)
    add("plain.tif", image)
    add("lzw.tif", image, compression="tiff_lzw")
    add("pages.tif", image, save_all=True, append_images=[image])
    files["deep.tif"] = cv2.imencode(".tif", noise[..., :3].astype(np.uint16) * 257)[1].tobytes()
    return _Images(place, files)


def _with_sums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums that fit."""
    content, place = bytearray(data), 8
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(content):
            break
        content[end : end + 4] = zlib.crc32(content[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(content)


def _bomb(chance: random.Random) -> bytes:
    """A small PNG of a large image."""
    width, height = chance.choice(
        [(60000, 60000), (20000, 20000), (1, 2**31 - 1), (2**31 - 1, 1), (0, 9), (10**6, 300)]
    )
    depth, colour = chance.choice([(8, 2), (8, 0), (16, 2), (1, 0), (8, 6)])

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    body = zlib.compress(bytes(1 << 20))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, chance.choice([0, 1]))
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 26))) if chance.random() < 0.2 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + text + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _hostile_image(files: Sequence[bytes], chance: random.Random) -> bytes:
    if chance.random() < 0.05:
        return _bomb(chance)
    data = mutated(chance.choice(files), chance, files)
    return _with_sums(data) if data.startswith(b"\x89PNG") and chance.random() < 0.6 else data


def _make_image(samples: _Images, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    files = [*samples.files.values()]
    data = _hostile_image(files, chance)
    Path("image").write_bytes(data)

    def attempt() -> None:
        with contextlib.suppress(UserError):
            source_image_size(io.BytesIO(data), "image")
        with contextlib.suppress(UserError):
            decode_image(data, "image")
        decode_source_image(data, "image")

    return attempt, ["image"]


def _write_folder(samples: _Images, chance: random.Random) -> None:
    """A folder of sound and hostile images, and things that are no images."""
    folder = Path("in")
    folder.mkdir()
    (folder / "sound.png").write_bytes(samples.files["rgb.png"])
    files = [*samples.files.values()]
    for number in range(chance.choice([1, 2, 5])):
        name = chance.choice([*samples.files])
        stem = chance.choice(
            [f"{number}", f"{number}", "a\nb", "\x1b[2J", "é", "\udcff", "x" * 240, "a b", "..x", "-o"]
        )
        data = _hostile_image(files, chance) if chance.random() < 0.7 else samples.files[name]
        (folder / f"{stem}.{name.rpartition('.')[2]}").write_bytes(data)
    if chance.random() < 0.3:
        match chance.randrange(8):
            case 0:
                os.mkfifo(folder / "fifo.png")
            case 1:
                (folder / "device.png").symlink_to("/dev/zero")
            case 2:
                (folder / "loop.png").symlink_to("loop.png")
            case 3:
                (folder / "loop").symlink_to(".")
            case 4:
                (folder / "folder.png").mkdir()
            case 5:
                (folder / "away.png").symlink_to(samples.place.outside / "canary")
            case 6:
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind("in/socket.png")
            case _:
                (folder / "dangling.png").symlink_to("nothing")


def _make_builder(samples: _Images, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    _write_folder(samples, chance)
    name = chance.choice(
        ["set"] * 12 + ["../../x", f"{samples.place.outside}/x", "", ".", "a\nb", "x" * 300, "é"]
    )
    arguments = ["lmdb", "in", "-o", "out", "--name", name, "--workers", "1"]
    arguments += chance.choice(
        [[], ["--crop-size", "0"], ["--crop-size", "16", "--step", "8"], ["--scales", "2"]]
    )
    arguments += chance.choice([[], [], ["--compression", "9"]])
    return lambda: main(arguments), ["in/", "--name", "out", "in holds"]


def _make_test_set(samples: _Images, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    _write_folder(samples, chance)
    return lambda: main(["benchmark-set", "in", "-o", "out", "--scales", "2"]), ["in/", "in has"]


class _TestRuns(NamedTuple):
    options: _Options
    images: _Images


def _prepare_test_images(place: Place) -> _TestRuns:
    return _TestRuns(_prepare_options(place), _prepare_images(place))


def _make_test_images(samples: _TestRuns, chance: random.Random) -> tuple[Attempt, Sequence[str]]:
    """Test on, or validate by, a folder of hostile images."""
    command = chance.choice(["test", "test", "test", "train"])
    options = copy.deepcopy((samples.options.test if command == "test" else samples.options.train)[0])
    del options["datasets"]["test_2" if command == "test" else "val"]
    name = "test_1" if command == "test" else "val"
    source = samples.options.place.data / "images"
    for kind in ("hr", "lr"):
        Path("set", kind).mkdir(parents=True)
        for file in (source / kind).iterdir():
            Path("set", kind, file.name).write_bytes(file.read_bytes())
    names = sorted(file.name for file in Path("set/hr").iterdir())
    for file_name in chance.sample(names, 2):
        file = Path("set", chance.choice(["hr", "lr"]), file_name)
        data = file.read_bytes()
        if chance.random() < 0.7:  # its head is sound, as far as a check of options looks
            damaged = data[:64] + mutated(data[64:], chance)
            file.write_bytes(_with_sums(damaged) if chance.random() < 0.5 else damaged)
        else:
            file.write_bytes(_hostile_image([*samples.images.files.values(), data], chance))
    if chance.random() < 0.1:
        os.mkfifo("set/hr/fifo.png")
    options["datasets"][name] = paired("Val", Path("set"))
    Path("options.yml").write_bytes(_text_of(options))
    return lambda: main([command, "-opt", "options.yml"]), ["set/", "Val", "options.yml"]


KINDS = {
    "options": Kind("option files, read and checked", 400, 50, _prepare_options, _make_options),
    "force_yml": Kind("`--force_yml` entries, read and checked", 200, 50, _prepare_options, _make_overrides),
    "train": Kind(
        "option files, `train`", 10, 1, _prepare_options, lambda *given: _make_run(*given, "train"), 30
    ),
    "test": Kind(
        "option files, `test`", 6, 1, _prepare_options, lambda *given: _make_run(*given, "test"), 30
    ),
    "pth": Kind("`.pth` files, read and loaded into a network", 200, 50, _prepare_checkpoints, _make_pth),
    "pickles": Kind("pickles that run code or take memory", 100, 25, _prepare_checkpoints, _make_pickle),
    "safetensors": Kind(
        "`.safetensors` files, read and loaded", 200, 50, _prepare_safetensors, _make_safetensors
    ),
    "states": Kind("training states, resumed from and trained on", 40, 1, _prepare_states, _make_state),
    "resume": Kind("training states, `train --auto_resume`", 4, 1, _prepare_states, _make_resumed_run, 30),
    "pages": Kind(
        "LMDBs: pages of `data.mdb`, read, trained by and verified", 60, 1, _prepare_lmdbs, _make_pages
    ),
    "lists": Kind("LMDBs: `meta_info.txt` and `checksums.txt`", 60, 10, _prepare_lmdbs, _make_lists),
    "records": Kind("LMDBs: records", 60, 10, _prepare_lmdbs, _make_records),
    "images": Kind("PNG, JPEG, WebP, TIFF, BMP files, decoded", 600, 100, _prepare_images, _make_image),
    "builder": Kind("folders of images, `lmdb`", 20, 5, _prepare_images, _make_builder),
    "benchmark_set": Kind("folders of images, `benchmark-set`", 20, 10, _prepare_images, _make_test_set),
    "test_images": Kind(
        "test and validation images, `test` and `train`", 6, 1, _prepare_test_images, _make_test_images, 30
    ),
}
