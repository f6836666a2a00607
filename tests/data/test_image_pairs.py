"""HR and LR images in folders, as people have them."""

from pathlib import Path

import pytest

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.image_pairs import image_names, pair_folders, stray_names


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "gt", tmp_path / "lq"


def fill(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_suffixes_may_differ_and_the_same_one_is_preferred(folders: tuple[Path, Path]) -> None:
    gt, lq = folders
    fill(gt, "a.png", "b.PNG", "c.c.png")
    fill(lq, "a.jpg", "b.webp", "c.c.png")
    assert pair_folders(gt, lq) == {"a.png": "a.jpg", "b.PNG": "b.webp", "c.c.png": "c.c.png"}
    other = lq.with_name("lqx2")
    fill(other, "ax2.tif", "bx2.png", "c.cx2.png")
    assert list(pair_folders(gt, other, "{}x2").values()) == ["ax2.tif", "bx2.png", "c.cx2.png"]


def test_stray_files_are_named_and_not_counted(folders: tuple[Path, Path]) -> None:
    gt, lq = folders
    fill(gt, "a.png", "Thumbs.db", "desktop.ini", ".DS_Store", ".hidden.png")
    fill(lq, "a.png", "notes.txt")
    assert pair_folders(gt, lq) == {"a.png": "a.png"}
    assert stray_names(gt) == ["Thumbs.db", "desktop.ini"]
    assert image_names(lq) == ["a.png"]


def test_what_has_no_partner_is_named_on_both_sides(folders: tuple[Path, Path]) -> None:
    gt, lq = folders
    fill(gt, "a.png", "b.png")
    fill(lq, "a.png", "c.png", "d.png")
    with pytest.raises(UserError, match=r"1 of 2 .*no LR image: b\.png .*2 of 3 .*no HR image: c\.png, d"):
        pair_folders(gt, lq)


def test_several_lr_images_of_one_name_are_refused(folders: tuple[Path, Path]) -> None:
    gt, lq = folders
    fill(gt, "a.png")
    fill(lq, "a.jpg", "a.webp")
    with pytest.raises(UserError, match=r"'a\.png' of .* has several LR images in .*: a\.jpg, a\.webp"):
        pair_folders(gt, lq)
    fill(lq, "a.png")
    with pytest.raises(UserError, match="no HR image"):
        pair_folders(gt, lq)


def test_a_folder_that_does_not_exist_is_reported(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"gt' cannot be read: No such file"):
        image_names(folders[0])
