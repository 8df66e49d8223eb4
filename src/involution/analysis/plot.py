"""Pictures of benchmarks and of the paper's tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from involution.analysis.record import Row
from involution.analysis.table import number

_OURS, _OTHERS = "#d1495b", "#b8c0c8"
_COSTS = ("parameters, millions", "FLOPs as published, billions")


def draw(rows: Sequence[Row], ours: Collection[str], picture: Path) -> None:
    """Draw median milliseconds on a logarithmic axis, a panel for each direction and shape.

    Args:
        rows: of one benchmark.
        ours: the contenders to highlight.
        picture: the PNG file to write; its folder is made if need be.
    """
    from matplotlib.figure import Figure

    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row.direction, {}).setdefault(row.shape, []).append(row)
    names = {d: list(dict.fromkeys(row.contender for row in rows if row.direction == d)) for d in found}
    limits = (min(row.p50_ms for row in rows) / 2, max(row.p50_ms for row in rows) * 4)  # with room for the labels

    columns, heights = max(map(len, found.values())), [0.9 + 0.24 * len(own) for own in names.values()]
    figure = Figure(figsize=(2.2 + 2.8 * columns, 0.3 + sum(heights)), layout="constrained")
    lines = figure.subplots(len(found), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, (direction, panels) in zip(lines, found.items(), strict=True):
        for axes, (shape, here) in zip(line, panels.items(), strict=False):
            _draw_panel(axes, here, names[direction], ours)
            axes.set_title(f"{direction}, {shape}", fontsize=9)
            axes.set_xlim(limits)
        for axes in line[1:]:
            axes.set_yticklabels([])
        for axes in line[len(panels) :]:
            axes.set_axis_off()
    figure.supxlabel("median milliseconds", fontsize=10)
    _save(figure, picture)


def _save(figure: Any, picture: Path) -> None:
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def _draw_panel(axes: Any, rows: Sequence[Row], names: Sequence[str], ours: Collection[str]) -> None:
    colours = [_OURS if row.contender in ours else _OTHERS for row in rows]
    bars = axes.barh([names.index(row.contender) for row in rows], [row.p50_ms for row in rows], color=colours)
    axes.bar_label(bars, [number(row.p50_ms) for row in rows], padding=2, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)


def draw_accuracy(families: Mapping[str, Sequence[tuple[float, float, float]]], picture: Path) -> None:
    """Draw published accuracy against cost, the paper's two plots.

    Args:
        families: (top-1 in percent, parameters in millions, FLOPs in billions) of networks by family; RedNet and ResNet
            are highlighted.
        picture: the PNG file to write; its folder is made if need be.
    """
    from matplotlib.figure import Figure

    styles: dict[str, dict[str, Any]] = {"RedNet": {"color": _OURS, "lw": 2.2}, "ResNet": {"color": "#30343a", "lw": 2}}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for column, (axes, label) in enumerate(zip(figure.subplots(1, 2, sharey=True), _COSTS, strict=True), 1):
        for name, points in families.items():
            style = styles.get(name, {"lw": 1, "alpha": 0.6, "ls": "--"})
            costs, accuracies = [point[column] for point in points], [point[0] for point in points]
            axes.plot(costs, accuracies, marker="o", ms=4, label=name, **style)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("ImageNet top-1, published, %")
    figure.axes[1].legend(fontsize=8, loc="lower right")
    _save(figure, picture)


def draw_costs(costs: Sequence[tuple[str, int, int]], picture: Path) -> None:
    """Draw parameters and FLOPs as bars.

    Args:
        costs: name, parameters and FLOPs of each network, the first one highlighted.
        picture: the PNG file to write; its folder is made if need be.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.8 + 0.3 * len(costs)), layout="constrained")
    names = [name for name, *_ in costs]
    values_of = ([parameters / 1e6 for _, parameters, _ in costs], [flops / 1e9 for *_, flops in costs])
    for axes, values, label in zip(figure.subplots(1, 2, sharey=True), values_of, _COSTS, strict=True):
        bars = axes.barh(range(len(costs)), values, color=[_OURS] + [_OTHERS] * (len(costs) - 1))
        axes.bar_label(bars, [number(value) for value in values], padding=2, fontsize=8)
        axes.set_yticks(range(len(costs)), names)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    _save(figure, picture)
