"""Warnings that are for whoever waits in a thread, and those that are for the log."""

from threading import Thread

import pytest

from esc_basicsr.common.log import logger, warnings_of_this_thread


def test_warnings_of_this_thread_are_collected_and_others_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logger, "propagate", False)  # without BasicSR's handlers, as where it does not run
    with warnings_of_this_thread() as warnings:
        logger.warning("one of %s", "ours")
        logger.info("no warning")
        other = Thread(target=logger.warning, args=("another's",))
        other.start()
        other.join()
    logger.warning("late")
    assert warnings == ["one of ours"]
    assert capsys.readouterr().err.splitlines() == ["another's", "late"]
