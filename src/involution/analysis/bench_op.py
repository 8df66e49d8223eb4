"""The benchmark of the operator against its rivals: right first, then timed in turns, then written down."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch._functorch import config as functorch

from involution import cost
from involution.analysis import contenders, record, table
from involution.analysis.memory import Step, peak_mib
from involution.analysis.plot import draw
from involution.analysis.problem import PASSES, SHAPES, Problem, check, problems, timed
from involution.analysis.record import Row


def op(
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    kernel_size: int = 7,
    group_channels: int = 16,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    layout: Literal["channels_last", "contiguous"] = "channels_last",
    compiled: bool = True,
    memory: bool = True,
    rounds: int = 30,
    plot: Path | None = None,
    out: Path = Path("runs/bench"),
) -> list[Row]:
    """Time the operator against other ways to compute it and against convolutions of the same size.

    Args:
        shapes: batch, channels and side of each input; the default is where RedNet-50 uses its involutions.
        kernel_size: K, odd.
        group_channels: channels that share a kernel.
        dtype: of all tensors.
        layout: memory format of all tensors.
        compiled: also time the compiled loop over taps, which takes a minute to compile.
        memory: also measure the peak memory of all but the compiled loops, each in a process of its own.
        rounds: how often each contender is timed, in turns with the others.
        plot: PNG file for a chart of the times.
        out: folder for op.csv, to which the rows are added.

    Raises:
        ValueError: if the arguments do not fit one another.
        RuntimeError: if the operator is wrong on this machine; nothing is timed then.
    """
    cases = problems(shapes, kernel_size=kernel_size, group_channels=group_channels, dtype=dtype, layout=layout)
    record.check(out / "op.csv")
    here = record.here()
    rows: list[Row] = []
    with functorch.patch(donated_buffer=False):  # else compiled code could not go backward through one graph twice
        for case in cases:
            found = _rows(case, compiled, memory, rounds, here)
            record.add(found, out / "op.csv")  # at once: the next shape takes minutes, and may be interrupted
            rows += found
    print(f"\nrows added to {out / 'op.csv'}")
    for quantity in (table.TIME, table.MEMORY) if memory else (table.TIME,):
        print(f"\n{table.against_base(rows, quantity)}")
    print(f"\n{table.of_bandwidth(rows, contenders.COPY)}")
    if plot:
        draw(rows, {contenders.OURS}, plot)
    return rows


def _rows(problem: Problem, compiled: bool, memory: bool, rounds: int, here: dict[str, Any]) -> list[Row]:
    x, kernel, grad = problem.tensors()
    rivals = contenders.operators(x, kernel, compiled)
    check(rivals[contenders.OURS].run, x, kernel, grad)
    rows = []
    for direction, passes in PASSES.items():
        print(f"timing {problem.shape}, {direction} ...", file=sys.stderr, flush=True)
        runs = {name: timed(rival.run, x, rival.weight, grad, direction) for name, rival in rivals.items()}
        work = {
            name: (2e-6 * passes * x.numel() * rival.macs, passes * _megabytes(x, rival.weight, x))
            for name, rival in rivals.items()
        }
        if direction == "forward":
            runs[contenders.COPY] = contenders.copy()
            work[contenders.COPY] = (0.0, contenders.COPY_MEGABYTES)
        for name, times in cost.interleaved(runs, rounds, warm_up=3, seconds=60).items():
            measured = memory and direction != "backward" and name in rivals and not name.startswith("compiled")
            peak = peak_mib(_steps, problem, name, direction) if measured else None
            figures = record.figures(times, *work[name], peak)
            rows.append(Row("op", name, contenders.OURS, direction, **problem.described(), **figures, **here))
    return rows


def _megabytes(*tensors: torch.Tensor) -> float:
    return 1e-6 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _steps(problem: Problem, name: str, direction: str) -> tuple[Step, Step]:
    """A pass of the contender on one small image, and on the problem."""

    def step(problem: Problem) -> Step:
        x, kernel, grad = problem.tensors()
        rival = contenders.operators(x, kernel, compiled=False)[name]
        return timed(rival.run, x, rival.weight, grad, direction)

    return step(replace(problem, batch=1, side=problem.kernel_size)), step(problem)
