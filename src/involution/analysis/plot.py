"""A picture of a benchmark: for each direction and shape, a bar as long as each contender took."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from involution.analysis.record import Row
from involution.analysis.table import number

_OURS, _OTHERS = "#d1495b", "#b8c0c8"


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
