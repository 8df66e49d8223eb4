"""Pictures of generated kernels, as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor

from involution.show.capture import Captured
from involution.show.measures import Group, colours

_MARKS = ("#d1495b", "#00798c", "#edae49", "#6a4c93", "#2e933c", "#e07a1f")  # of points
_ROW = 4  # panels that go into one
_SIGNED = "RdBu_r"  # red where positive, blue where negative
Point = tuple[float, float]


def draw_sums(captured: Captured, picture: Image, folder: Path) -> None:
    """The paper's figure: for every group, the sum of the kernel at every position, beside the image.

    Args:
        captured: what a layer did with the image.
        picture: the image.
        folder: where sums.png and sums.svg go.
    """
    sums = captured.sums()[0].numpy()
    figure, axes = _grid(1 + len(sums), picture, f"{captured.name}: sum of the kernel at every position")
    limit = float(np.abs(sums).max()) or 1.0
    axes[0].imshow(picture, extent=_extent(picture))
    axes[0].set_title("image", fontsize=9)
    for group, (each, panel) in enumerate(zip(sums, axes[1:], strict=True)):
        drawn = panel.imshow(each, cmap=_SIGNED, vmin=-limit, vmax=limit, extent=_extent(picture))
        panel.set_title(f"group {group}", fontsize=9)
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="sum over K x K")
    _save(figure, folder / "sums")


def draw_colours(captured: Captured, picture: Image, folder: Path) -> None:
    """Kernels as colours: like kernels have like colours; see `colours`. Writes colours.png and colours.svg."""
    found, shares = colours(captured.kernel[0])
    figure, axes = _grid(2, picture, f"{captured.name}: the kernel at every position, as a colour")
    axes[0].imshow(picture, extent=_extent(picture))
    axes[0].set_title("image", fontsize=9)
    axes[1].imshow(found.numpy(), extent=_extent(picture))
    told = ", ".join(f"{share:.0%}" for share in shares)
    axes[1].set_title(f"first principal components ({told} of the variance)", fontsize=9)
    _save(figure, folder / "colours")


def draw_kernels(captured: Captured, picture: Image, points: Sequence[Point], folder: Path) -> None:
    """The K x K kernels of all groups at points of the image, and where each reads. Writes kernels.png and kernels.svg.

    Args:
        captured: what a layer did with the image.
        picture: the image.
        points: (x, y), each from 0 at the left or top to 1.
        folder: where the pictures go.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    kernel = captured.kernel[0]
    places = [position(point, kernel) for point in points]
    limit = max(float(kernel[..., row, column].abs().max()) for row, column in places) or 1.0
    count = len(kernel)
    columns = min(count, 16)
    lines = -(-count // columns)
    figure = Figure(figsize=(3.4 + 0.62 * columns, 0.7 + max(2.6, 0.8 * lines * len(points))), layout="constrained")
    figure.suptitle(f"{captured.name}: the kernels of all groups at {len(points)} positions", fontsize=11)
    parts: Any = figure.subfigures(1, 2, width_ratios=(3.4, 0.62 * columns))
    left, right = parts
    axes = left.subplots()
    axes.imshow(picture)
    _bare(axes)
    panels = right.subplots(lines * len(points), columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for number, (row, column) in enumerate(places):
        colour = _MARKS[number % len(_MARKS)]
        x, y, width, height = footprint(captured, row, column, picture.size)
        axes.plot(x + width / 2 - 0.5, y + height / 2 - 0.5, "o", color=colour, ms=6, mec="white")
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, ec=colour, lw=2))
        for group, each in enumerate(kernel[..., row, column]):
            panel = panels[number * lines + group // columns, group % columns]
            panel.imshow(each.numpy(), cmap=_SIGNED, vmin=-limit, vmax=limit)
            panel.set_axis_on()
            _bare(panel)
            for spine in panel.spines.values():
                spine.set(edgecolor=colour, linewidth=1.5)
            if number == 0:
                panel.set_title(str(group), fontsize=8)
    _save(figure, folder / "kernels")


def table(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """The statistics of every group, a line each under a head."""
    head = ("group", "mean sum", "deviation of sums", "variation over positions", "reach, pixels")
    lines = [(g.mean_sum, g.sum_deviation, g.variation, g.reach) for g in groups]
    return [head, *((str(i), *(f"{value:.3f}" for value in line)) for i, line in enumerate(lines))]


def position(point: Point, kernel: Tensor) -> tuple[int, int]:
    """The row and column of a layer's output that a point of the image belongs to."""
    height, width = kernel.shape[-2:]
    return min(int(point[1] * height), height - 1), min(int(point[0] * width), width - 1)


def footprint(captured: Captured, row: int, column: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, width and height, in pixels of an image of `size`, of what a kernel is multiplied with."""
    window, found = captured.layer.window, []
    sides = zip((column, row), size, reversed(captured.input.shape[2:]), (1, 0), strict=True)
    for at, pixels, positions, axis in sides:
        scale = pixels / positions
        first = at * window.stride[axis] - window.padding[axis]
        reach = (window.kernel_size[axis] - 1) * window.dilation[axis] + 1
        found.append((first * scale, reach * scale))
    (left, width), (top, height) = found
    return left, top, width, height


def _grid(count: int, picture: Image, title: str) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = count if count <= _ROW else math.ceil(math.sqrt(count))
    lines = -(-count // columns)
    wide = 2.1 if count > _ROW else 3.4
    high = wide * picture.height / picture.width
    figure = Figure(figsize=(wide * columns + 0.8, (high + 0.3) * lines + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels:
        _bare(panel)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def _extent(picture: Image) -> tuple[float, float, float, float]:
    return (0, picture.width, picture.height, 0)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=130)
