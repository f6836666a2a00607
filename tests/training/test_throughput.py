"""How images a second are counted."""

import time

import pytest

from esc_basicsr.training.throughput import Throughput


def test_steps_are_counted_without_the_first_and_without_interruptions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    throughput = Throughput()
    now = 100
    throughput.count(8)
    assert throughput.take() is None
    now = 102
    throughput.count(8)
    now = 500  # a validation
    throughput.go_on()
    now = 502
    throughput.count(8)
    assert throughput.take() == 16 / 4
    assert throughput.take() is None
    now = 503
    throughput.count(8)
    assert throughput.take() == 8
