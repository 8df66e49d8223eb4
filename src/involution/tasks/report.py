"""What a comparison ends with: one table of cost and accuracy, and one picture of how the networks learned."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_WARM_UP, _ROUNDS = 10, 100


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
        latencies = _latencies(list(networks.values()), image)
        macs = [_macs(network, image) for network in networks.values()]
    parameters = [sum(p.numel() for p in network.parameters()) for network in networks.values()]
    return [Row(*values) for values in zip(networks, parameters, macs, latencies, accuracies, strict=True)]


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


def _macs(network: nn.Module, image: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(image)
    return counter.get_total_flops() // 2


def _latencies(networks: Sequence[nn.Module], image: Tensor) -> list[float]:
    """Median milliseconds of each; the networks take turns, so that whatever else the machine does hits all alike."""
    times: list[list[float]] = [[] for _ in networks]
    for _ in range(_WARM_UP + _ROUNDS):
        for network, taken in zip(networks, times, strict=True):
            _wait(image)
            start = perf_counter()
            network(image)
            _wait(image)
            taken.append(1e3 * (perf_counter() - start))
    return [median(taken[_WARM_UP:]) for taken in times]


def _wait(image: Tensor) -> None:
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
