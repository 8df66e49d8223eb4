"""Timing in turns."""

import pytest

from involution.analysis import cost


class Clock:
    """Time that passes only while something runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def runs(self, name: str, *seconds: float):
        """What takes `seconds` in turn, the last of them ever after."""
        left = list(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cost, "perf_counter", lambda: clock.now)
    return clock


def test_runs_take_turns_and_settle_before_they_count(clock) -> None:
    times = cost.interleaved({"a": clock.runs("a", 1.0, 0.5), "b": clock.runs("b", 0.004)}, rounds=2, warm_up=1)
    turn = ["a"] * 2 + ["b"] * 4  # settling takes a one run, and b three until 10 ms have passed
    assert clock.order == turn * 3
    assert times == {"a": pytest.approx([500, 500]), "b": pytest.approx([4, 4])}


def test_time_is_up_after_five_rounds_and_the_warm_up_does_not_count(clock) -> None:
    slow_to_compile = clock.runs("a", 1000.0, 10.0)
    assert len(cost.interleaved({"a": slow_to_compile}, rounds=30, warm_up=1, seconds=90)["a"]) == 5
    assert len(cost.interleaved({"a": clock.runs("a", 1.0)}, rounds=30, warm_up=1, seconds=90)["a"]) == 30


def test_no_round_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="`rounds` must be at least 1; got 0"):
        cost.interleaved({}, rounds=0)
