"""Files are written whole or not at all, by however many writers, however they end."""

import multiprocessing
import os
import signal
from pathlib import Path

from esc_basicsr.common.files import written_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_of_one_file_leave_a_whole_one(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with written_whole(target) as first:
        first.write(b"first")
        with written_whole(target) as second:
            second.write(b"second, longer")
        assert target.read_bytes() == b"second, longer"
    assert target.read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def _write_until_killed(target: Path) -> None:
    with written_whole(target) as file:
        file.write(b"half of a long")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_killed_writers_leave_is_taken_over_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"before")
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(target,))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert target.read_bytes() == b"before"
        assert len(names(tmp_path)) == 2
    with written_whole(target) as file:
        file.write(b"after")
    assert target.read_bytes() == b"after"
    assert names(tmp_path) == ["a"]


def _write_often(target: Path, letter: bytes) -> None:
    for length in range(1, 60):
        with written_whole(target) as file:
            file.write(letter * (1000 * length))
            file.flush()
            file.write(b"end")


def test_readers_meet_whole_files_alone(tmp_path: Path) -> None:
    target = tmp_path / "a"
    _write_often(target, b"s")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(target, letter)) for letter in (b"x", b"y", b"z")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        content = target.read_bytes()
        assert content.endswith(b"end") and content == content[:1] * (len(content) - 3) + b"end"
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert names(tmp_path) == ["a"]


def test_links_and_files_that_stand_in_the_way_are_left_alone(tmp_path: Path) -> None:
    """What another user puts in place of the file to be written is not written to."""
    target, other = tmp_path / "a", tmp_path / "other"
    with written_whole(target) as file:
        (partial,) = (path for path in tmp_path.iterdir() if path.suffix == ".partial")
        file.write(b"1")
    other.write_bytes(b"precious")
    partial.symlink_to(other)
    with written_whole(target) as file:
        file.write(b"2")
    assert target.read_bytes() == b"2" and other.read_bytes() == b"precious"
    partial.unlink()
    os.mkfifo(partial)
    with written_whole(target) as file:
        file.write(b"3")
    assert target.read_bytes() == b"3"
