"""An LMDB is looked at before liblmdb follows its pages."""

import struct
from pathlib import Path

import lmdb
import numpy as np
import pytest

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.lmdb_pages import check_pages
from esc_basicsr.data.lmdb_reader import ImageLMDB

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
    return max((0, PAGE), key=lambda place: struct.unpack_from("<Q", content, place + 144))


def change(file: Path, place: int, value: int, size: int) -> None:
    content = bytearray(file.read_bytes())
    content[place : place + size] = value.to_bytes(size, "little")
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


def refusal(file: Path) -> str:
    with pytest.raises(UserError, match=r"cannot be read: data\.mdb is cut short or damaged") as caught:
        check_pages(file)
    return str(caught.value)


def test_sound_sets_are_passed(data: Path, tmp_path: Path):
    check_pages(data)
    (tmp_path / "empty").mkdir()
    lmdb.open(str(tmp_path / "empty")).close()
    check_pages(tmp_path / "empty" / "data.mdb")


@pytest.mark.parametrize("length", [0, 30, PAGE, 2 * PAGE, -PAGE])
def test_a_file_cut_short_is_refused(data: Path, length: int):
    content = data.read_bytes()
    last = struct.unpack_from("<Q", content, head(content) + 136)[0]
    data.write_bytes(content[: length if length >= 0 else (last + 1) * PAGE + length])
    refusal(data)


@pytest.mark.parametrize(
    ("place", "value", "size"),
    [
        (16, 0, 4),
        (40, 999, 4),
        (44, 1, 2),
        (92, 4, 2),
        (94, 33, 2),
        (128, 1 << 40, 8),
        (128, 1, 8),
        (136, 1 << 60, 8),
    ],
)
def test_a_head_that_leads_nowhere_is_refused(data: Path, place: int, value: int, size: int):
    change(data, head(data.read_bytes()) + place, value, size)
    refusal(data)


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize(
    ("place", "value", "size"),
    [(0, 7, 8), (10, 4, 2), (12, 9999, 2), (14, 20, 2), (16, 5000, 2), (16, 4092, 2)],
)
def test_a_damaged_page_of_the_tree_is_refused(data: Path, kind: int, place: int, value: int, size: int):
    change(data, tree_page(data.read_bytes(), kind) + place, value, size)
    refusal(data)


def test_records_and_pages_beyond_the_file_are_refused(data: Path):
    content = data.read_bytes()
    branch, leaf = tree_page(content, 1), tree_page(content, 2)
    node = branch + int.from_bytes(content[branch + 16 : branch + 18], "little")
    change(data, node, 0xFFFF, 2)
    refusal(data)
    data.write_bytes(content)
    nodes = struct.unpack_from(
        f"<{(struct.unpack_from('<H', content, leaf + 12)[0] - 16) // 2}H", content, leaf + 16
    )
    big = next(leaf + node for node in nodes if content[leaf + node + 4] & 1)
    change(data, big, 0xFFFF, 4)
    change(data, big + 2, 0xFFFF, 2)  # 4 GiB
    refusal(data)
    data.write_bytes(content)
    change(data, big + 8 + 304, 1 << 33, 8)
    refusal(data)


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
    refusal(data)
