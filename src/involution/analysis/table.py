"""Rows of a benchmark as tables in Markdown, with the ratios they are made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    for panel in _panels(rows, quantity):
        lines = [[f"{panel.direction}, {quantity.unit} ({quantity.ratio})", *panel.shapes, "geometric mean"]]
        for name in panel.contenders:
            ratios = [panel.ratios.get((name, shape)) for shape in panel.shapes]
            cells = [
                value if ratio is None else f"{value} ({ratio:.2f})"
                for value, ratio in zip(panel.values(name), ratios, strict=True)
            ]
            known = [ratio for ratio in ratios if ratio is not None]
            lines.append([name, *cells, number(geometric_mean(known) if known else None)])
        tables.append(markdown(lines))
    return "\n\n".join(tables)


def of_bandwidth(rows: Sequence[Row], copy: str) -> str:
    """A table for each direction: the bandwidth of each contender that moves each tensor once, as a share of a copy's.

    Args:
        rows: of one benchmark; a direction in which nothing was copied is left out.
        copy: the contender that copies.
    """
    bandwidth = Quantity(
        "GB/s", f"share of {copy}", lambda row: row.gbytes_per_second, lambda row: row.gbytes_per_second
    )
    copied = {row.direction for row in rows if row.contender == copy}
    return against_base([replace(row, base=copy) for row in rows if row.direction in copied], bandwidth)


def with_ratios(rows: Sequence[Row], quantity: Quantity) -> str:
    """A table for each direction: a line for each contender, then one for each ratio of a contender to its base.

    Args:
        rows: of one benchmark.
        quantity: what to show; a direction in which no row has it is left out.
    """
    tables = []
    for panel in _panels(rows, quantity):
        lines = [[f"{panel.direction}, {quantity.unit}", *panel.shapes]]
        lines += [[name, *panel.values(name)] for name in panel.contenders]
        for name, base in panel.pairs.items():
            ratios = [panel.ratios.get((name, shape)) for shape in panel.shapes]
            lines.append([f"{name} / {base}", *(_ABSENT if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
        tables.append(markdown(lines))
    return "\n\n".join(tables)


def summary(rows: Sequence[Row]) -> str:
    """One table of ratios: a line for each contender and its base, a column for each direction and batch size."""
    columns: dict[str, dict[str, float]] = {}
    for quantity, what in ((TIME, ""), (MEMORY, ", memory")):
        for panel in _panels(rows, quantity):
            for (name, shape), ratio in panel.ratios.items():
                if name in panel.pairs:
                    head = f"{panel.direction}, batch {shape.partition('x')[0]}{what}"
                    columns.setdefault(head, {})[f"{name} / {panel.pairs[name]}"] = ratio
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    lines = [
        [label, *(f"{column[label]:.2f}" if label in column else _ABSENT for column in columns.values())]
        for label in labels
    ]
    return markdown([["times as much", *columns], *lines])


class _Panel:
    """The rows of one direction that have a quantity, by contender and shape, and their ratios to their bases."""

    def __init__(self, direction: str, rows: Sequence[Row], quantity: Quantity) -> None:
        self.direction = direction
        self.shapes = list(dict.fromkeys(row.shape for row in rows))
        self.contenders = list(dict.fromkeys(row.contender for row in rows))
        self.pairs = {row.contender: row.base for row in rows if row.contender != row.base}
        self.ratios: dict[tuple[str, str], float] = {}
        self._values = {(row.contender, row.shape): quantity.value(row) for row in rows}
        costs = {(row.contender, row.shape): quantity.cost(row) for row in rows}
        for row in rows:
            mine, its = costs[row.contender, row.shape], costs.get((row.base, row.shape))
            if mine and its:  # a peak of memory can be nothing at all
                self.ratios[row.contender, row.shape] = mine / its

    def values(self, contender: str) -> list[str]:
        """What is shown of a contender, for each shape."""
        return [number(self._values.get((contender, shape))) for shape in self.shapes]


def _panels(rows: Sequence[Row], quantity: Quantity) -> list[_Panel]:
    known = [row for row in rows if quantity.value(row) is not None]
    directions = dict.fromkeys(row.direction for row in known)
    return [_Panel(name, [row for row in known if row.direction == name], quantity) for name in directions]


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
