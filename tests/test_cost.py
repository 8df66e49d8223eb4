"""Counting, and timing in turns."""

import pytest
import torch
from torch import nn

from involution import cost


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


def test_a_transposed_convolution_counts_every_input_once_for_every_weight() -> None:
    deconv = nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose2d(6, 4, 2, stride=2)
    with torch.device("meta"):
        image = torch.empty(1, 4, 5, 7)
    macs, flops = cost.counts(nn.Sequential(*deconv).to("meta"), image)
    assert macs == 4 * 6 * 9 * 35 + 6 * 4 * 4 * 35
    assert macs == cost.macs(nn.Sequential(*deconv), torch.ones(1, 4, 5, 7))
    assert flops == macs + 6 * 35 + 4 * 4 * 35


def test_hooks_are_taken_off_when_the_image_does_not_fit() -> None:
    conv = nn.Conv2d(4, 6, 3)
    with pytest.raises(RuntimeError, match="channels"):
        cost.counts(conv, torch.ones(1, 3, 5, 5))
    assert not conv._forward_hooks
