"""The command that shows the kernels a network generates for an image."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from involution.analysis.table import markdown
from involution.names import unknown
from involution.show import animation, measures, pictures
from involution.show.capture import Captured, capture_kernels
from involution.show.mirror import mirror_kernels
from involution.show.page import write_page
from involution.show.subject import Subject, subject

_POINTS = [[0.25, 0.25], [0.5, 0.5], [0.75, 0.6]]


def show(
    image: str,
    model: str | None = None,
    checkpoint: Path | None = None,
    layer: str | None = None,
    mirror: Path | None = None,
    points: list[list[float]] = _POINTS,
    animate: Literal["gif", "webp"] | None = None,
    group: int = 0,
    size: int = 224,
    out: Path = Path("runs/show"),
) -> None:
    """Show the kernels that the involution layers of a RedNet generate for an image: pictures, and a page to explore.

    Args:
        image: a file; or the word sample, for a scene of handwritten digits.
        model: name of a RedNet, such as rednet50. Default: told by the checkpoint.
        checkpoint: of a RedNet, or of a detector or segmentor on one: safetensors, one that a fit wrote, or an official
            file. Default: a small RedNet that comes with the library; with `model`, random weights.
        layer: name of a layer or block, such as layer3.5; or all. Default: the last of the third stage, which the paper
            shows.
        mirror: checkpoint of the ResNet that `involution compare` trained beside the RedNet, whose kernels are shown
            for comparison. Default: that of the packaged network; for others, random weights.
        points: positions whose kernels are drawn, each from 0, the left or top, to 1.
        animate: also draw the kernel as it moves over the image, beside a convolution's.
        group: the one whose kernel is animated.
        size: a larger image is scaled down, so that its longer side has so many pixels.
        out: folder for the pictures.

    Raises:
        ValueError: if the image cannot be read, the checkpoint is of another model, or there is no such layer.
    """
    if not points:
        raise ValueError("`points` must hold at least one pair of numbers; got none.")
    for point in points:
        if len(point) != 2 or not all(0 <= value <= 1 for value in point):
            raise ValueError(f"`points` must be pairs of numbers from 0 to 1; got {point}.")
    shown = subject(image, model, checkpoint, size)
    captured = capture(shown)
    fixed, told = mirror_kernels(shown, mirror)
    reports = []
    for each in tqdm(chosen(captured, layer), "drawing", file=sys.stderr, leave=False, disable=None):
        folder = out / each.name
        pictures.draw_sums(each, shown.picture, folder)
        pictures.draw_colours(each, shown.picture, folder)
        pictures.draw_kernels(each, shown.picture, [(x, y) for x, y in points], folder)
        lines = pictures.table(measures.groups(each.kernel[0], each.layer.window.dilation))
        with (folder / "statistics.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
        if animate:
            animation.animate(each, shown.picture, fixed[each.name], group, folder / f"group{group}.{animate}")
        reports.append(f"{each.name}: {_size(each)}\n\n{markdown(lines)}\n")
    write_page(shown, captured, fixed, told, out / "explorer.html")
    print(*reports, sep="\n")
    for what, where in (("weights", shown.weights), ("pictures", out), ("explorer", out / "explorer.html")):
        print(f"{what:<9} {where}")


def capture(shown: Subject) -> dict[str, Captured]:
    """What every involution layer does with the image."""
    with torch.inference_mode(), capture_kernels(shown.network) as captured:
        shown.network(shown.x)
    return captured


def chosen(captured: dict[str, Captured], layer: str | None) -> Sequence[Captured]:
    """The layers named, by their own name or that of the block they are in."""
    if layer == "all":
        return list(captured.values())
    if layer is None:
        return [[each for name, each in captured.items() if name.startswith("layer3.")][-1]]
    found = [each for name, each in captured.items() if name == layer or name.startswith(f"{layer}.")]
    if not found:
        raise ValueError(unknown("layer", layer, captured, most=len(captured)))
    return found


def _size(captured: Captured) -> str:
    groups, *kernel_size, height, width = captured.kernel.shape[1:]
    sides = " x ".join(map(str, kernel_size))
    return f"{groups} groups of {sides} at {height} x {width} positions, {captured.layer.channels} channels"
