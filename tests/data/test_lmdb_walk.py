"""A damaged LMDB is refused by name, or reads as before; it never ends the process that reads it."""

import multiprocessing
import os
import random
import struct
from pathlib import Path

import lmdb
import numpy as np
import pytest

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.lmdb_reader import ImageLMDB, check_lmdb

PAGE = 4096


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A set of several levels of pages, with records in leaves and in pages of their own."""
    with lmdb.open(str(tmp_path), map_size=1 << 24) as environment:
        for start in (0, 500):  # each head is written
            with environment.begin(write=True) as transaction:
                for n in range(start, start + 500):
                    transaction.put(f"{n:04d}{'x' * 300}".encode(), bytes(100 if n % 10 else 9000))
    return tmp_path / "data.mdb"


def head(content: bytes) -> int:
    """Where the head begins that was written last."""
    return max((0, PAGE), key=lambda position: struct.unpack_from("<Q", content, position + 144))


def change(file: Path, position: int, value: int, size: int) -> None:
    content = bytearray(file.read_bytes())
    content[position : position + size] = value.to_bytes(size, "little")
    file.write_bytes(content)


def tree_page(content: bytes, kind: int) -> int:
    """Where a page of a kind begins that the tree has now."""
    root = struct.unpack_from("<Q", content, head(content) + 128)[0] * PAGE
    while not content[root + 10] & kind:
        low, high, top = struct.unpack_from(
            "<HHH", content, root + int.from_bytes(content[root + 16 : root + 18], "little")
        )
        root = (low + (high << 16) + (top << 32)) * PAGE
    return root


def refuse(file: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read: data\.mdb is cut short or damaged"):
        check_lmdb(file.parent)


def read_all(folder: Path) -> list[tuple[bytes, bytes]]:
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return [*transaction.cursor()]


def read_each(folder: Path) -> None:
    """Read every record by its key, in a process that damage may end."""
    try:
        with lmdb.open(str(folder), readonly=True, lock=False) as environment:
            for n in range(1000):
                with environment.begin() as transaction:
                    transaction.get(f"{n:04d}{'x' * 300}".encode())
    except lmdb.Error:
        pass
    os._exit(0)


def test_sound_sets_are_passed(data: Path, tmp_path: Path):
    check_lmdb(data.parent)
    (tmp_path / "empty").mkdir()
    lmdb.open(str(tmp_path / "empty")).close()
    check_lmdb(tmp_path / "empty")


@pytest.mark.parametrize("length", [0, 30, PAGE, 2 * PAGE, -PAGE])
def test_a_file_cut_short_is_refused(data: Path, length: int):
    content = data.read_bytes()
    last = struct.unpack_from("<Q", content, head(content) + 136)[0]
    data.write_bytes(content[: length if length >= 0 else (last + 1) * PAGE + length])
    refuse(data)


@pytest.mark.parametrize(
    ("position", "value", "size"),
    [(16, 0, 4), (40, 999, 4), (128, 1 << 40, 8), (128, 1, 8), (136, 1 << 60, 8)],
)
def test_a_head_that_leads_nowhere_is_refused(data: Path, position: int, value: int, size: int):
    change(data, head(data.read_bytes()) + position, value, size)
    refuse(data)


@pytest.mark.parametrize(("position", "value"), [(44, 1), (92, 4), (94, 33)])
def test_a_part_of_the_head_that_reading_does_not_use_may_be_damaged(data: Path, position: int, value: int):
    sound = read_all(data.parent)
    change(data, head(data.read_bytes()) + position, value, 2)
    check_lmdb(data.parent)
    assert read_all(data.parent) == sound


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize(("position", "value"), [(10, 4), (12, 9999), (14, 20), (16, 5000), (16, 4092)])
def test_a_damaged_page_of_the_tree_is_refused(data: Path, kind: int, position: int, value: int):
    change(data, tree_page(data.read_bytes(), kind) + position, value, 2)
    refuse(data)


def test_whatever_byte_of_the_tree_is_damaged_no_reader_crashes(data: Path):
    content, draw = data.read_bytes(), random.Random(813)
    pages = [
        begin
        for begin in range(2 * PAGE, len(content), PAGE)
        if content[begin + 10] in (1, 2) and content[begin + 11] == 0
    ]
    context = multiprocessing.get_context("fork")
    refused = 0
    for _ in range(60):
        page = draw.choice(pages)
        nodes = struct.unpack_from(
            f"<{(struct.unpack_from('<H', content, page + 12)[0] - 16) // 2}H", content, page + 16
        )
        change(
            data,
            page + draw.choice([draw.randrange(24), draw.choice(nodes) + draw.randrange(8)]),
            draw.randrange(256),
            1,
        )
        try:
            check_lmdb(data.parent)
        except UserError:
            refused += 1
        else:
            reader = context.Process(target=read_each, args=(data.parent,))
            reader.start()
            reader.join()
            assert reader.exitcode == 0
        data.write_bytes(content)
    assert refused > 20


def test_records_and_pages_beyond_the_file_are_refused(data: Path):
    content = data.read_bytes()
    branch, leaf = tree_page(content, 1), tree_page(content, 2)
    node = branch + int.from_bytes(content[branch + 16 : branch + 18], "little")
    change(data, node, 0xFFFF, 2)
    refuse(data)
    data.write_bytes(content)
    nodes = struct.unpack_from(
        f"<{(struct.unpack_from('<H', content, leaf + 12)[0] - 16) // 2}H", content, leaf + 16
    )
    big = next(leaf + node for node in nodes if content[leaf + node + 4] & 1)
    change(data, big, 0xFFFF, 4)
    change(data, big + 2, 0xFFFF, 2)  # 4 GiB
    refuse(data)
    data.write_bytes(content)
    change(data, big + 8 + 304, 1 << 33, 8)
    refuse(data)


def test_a_reader_refuses_by_name(data: Path):
    (data.parent / "meta_info.txt").write_text("0000.png (8,8,3) 1\n")
    data.write_bytes(data.read_bytes()[: 8 * PAGE])
    with pytest.raises(UserError, match=f"the LMDB {data.parent} cannot be read"):
        ImageLMDB(data.parent).read(0)


def test_pages_that_are_there_twice_are_refused(data: Path):
    content = bytearray(data.read_bytes())
    branch = tree_page(content, 1)
    first, second = (
        branch + int.from_bytes(content[branch + n : branch + n + 2], "little") for n in (16, 18)
    )
    assert not np.array_equal(content[first : first + 6], content[second : second + 6])
    root = struct.unpack_from("<Q", content, head(content) + 128)[0]
    for node in (first, second):  # round in a circle
        content[node : node + 6] = root.to_bytes(6, "little")
    data.write_bytes(content)
    refuse(data)
