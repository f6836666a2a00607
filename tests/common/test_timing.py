"""Times are taken in turn."""

import functools

import torch

from esc_basicsr.common import timing
from esc_basicsr.common.timing import median_times, times_in_turn

CPU = torch.device("cpu")


def test_calls_are_timed_in_turn():
    order = []
    calls = {name: functools.partial(order.append, name) for name in "ab"}
    times = times_in_turn(calls, repeats=2, warmup=1, device=CPU)
    assert order == ["a", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert set(median_times(calls, repeats=1, warmup=0, device=CPU)) == {"a", "b"}


def test_a_call_that_takes_long_is_made_once(monkeypatch):
    order = []
    calls = {name: functools.partial(order.append, name) for name in ("short", "long")}
    monkeypatch.setattr(timing, "_seconds", lambda call, _: (call(), 5.0 if order[-1] == "long" else 0.1)[1])
    times = times_in_turn(calls, repeats=2, warmup=1, device=CPU, once_above=1.0)
    assert times == {"short": [0.1, 0.1], "long": [5.0]}
    assert order == ["short", "long", "short", "short"]
