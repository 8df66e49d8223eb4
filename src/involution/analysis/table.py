"""Rows of a benchmark as tables in Markdown, with the ratios they are made for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from involution.analysis.record import Row


@dataclass(frozen=True)
class Quantity:
    """What a table shows of a row, and what its ratio to the base compares; both None where nothing was measured."""

    unit: str
    ratio: str
    value: Callable[[Row], float | None]
    cost: Callable[[Row], float | None]


TIME = Quantity("ms", "times as long", lambda row: row.p50_ms, lambda row: row.p50_ms)
TIME_PER_FLOP = Quantity("ms", "times as long a FLOP", lambda row: row.p50_ms, lambda row: 1 / row.gflops)
MEMORY = Quantity("peak MiB", "times as much", lambda row: row.peak_mib, lambda row: row.peak_mib)

_ABSENT = "-"


def against_base(rows: Sequence[Row], quantity: Quantity) -> str:
    """A table for each direction: a line for each contender, with its ratio to the base in brackets.

    Args:
        rows: of one benchmark.
        quantity: what to show; a direction in which no row has it is left out.
    """
    tables = []
    for direction, here in _by_direction(rows, quantity).items():
        shapes = _unique(row.shape for row in here.values())
        ratios = _ratios(here, quantity)
        lines = [[f"{direction}, {quantity.unit} ({quantity.ratio})", *shapes, "geometric mean"]]
        for name in _unique(row.contender for row in here.values()):
            values = [quantity.value(here[name, shape]) if (name, shape) in here else None for shape in shapes]
            own = [ratios.get((name, shape)) for shape in shapes]
            cells = [
                number(value) if ratio is None else f"{number(value)} ({ratio:.2f})"
                for value, ratio in zip(values, own, strict=True)
            ]
            known = [ratio for ratio in own if ratio is not None]
            lines.append([name, *cells, number(geometric_mean(known) if known else None)])
        tables.append(markdown(lines))
    return "\n\n".join(tables)


def with_ratios(rows: Sequence[Row], quantity: Quantity) -> str:
    """A table for each direction: a line for each contender, then one for each ratio of a contender to its base.

    Args:
        rows: of one benchmark.
        quantity: what to show; a direction in which no row has it is left out.
    """
    tables = []
    for direction, here in _by_direction(rows, quantity).items():
        shapes = _unique(row.shape for row in here.values())
        lines = [[f"{direction}, {quantity.unit}", *shapes]]
        for name in _unique(row.contender for row in here.values()):
            values = [quantity.value(here[name, shape]) if (name, shape) in here else None for shape in shapes]
            lines.append([name, *map(number, values)])
        tables.append(markdown([*lines, *_ratio_lines(here, quantity, shapes)]))
    return "\n\n".join(tables)


def _ratio_lines(here: Mapping[tuple[str, str], Row], quantity: Quantity, shapes: Sequence[str]) -> list[list[str]]:
    ratios = _ratios(here, quantity)
    pairs = {row.contender: row.base for row in here.values() if row.contender != row.base}
    return [
        [f"{name} / {base}", *(f"{ratios[name, s]:.2f}" if (name, s) in ratios else _ABSENT for s in shapes)]
        for name, base in pairs.items()
    ]


def summary(rows: Sequence[Row]) -> str:
    """One table of ratios: a line for each contender and its base, a column for each direction and batch size."""
    columns: dict[str, dict[str, float]] = {}
    for quantity, what in ((TIME, ""), (MEMORY, ", memory")):
        for direction, here in _by_direction(rows, quantity).items():
            for (name, shape), ratio in _ratios(here, quantity).items():
                base = here[name, shape].base
                if name != base:
                    head = f"{direction}, batch {shape.partition('x')[0]}{what}"
                    columns.setdefault(head, {})[f"{name} / {base}"] = ratio
    labels = _unique(label for column in columns.values() for label in column)
    lines = [
        [label, *(f"{column[label]:.2f}" if label in column else _ABSENT for column in columns.values())]
        for label in labels
    ]
    return markdown([["times as much", *columns], *lines])


def _by_direction(rows: Sequence[Row], quantity: Quantity) -> dict[str, dict[tuple[str, str], Row]]:
    """Rows by contender and shape, for each direction."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        if quantity.value(row) is not None:
            found.setdefault(row.direction, {})[row.contender, row.shape] = row
    return found


def _ratios(here: Mapping[tuple[str, str], Row], quantity: Quantity) -> dict[tuple[str, str], float]:
    ratios = {}
    for (name, shape), row in here.items():
        base = here.get((row.base, shape))
        mine, its = quantity.cost(row), base and quantity.cost(base)
        if mine and its:  # a peak of memory can be nothing at all
            ratios[name, shape] = mine / its
    return ratios


def number(value: float | None) -> str:
    """Three digits or more, without an exponent."""
    if value is None:
        return _ABSENT
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of these cells, the first line its head, the first column flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [" | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([f"| {text[0]} |", f"|{rule}|", *(f"| {line} |" for line in text[1:])])


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
