"""The same work in several processes at once, which share nothing but the machine: what threads can gain at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from time import monotonic, sleep
from types import TracebackType
from typing import Any

import torch

from involution.analysis.memory import Step

# In seconds, of a clock that is one for all processes. What is timed behind `run` should settle for longer than the
# others go on: for a moment and one step.
_NAP, _LINGER = 5e-4, 3e-3


class Beside:
    """Other processes, each of which does on one thread what this one does, for as long as it does it.

    Use it as a context: the processes start with it and end with it, and sleep where nothing is run.

    Args:
        others: how many.
        prepare: a function that can be pickled. Called with `args`, in each of the processes, it gives the steps to
            choose from.
        args: anything that can be pickled.

    Raises:
        RuntimeError: if one of the processes fails, be it at the start or later.
    """

    def __init__(self, others: int, prepare: Callable[..., Sequence[Step]], *args: Any) -> None:
        context = get_context("spawn")
        self._step, self._until = context.RawValue("i", 0), context.RawValue("d", 0.0)
        self._others = []
        for _ in range(others):
            ready = context.Event()
            work = (self._step, self._until, ready, prepare, args)
            self._others.append((context.Process(target=_work, args=work, daemon=True), ready))

    def __enter__(self) -> Beside:
        try:
            for process, _ in self._others:
                process.start()
            for process, ready in self._others:
                while not ready.wait(timeout=0.1):
                    _check(process)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()
        if kind is None:
            for process, _ in self._others:
                _check(process)

    def _end(self) -> None:
        self._step.value = -1
        for process, _ in self._others:
            if process.pid is not None:
                process.join()

    def run(self, which: int, step: Step) -> None:
        """Run `step` while the others run theirs of the number `which`, again and again; they go on for a moment."""
        self._step.value, self._until.value = which, inf
        step()
        self._until.value = monotonic() + _LINGER  # so that the next run finds them at work


def _check(process: BaseProcess) -> None:
    if process.exitcode:
        raise RuntimeError(f"a process beside this one ended with exit code {process.exitcode}.")


def _work(step: Any, until: Any, ready: Any, prepare: Callable[..., Sequence[Step]], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    steps, parent = prepare(*args), parent_process()
    for each in steps:
        each()
    ready.set()
    while (which := step.value) >= 0 and parent is not None and parent.is_alive():
        if monotonic() < until.value:
            steps[which]()
        else:
            sleep(_NAP)
