"""The benchmark of the operator against itself: in other layouts, dtypes and sizes, and on one thread."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from involution import cost
from involution.analysis import contenders, record, table
from involution.analysis.beside import Beside
from involution.analysis.memory import Step
from involution.analysis.plot import draw
from involution.analysis.problem import PASSES, SHAPES, Problem, check, problems, timed
from involution.analysis.record import Row

_BASE, _ONE_THREAD, _PROCESSES = "base", "one thread", "processes"
_VARIANTS: dict[str, dict[str, Any]] = {
    _BASE: {},
    "contiguous": {"layout": "contiguous"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    _ONE_THREAD: {},
    **{f"K {size}": {"kernel_size": size} for size in (3, 5, 9)},
    **{f"D {channels}": {"group_channels": channels} for channels in (4, 8, 32, 64)},
}
_ONE_IMAGE = ", one image"  # for the whole batch, so that its tensors come from a cache and only outputs go to memory
_VARIANTS |= {name + _ONE_IMAGE: _VARIANTS[name] for name in (_BASE, "K 3", "D 4")}
_CALLS = 1000


def variants(
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    directions: Sequence[Literal["forward", "forward+backward"]] = ("forward", "forward+backward"),
    rounds: int = 30,
    plot: Path | None = None,
    out: Path = Path("runs/bench"),
) -> list[Row]:
    """Time the operator in other layouts, dtypes and sizes, on one thread, and when it has next to nothing to do.

    The base is float32, channels_last, K 7 and D 16. A ratio is how many times as long a variant takes as the base for
    each FLOP, that is the base's GFLOP/s divided by the variant's. A second table tells how near memory is to its
    limit: the bandwidth if each tensor were moved once, as a share of that of a copy in the same run. What takes t
    times as long a FLOP at a share s would take n times as long at t s / n. The base, K 3 and D 4 are also timed
    forward with one image for the whole batch: what would be left if memory took no time. Where the batch can be dealt
    out, as many processes as there are threads also do a part of the base each, on one thread: what the base would take
    if threads cost nothing.

    Args:
        shapes: batch, channels and side of each input; the default is where RedNet-50 uses its involutions. 64 must
            divide the channels.
        directions: forward, forward+backward or both.
        rounds: how often each variant is timed, in turns with the others.
        plot: PNG file for a chart of the times.
        out: folder for variants.csv, to which the rows are added.

    Raises:
        ValueError: if the arguments do not fit one another.
        RuntimeError: if a variant is wrong on this machine; nothing is timed then.
    """
    cases = {
        (name, problem.shape): problem for name, changes in _VARIANTS.items() for problem in problems(shapes, **changes)
    }
    if not directions:
        raise ValueError("`directions` must hold at least one; got none.")
    record.check(out / "variants.csv")
    here = record.here()
    rows = [*_rows(cases, directions, rounds, here), _overhead(rounds, here)]
    record.add(rows, out / "variants.csv")
    print(f"\nrows added to {out / 'variants.csv'}")
    compared = [row for row in rows[:-1] if row.contender != contenders.COPY]
    print(f"\n{table.against_base(compared, table.TIME_PER_FLOP)}")
    print(f"\n{table.of_bandwidth(rows[:-1], contenders.COPY)}")
    print(f"\ncall overhead: {1e3 * rows[-1].p50_ms:.1f} microseconds")
    if plot:
        draw(compared, {_BASE}, plot)
    return rows


def _rows(
    cases: dict[tuple[str, str], Problem], directions: Sequence[str], rounds: int, here: dict[str, Any]
) -> list[Row]:
    tensors = {key: _tensors(key[0], problem) for key, problem in cases.items()}
    operators = {key: contenders.ours(problem.kernel_size) for key, problem in cases.items()}
    for key, run in operators.items():
        check(run, *tensors[key])
    threads = torch.get_num_threads()
    bases = {shape: problem for (name, shape), problem in cases.items() if name == _BASE}
    parts = {
        shape: replace(problem, batch=problem.batch // threads)
        for shape, problem in bases.items()
        if threads > 1 and problem.batch % threads == 0
    }
    rows = []
    for direction in directions:
        print(f"timing {direction} ...", file=sys.stderr, flush=True)
        chosen = [key for key in cases if direction == "forward" or not key[0].endswith(_ONE_IMAGE)]
        runs = {key: timed(operators[key], *tensors[key], direction) for key in chosen}
        for key in runs:
            if key[0] == _ONE_THREAD:
                runs[key] = partial(_on_one_thread, runs[key])
        copies = {(contenders.COPY, shape): contenders.copy() for shape in bases}
        with Beside(threads - 1 if parts else 0, _steps, [*parts.values()], direction) as others:
            for which, (shape, step) in enumerate(zip(parts, _steps([*parts.values()], direction), strict=True)):
                runs[_PROCESSES, shape] = partial(_on_one_thread, partial(others.run, which, step))
            found = cost.interleaved(runs | copies, rounds, warm_up=3, seconds=300)
        for (name, shape), times in found.items():
            if name == contenders.COPY:
                figures = record.figures(times, 0.0, contenders.COPY_MEGABYTES)
                rows.append(Row("variants", name, name, direction, **bases[shape].described(), **figures, **here))
                continue
            key = (_BASE if name == _PROCESSES else name, shape)
            x, kernel, _ = tensors[key]
            megaflops = 2e-6 * PASSES[direction] * x.numel() * kernel.shape[2] ** 2
            megabytes = 1e-6 * PASSES[direction] * x.element_size() * (2 * x.numel() + kernel.numel())
            figures = record.figures(times, megaflops, megabytes)
            where = here | {"threads": 1} if name == _ONE_THREAD else here
            rows.append(Row("variants", name, _BASE, direction, **cases[key].described(), **figures, **where))
    return rows


def _tensors(name: str, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    x, kernel, grad = problem.tensors()
    if name.endswith(_ONE_IMAGE):
        x, kernel = (t.detach()[:1].expand_as(t) for t in (x, kernel))
    return x, kernel, grad


def _steps(problems: Sequence[Problem], direction: str) -> list[Step]:
    """What is timed of each problem."""
    return [timed(contenders.ours(problem.kernel_size), *problem.tensors(), direction) for problem in problems]


def _on_one_thread(run: Step) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run()
    finally:
        torch.set_num_threads(threads)


def _overhead(rounds: int, here: dict[str, Any]) -> Row:
    """Milliseconds of a call on an input so small that little else is left, on one thread."""
    problem = Problem(1, 16, 4, kernel_size=3)
    x, kernel, _ = problem.tensors()
    run = contenders.ours(problem.kernel_size)

    @torch.no_grad()
    def calls() -> None:
        for _ in range(_CALLS):
            run(x, kernel)

    (times,) = cost.interleaved({"calls": partial(_on_one_thread, calls)}, rounds, warm_up=1).values()
    figures = record.figures([time / _CALLS for time in times], 2e-6 * x.numel() * 9)
    return Row("variants", "call", "call", "forward", **problem.described(), **figures, **here | {"threads": 1})
