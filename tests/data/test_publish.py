import pytest

from esc_basicsr.data.publish import publishing
from esc_basicsr.errors import UserError


def _publish(targets, overwrite=False, text="new"):
    with publishing(targets, ["*.txt"], overwrite) as partials:
        for partial in partials:
            (partial / "a.txt").write_text(text)


def test_folders_appear_when_all_are_complete(tmp_path):
    targets = [tmp_path / "deep" / "one", tmp_path / "two"]
    with publishing(targets, ["*.txt"], False) as partials:
        assert [partial.name for partial in partials] == ["one.partial", "two.partial"]
        assert not any(target.exists() for target in targets)
        (partials[1] / "a.txt").write_text("x")
    assert all(target.is_dir() for target in targets)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "two"]


def test_remains_of_a_killed_run_are_replaced(tmp_path):
    (tmp_path / "one.partial").mkdir()
    (tmp_path / "one.partial" / "old.txt").touch()
    _publish([tmp_path / "one"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["a.txt"]


def test_one_existing_target_stops_all(tmp_path):
    (tmp_path / "two").mkdir()
    with pytest.raises(UserError, match="two exists already"):
        _publish([tmp_path / "one", tmp_path / "two"])
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_overwrite_replaces_the_folder_and_leaves_nothing_else(tmp_path):
    _publish([tmp_path / "one"], text="old")
    _publish([tmp_path / "one"], overwrite=True)
    assert (tmp_path / "one" / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_folder_with_other_files_is_never_replaced(tmp_path):
    _publish([tmp_path / "one"])
    (tmp_path / "one" / "thesis.doc").touch()
    with pytest.raises(UserError, match=r"holds thesis\.doc and not only \*\.txt"):
        _publish([tmp_path / "one"], overwrite=True)
    assert (tmp_path / "one" / "thesis.doc").exists()


def test_file_is_never_replaced(tmp_path):
    (tmp_path / "one").touch()
    with pytest.raises(UserError, match="one is a file"):
        _publish([tmp_path / "one"], overwrite=True)


def test_parent_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.one cannot be written: .*Not a directory"):
        _publish([tmp_path / "file" / "one"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_failure_leaves_nothing_and_keeps_what_was_there(tmp_path, error):
    _publish([tmp_path / "one"], text="old")
    with pytest.raises(error), publishing([tmp_path / "one", tmp_path / "two"], ["*.txt"], True) as partials:
        (partials[0] / "a.txt").touch()
        raise error
    assert (tmp_path / "one" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
