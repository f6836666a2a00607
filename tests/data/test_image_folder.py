"""Finding images in folders."""

from pathlib import Path

import pytest

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.image_folder import find_images


def test_links_that_lead_round_in_a_circle_lead_to_no_images(tmp_path: Path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deep/c.tif", "deep/deeper/d.webp", ".hidden.png", "deep/notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "deep" / "up").symlink_to("..")
    (tmp_path / "folder.png").mkdir()
    images = ["a.JPG", "b.png", "deep/c.tif", "deep/deeper/d.webp"]
    assert [str(path) for path in find_images(tmp_path, recursive=True)] == images
    assert [str(path) for path in find_images(tmp_path, recursive=False)] == images[:2]


def test_images_of_formats_that_are_not_read_are_named(tmp_path: Path, esc_log: list[str]):
    for name in ("a.png", "b.gif", "deep/c.HEIC", ".hidden.gif", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path, recursive=True) == [Path("a.png")]
    (message,) = esc_log
    assert message == f"{tmp_path}: of formats that are not read, and left out: b.gif, deep/c.HEIC."


def test_a_folder_that_is_linked_twice_is_searched_twice(tmp_path: Path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").touch()
    (tmp_path / "other").symlink_to("one")
    found = [str(path) for path in find_images(tmp_path, recursive=True)]
    assert found == ["one/a.png", "other/a.png"]


def test_a_folder_that_cannot_be_searched_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be searched: Permission denied"):
        find_images(tmp_path, recursive=True)
