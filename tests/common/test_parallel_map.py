"""What becomes of tasks when something becomes of their workers."""

import os
import signal
import sys
import threading
import time

import cv2
import numpy as np
import pytest

from esc_basicsr.common import parallel_map as module
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.parallel_map import parallel_map


def stop_at_3(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    return number


def die_at_3(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def time_out(number: int) -> int:
    raise TimeoutError("the task's own")


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def test_a_stopped_worker_is_reported_and_may_go_on(
    esc_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.1)

    def let_go_on() -> None:
        while not esc_log:
            time.sleep(0.05)
        os.kill(int(esc_log[0].split()[2]), signal.SIGCONT)

    threading.Thread(target=let_go_on, daemon=True).start()
    assert list(parallel_map(stop_at_3, range(6), 2)) == list(range(6))
    assert len(esc_log) == 1 and "is stopped" in esc_log[0]


def test_workers_work_where_opencv_has_threads_already() -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1000, 1000))
        assert list(parallel_map(abs, range(-3, 3), 2)) == [3, 2, 1, 0, 1, 2]
    finally:
        cv2.setNumThreads(before)


def test_a_killed_worker_ends_it_with_a_reason() -> None:
    with pytest.raises(UserError, match=r"a worker process died.*--workers"):
        list(parallel_map(die_at_3, range(6), 2))


def test_a_tasks_own_timeout_is_its_own() -> None:
    with pytest.raises(TimeoutError, match="the task's own"):
        list(parallel_map(time_out, range(2), 2))
