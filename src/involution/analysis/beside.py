"""The same work in several processes at once, which share nothing but the machine: what threads can gain at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from multiprocessing import get_context
from time import perf_counter, sleep
from types import TracebackType
from typing import Any

import torch

from involution.analysis.memory import Step

_NAP, _LINGER = 5e-4, 3e-3  # seconds


class Beside:
    """Other processes, each of which does on one thread what this one does, for as long as it does it.

    Use it as a context: the processes start with it and end with it, and sleep where nothing is run.

    Args:
        others: how many.
        prepare: a function that can be pickled. Called with `args`, in each of the processes, it gives the steps to
            choose from.
        args: anything that can be pickled.
    """

    def __init__(self, others: int, prepare: Callable[..., Sequence[Step]], *args: Any) -> None:
        context = get_context("spawn")
        self._step, self._until = context.RawValue("i", 0), context.RawValue("d", 0.0)
        self._ready = context.Semaphore(0)
        self._others = [
            context.Process(target=_work, args=(self._step, self._until, self._ready, prepare, args), daemon=True)
            for _ in range(others)
        ]

    def __enter__(self) -> Beside:
        for other in self._others:
            other.start()
        for other in self._others:
            while not self._ready.acquire(timeout=1):
                if not other.is_alive():
                    self._step.value = -1
                    raise RuntimeError(f"a process beside this one ended with exit code {other.exitcode}.")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._step.value = -1
        for other in self._others:
            other.join()

    def run(self, which: int, step: Step) -> None:
        """Run `step` while the others run theirs of the number `which`, again and again; they go on for a moment."""
        self._step.value, self._until.value = which, inf
        step()
        self._until.value = perf_counter() + _LINGER  # so that the next run finds them at work


def _work(step: Any, until: Any, ready: Any, prepare: Callable[..., Sequence[Step]], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    steps = prepare(*args)
    for each in steps:
        each()
    ready.release()
    while (which := step.value) >= 0:
        if perf_counter() < until.value:
            steps[which]()
        else:
            sleep(_NAP)
