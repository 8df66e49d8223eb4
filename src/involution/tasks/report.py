"""What a comparison ends with: one table of cost and accuracy, and one picture of how the networks learned."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from involution import cost
from involution.analysis.record import here

_SECONDS = 30.0  # of timing images alone, and of timing batches, at most


@dataclass(frozen=True)
class Row:
    """A network: `parameters`, multiply-adds of one image, and what a test measured.

    `latency` are milliseconds for one image alone, `in_batch` for each of a batch of `batch` images.
    """

    name: str
    parameters: int
    macs: int
    latency: float
    in_batch: float
    batch: int
    measures: Mapping[str, float]


def measure(
    networks: Mapping[str, nn.Module], measures: Sequence[Mapping[str, float]], images: Tensor | list[Tensor]
) -> list[Row]:
    """A row for each network.

    Args:
        networks: the networks by name.
        measures: what a test measured of each, by name, from 0 to 1.
        images: a batch, as the networks take it, on their device.
    """
    image, batch = images[:1], len(images)
    alone = in_batch = _times(networks, image)
    if batch > 1:
        in_batch = {name: time / batch for name, time in _times(networks, images, rounds=20, warm_up=2).items()}
    return [
        Row(name, cost.parameters(network), cost.macs(network, image), alone[name], in_batch[name], batch, measured)
        for (name, network), measured in zip(networks.items(), measures, strict=True)
    ]


def table(rows: Sequence[Row], minutes: Sequence[float]) -> str:
    """The rows, and how long each fit took, as text that Markdown also understands."""
    names, batch = list(rows[0].measures), rows[0].batch
    head = ("model", "parameters", "MACs / image", "latency", f"in batches of {batch}", "fit")
    lines = [(*head, *(f"test {name}" for name in names))]
    lines += [
        (
            *(r.name, f"{r.parameters / 1e6:.2f} M", f"{r.macs / 1e6:.2f} M", f"{r.latency:.2f} ms"),
            *(f"{r.in_batch:.2f} ms", f"{60 * taken:.0f} s", *(f"{r.measures[name]:.1%}" for name in names)),
        )
        for r, taken in zip(rows, minutes, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    text = [" | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([f"| {text[0]} |", f"|{rule}|", *(f"| {line} |" for line in text[1:])])


def draw_curves(metrics: Mapping[str, Path], measure: str, picture: Path) -> None:
    """Draw the loss and `measure` over the epochs.

    Args:
        metrics: for each network, by name, the CSV file its run was logged to.
        measure: what the runs logged beside the loss, such as accuracy.
        picture: the PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", measure), strict=True):
        for colour, (name, path) in enumerate(metrics.items()):
            for stage, style in (("train", "--"), ("validation", "-")):
                epochs, values = _column(path, f"{stage}/{quantity}")
                if epochs:  # a detector has no loss but in training, and is not measured there
                    axes.plot(epochs, values, style, marker=".", color=f"C{colour}", label=f"{name}, {stage}")
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=120)


def write(rows: Sequence[Row], recipe: str, minutes: Sequence[float], device: str, path: Path) -> None:
    """Write the rows as CSV, with how long each fit took and where all was measured."""
    with path.open("w", newline="") as file:
        lines = [
            {"recipe": recipe, "model": r.name, "parameters": r.parameters, "macs": r.macs, "ms": round(r.latency, 2)}
            | {"ms_in_batch": round(r.in_batch, 3), "batch": r.batch}
            | {name: round(value, 4) for name, value in r.measures.items()}
            | {"minutes": round(taken, 1)}
            | here(device)
            for r, taken in zip(rows, minutes, strict=True)
        ]
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _times(networks: Mapping[str, nn.Module], images: Tensor | list[Tensor], **rounds: int) -> dict[str, float]:
    """Milliseconds that each network takes for `images`, at once."""
    for network in networks.values():
        network.eval()
    with torch.inference_mode():
        runs = {name: partial(network, images) for name, network in networks.items()}
        times = cost.interleaved(runs, device=images[0].device, seconds=_SECONDS, **rounds)
    return {name: median(found) for name, found in times.items()}


def _column(path: Path, name: str) -> tuple[list[int], list[float]]:
    with path.open(newline="") as file:
        points = [(int(row["epoch"]) + 1, float(row[name])) for row in csv.DictReader(file) if row.get(name)]
    return [epoch for epoch, _ in points], [value for _, value in points]
