import pytest

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building.image_keys import find_keyed_images


def _touch(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_keys_are_paths_within_the_folder_as_ascii_without_dots(tmp_path):
    _touch(
        tmp_path,
        "0001/a.png",
        "0002/a.png",
        "b 1.5.JPG",
        "grün.webp",
        ".hidden.png",
        ".git/c.png",
        "notes.txt",
    )
    images, _ = find_keyed_images([tmp_path])
    assert [*images] == ["0001_a", "0002_a", "b_1_5", "gru" + "fcn"]
    assert images["b_1_5"] == str(tmp_path / "b 1.5.JPG") and len(images) == 4


@pytest.mark.parametrize(
    ("first", "second"), [("a.jpg", "a.png"), ("a b.png", "a_b.png"), ("a/b.png", "a_b.png")]
)
def test_of_two_images_of_one_key_the_first_is_taken(tmp_path, first, second):
    _touch(tmp_path, first, second)
    images, skipped = find_keyed_images([tmp_path])
    (key,) = images
    assert images[key] == str(tmp_path / first)
    ((image, reason),) = skipped
    assert image == str(tmp_path / second)
    assert reason == f"would be stored as {key!r}, as {tmp_path / first} is: rename one of them"


def test_of_one_name_in_two_folders_that_of_the_first_folder_is_taken(tmp_path):
    _touch(tmp_path, "one/a.png", "two/a.png")
    images, skipped = find_keyed_images([tmp_path / "two", tmp_path / "one"])
    assert images == {"a": str(tmp_path / "two" / "a.png")}
    assert [each.image for each in skipped] == [str(tmp_path / "one" / "a.png")]


def test_key_too_long_for_lmdb_is_skipped(tmp_path):
    _touch(tmp_path / ("x" * 250) / ("y" * 250), "a.png")
    images, ((_, reason),) = find_keyed_images([tmp_path])
    assert not images and "503 letters, at most 500" in reason


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="none is not a folder"):
        find_keyed_images([tmp_path / "none"])
    with pytest.raises(UserError, match=r"holds no images \(\.png"):
        find_keyed_images([tmp_path])
