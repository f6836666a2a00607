import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building import publish
from esc_basicsr.data.building.publish import partial_of, publishing, put_in_place


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


@pytest.mark.parametrize("failing", ["one", "two", "one.partial", "two.partial", "three.partial"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failing_rename_puts_back_what_was_there(tmp_path, monkeypatch, failing, error):
    _publish([tmp_path / "one", tmp_path / "two"], text="old")
    real, failures = Path.rename, []

    def rename(self, target):
        if self.name == failing and not failures:
            failures.append(self)
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        _publish([tmp_path / name for name in ("one", "two", "three")], overwrite=True)
    assert failures
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert {(tmp_path / name / "a.txt").read_text() for name in ("one", "two")} == {"old"}


@pytest.mark.parametrize("killed_at", ["one", "two", "one.partial", "two.partial", "one.replaced"])
def test_renaming_that_was_killed_is_completed_by_calling_it_again(tmp_path, monkeypatch, killed_at):
    class Killed(BaseException):
        pass

    targets = [tmp_path / "one", tmp_path / "two"]
    _publish(targets, text="old")
    for target in targets:
        partial_of(target).mkdir()
        (partial_of(target) / "a.txt").write_text("new")
    real, renamed = Path.rename, []

    def rename(self, target):
        if self.name == killed_at or renamed[-1:] == [killed_at]:
            renamed.append(killed_at)  # from now on nothing is renamed, nor put back
            raise Killed
        real(self, target)

    def remove(folder):
        if folder.name == killed_at and folder.exists():
            raise Killed
        shutil.rmtree(folder, ignore_errors=True)

    with monkeypatch.context() as killing, pytest.raises(Killed):
        killing.setattr(Path, "rename", rename)
        killing.setattr(publish, "remove", remove)
        put_in_place(targets)
    put_in_place(targets)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert {(target / "a.txt").read_text() for target in targets} == {"new"}


def test_old_folder_that_cannot_be_removed_is_told_and_the_new_one_stays(tmp_path, monkeypatch, esc_log):
    _publish([tmp_path / "one"], text="old")
    real = publish.remove

    def remove(folder):
        if folder.exists() and folder.suffix == ".replaced":
            raise PermissionError(13, "Permission denied", str(folder))
        real(folder)

    monkeypatch.setattr(publish, "remove", remove)
    _publish([tmp_path / "one"], overwrite=True)
    assert (tmp_path / "one" / "a.txt").read_text() == "new"
    (message,) = esc_log
    assert "one is complete; what it replaced cannot be removed" in message and "one.replaced" in message


def test_sigterm_is_cleaned_up_after_like_ctrl_c(tmp_path):
    _publish([tmp_path / "one"], text="old")
    with (
        pytest.raises(SystemExit) as ended,
        publishing([tmp_path / "one", tmp_path / "two"], ["*.txt"], True) as partials,
    ):
        (partials[0] / "a.txt").touch()
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert (tmp_path / "one" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_handler_of_sigterm_that_is_at_work_is_kept(tmp_path):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with publishing([tmp_path / "one"], ["*.txt"], False):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert (tmp_path / "one").is_dir()


def test_folders_are_made_in_another_thread_than_the_main_one_too(tmp_path):
    thread = threading.Thread(target=_publish, args=([tmp_path / "one"],))
    thread.start()
    thread.join()
    assert (tmp_path / "one" / "a.txt").exists()
