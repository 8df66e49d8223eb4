"""What a computation costs here: multiply-adds, parameters, and time taken in turns with others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import quantiles
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Name = TypeVar("Name", bound=Hashable)

_SETTLING = 0.01  # seconds


def parameters(network: nn.Module) -> int:
    """Number of parameters of `network`."""
    return sum(p.numel() for p in network.parameters())


def macs(network: nn.Module, image: Tensor) -> int:
    """Multiply-adds of `network` on `image`: of all convolutions, linear layers and involutions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops() // 2


def interleaved(
    runs: Mapping[Name, Callable[[], object]],
    rounds: int = 100,
    warm_up: int = 10,
    seconds: float = float("inf"),
    device: torch.device | None = None,
) -> dict[Name, list[float]]:
    """Milliseconds of every run in every round.

    The runs take turns, so that whatever else the machine does hits all alike: compare them by ratios. In its turn each
    first runs untimed, for 10 ms or once, and pays for what its predecessor did to caches and free memory.

    Args:
        runs: what to time, by name.
        rounds: times each is measured.
        warm_up: rounds before those.
        seconds: begin no further round after this time.
        device: the accelerator to wait for, if the runs use one.

    Raises:
        ValueError: if there is no round.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1; got {rounds}.")
    times: dict[Name, list[float]] = {name: [] for name in runs}
    begin = perf_counter()
    for index in range(warm_up + rounds):
        if perf_counter() - begin > seconds and index > warm_up:
            break
        for name, run in runs.items():
            start = perf_counter()
            while True:
                run()
                _wait(device)
                if perf_counter() - start > _SETTLING:
                    break
            start = perf_counter()
            run()
            _wait(device)
            if index >= warm_up:
                times[name].append(1e3 * (perf_counter() - start))
    return times


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(times) < 2:
        return (times[0],) * 3
    tenths = quantiles(times, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
