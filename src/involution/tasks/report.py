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

from involution.analysis import cost


@dataclass(frozen=True)
class Row:
    """A network: `parameters`, multiply-adds of one image, milliseconds for one image, test accuracy from 0 to 1."""

    name: str
    parameters: int
    macs: int
    latency: float
    accuracy: float


def measure(networks: Mapping[str, nn.Module], accuracies: Sequence[float], image: Tensor) -> list[Row]:
    """A row for each network.

    Args:
        networks: the networks by name.
        accuracies: their test accuracies, from 0 to 1.
        image: a batch of one, (1, C, H, W), on the device of the networks.
    """
    for network in networks.values():
        network.eval()
    with torch.inference_mode():
        runs = {name: partial(network, image) for name, network in networks.items()}
        latencies = [median(times) for times in cost.interleaved(runs, device=image.device).values()]
    return [
        Row(name, cost.parameters(network), cost.macs(network, image), latency, accuracy)
        for (name, network), latency, accuracy in zip(networks.items(), latencies, accuracies, strict=True)
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as text that Markdown also understands."""
    lines = [("model", "parameters", "MACs / image", "latency / image", "test accuracy")]
    lines += [
        (r.name, f"{r.parameters / 1e6:.2f} M", f"{r.macs / 1e6:.2f} M", f"{r.latency:.2f} ms", f"{r.accuracy:.1%}")
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    text = [" | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([f"| {text[0]} |", f"|{rule}|", *(f"| {line} |" for line in text[1:])])


def draw_curves(metrics: Mapping[str, Path], picture: Path) -> None:
    """Draw loss and accuracy over the epochs.

    Args:
        metrics: for each network, by name, the CSV file its run was logged to.
        picture: the PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for colour, (name, path) in enumerate(metrics.items()):
            for stage, style in (("train", "--"), ("validation", "-")):
                epochs, values = _column(path, f"{stage}/{quantity}")
                axes.plot(epochs, values, style, color=f"C{colour}", label=f"{name}, {stage}")
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=120)


def _column(path: Path, name: str) -> tuple[list[int], list[float]]:
    with path.open(newline="") as file:
        points = [(int(row["epoch"]) + 1, float(row[name])) for row in csv.DictReader(file) if row.get(name)]
    return [epoch for epoch, _ in points], [value for _, value in points]
