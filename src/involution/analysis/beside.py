"""The same work in several processes at once, which share nothing but the machine: what threads can gain at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from time import monotonic, sleep
from types import TracebackType
from typing import Any

import torch

from involution.analysis.memory import Step

_END = -1  # instead of the number of a step
_NAP, _LINGER, _LATE = 5e-4, 3e-3, 1.0  # seconds


class Beside:
    """Other processes, each of which does on one thread what this one does, at the same time.

    Use it as a context: the processes start with it and end with it, and sleep soon after they have done something.

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
        self._turn = context.RawArray("q", 2)  # how often something was run, and the number of the step
        self._others = []
        for _ in range(others):
            done, ready = context.RawValue("q", 0), context.Event()
            work = (self._turn, done, ready, prepare, args)
            self._others.append((context.Process(target=_work, args=work, daemon=True), done, ready))

    def __enter__(self) -> Beside:
        try:
            for process, _, _ in self._others:
                process.start()
            for process, _, ready in self._others:
                while not ready.wait(timeout=0.1):
                    _check(process)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()
        if kind is None:
            for process, _, _ in self._others:
                _check(process)

    def _end(self) -> None:
        self._turn[1] = _END
        self._turn[0] += 1
        for process, _, _ in self._others:
            if process.pid is not None:
                process.join()

    def run(self, which: int, step: Step) -> None:
        """Run `step` while each of the others runs its own of the number `which`, once, and wait for all of them."""
        turn = self._turn[0] + 1
        self._turn[1] = which
        self._turn[0] = turn  # last: the others wait for it
        step()
        for process, done, _ in self._others:
            late = monotonic() + _LATE
            while done.value != turn:
                if monotonic() > late:
                    _check(process)


def _check(process: BaseProcess) -> None:
    if process.exitcode:
        raise RuntimeError(f"a process beside this one ended with exit code {process.exitcode}.")


def _work(turn: Any, done: Any, ready: Any, prepare: Callable[..., Sequence[Step]], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    steps, parent, last = prepare(*args), parent_process(), monotonic()
    for each in steps:
        each()
    ready.set()
    while True:
        if turn[0] != done.value:
            if turn[1] == _END:
                return
            steps[turn[1]]()
            done.value, last = done.value + 1, monotonic()
        elif monotonic() > last + _LINGER:
            if parent is None or not parent.is_alive():
                return
            sleep(_NAP)
