"""Benchmarks of the operator and of whole networks: right first, then timed in turns, then written down."""

from __future__ import annotations

import csv
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from involution.analysis import contenders, cost
from involution.ops.library import implementations

Direction = Literal["forward", "forward+backward", "inference", "inference compiled", "training step"]


@dataclass(frozen=True)
class Row:
    """One contender in one situation. Times in milliseconds; GFLOP counts two for a multiply-add."""

    benchmark: str
    contender: str
    direction: str
    shape: str
    window: str
    dtype: str
    layout: str
    rounds: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    gflops: float
    gbytes_per_second: float
    threads: int
    device: str
    implementation: str
    torch: str
    commit: str
    date: str


def op(
    shapes: Sequence[tuple[int, int, int]] = ((8, 64, 56), (8, 128, 28), (8, 256, 14), (8, 512, 7)),
    kernel_size: int = 7,
    group_channels: int = 16,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    layout: Literal["channels_last", "contiguous"] = "channels_last",
    compiled: bool = True,
    rounds: int = 30,
    out: Path = Path("runs/bench"),
) -> list[Row]:
    """Time the operator against other ways to compute it and against convolutions of the same size.

    Args:
        shapes: batch, channels and side of each input; the default is where RedNet-50 uses its involutions.
        kernel_size: K, odd.
        group_channels: channels that share a kernel.
        dtype: of all tensors.
        layout: memory format of all tensors.
        compiled: also time the compiled loop over taps, which takes a minute to compile.
        rounds: how often each contender is timed, in turns with the others.
        out: folder for op.csv, to which the rows are added.

    Raises:
        RuntimeError: if the operator is wrong on this machine; nothing is timed then.
    """
    kind = getattr(torch, dtype)
    rows: list[Row] = []
    for batch, channels, side in shapes:
        x, kernel, grad = _tensors(batch, channels, side, kernel_size, group_channels, kind, layout)
        found = contenders.operators(kernel_size, channels, kind, compiled)
        _check(found["involution"], x, kernel, kernel_size)
        shape = f"{batch}x{channels}x{side}x{side}"
        traffic = (2 * x.numel() + kernel.numel()) * x.element_size()
        for direction, passes in (("forward", 1), ("forward+backward", 3)):
            print(f"timing {shape}, {direction} ...", file=sys.stderr, flush=True)
            runs = {name: _pass(run, x, kernel, grad, direction) for name, run in found.items()}
            if direction == "forward":
                runs["copy of 64 MiB"] = partial(torch.empty(1 << 24).copy_, torch.empty(1 << 24))
            for name, times in cost.interleaved(runs, rounds, warm_up=3, seconds=60).items():
                megaflops, megabytes = 2e-6 * passes * x.numel() * kernel_size**2, 1e-6 * passes * traffic
                if name.startswith("dense"):
                    megaflops, megabytes = 2e-6 * passes * x.numel() * channels * 9, 0.0
                if name.startswith("copy"):
                    megaflops, megabytes = 0.0, 1e-6 * 2 * 2**26
                window = f"K{kernel_size} D{group_channels}"
                figures = _figures(times, megaflops, megabytes)
                rows.append(Row("op", name, direction, shape, window, dtype, layout, *figures, **_here()))
    _finish(rows, out / "op.csv")
    return rows


def _tensors(
    batch: int, channels: int, side: int, size: int, group_channels: int, dtype: torch.dtype, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """x, kernel and the gradient of the output; all that wants a gradient is a leaf."""
    groups = channels // group_channels
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    shapes = [(batch, channels, side, side), (batch, groups * size**2, side, side), (batch, channels, side, side)]
    x, kernel, grad = (torch.randn(shape, dtype=dtype).contiguous(memory_format=memory) for shape in shapes)
    return x.requires_grad_(), kernel.unflatten(1, (groups, size, size)).requires_grad_(), grad


def _pass(run: contenders.Operator, x: Tensor, kernel: Tensor, grad: Tensor, direction: str) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return run(x, kernel)

    def both() -> object:
        x.grad = kernel.grad = None
        return run(x, kernel).backward(grad)

    return forward if direction == "forward" else both


def _check(run: contenders.Operator, x: Tensor, kernel: Tensor, size: int) -> None:
    """Fail unless a corner of the result agrees with the unfold formula in float64."""
    x, kernel = x.detach()[:1], kernel.detach()[:1]
    expected = contenders.unfold(x.double(), kernel.double(), padding=size // 2)
    error = (run(x, kernel).double() - expected).abs().max() / expected.abs().max()
    allowed = 4 * torch.finfo(x.dtype).eps
    if not error <= allowed:
        raise RuntimeError(f"the operator is wrong here: relative error {error:.2g}, allowed {allowed:.2g}. Not timed.")


def model(
    arch: str = "rednet50",
    batches: Sequence[int] = (1, 8),
    size: int = 224,
    directions: Sequence[Direction] = ("inference", "inference compiled", "training step"),
    unfold: bool = True,
    rounds: int = 20,
    out: Path = Path("runs/bench"),
) -> list[Row]:
    """Time a RedNet against the ResNet it mirrors, and against itself on the unfold formula.

    Args:
        arch: rednet26, 38, 50, 101 or 152.
        batches: batch sizes; a training step is timed for the largest only.
        size: pixels a side.
        directions: eager inference, inference compiled with frozen weights, an eager training step.
        unfold: also time RedNet on the unfold formula, eager.
        rounds: how often each network is timed, in turns with the others.
        out: folder for model.csv, to which the rows are added.

    Raises:
        RuntimeError: if RedNet and its form on the unfold formula disagree; nothing is timed then.
    """
    import timm

    from involution.models import mirrored_resnet

    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {
        arch: timm.create_model(arch),
        f"resnet{arch.removeprefix('rednet')}": mirrored_resnet(int(arch.removeprefix("rednet"))),
    }
    formula = f"{arch} (unfold formula)"
    if unfold:
        networks[formula] = contenders.with_unfold(timm.create_model(arch))
    for network in networks.values():
        network.to(memory_format=torch.channels_last)
    rows: list[Row] = []
    for batch in batches:
        images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
        work = {name: 2 * cost.macs(network.eval(), images) / 1e6 for name, network in networks.items()}
        if unfold:
            work[formula] = work[arch]
            _check_networks(networks[arch], networks[formula], images)
        for direction in directions:
            if direction == "training step" and batch != max(batches):
                continue
            print(f"timing {arch}, batch {batch}, {direction} ...", file=sys.stderr, flush=True)
            shape = f"{batch}x3x{size}x{size}"
            chosen = {n: net for n, net in networks.items() if direction != "inference compiled" or n != formula}
            runs = {name: _network_pass(network, images, direction) for name, network in chosen.items()}
            for name, times in cost.interleaved(runs, rounds, warm_up=3, seconds=90).items():
                passes = 3 if direction == "training step" else 1
                figures = _figures(times, passes * work[name], 0.0)
                rows.append(Row("model", name, direction, shape, "", "float32", "channels_last", *figures, **_here()))
    _finish(rows, out / "model.csv")
    return rows


def _network_pass(network: nn.Module, images: Tensor, direction: str) -> Callable[[], object]:
    if direction == "training step":
        optimizer = torch.optim.SGD(network.train().parameters(), lr=1e-4, momentum=0.9)

        def step() -> None:
            network.train()
            network(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step
    network.eval()
    run: Callable[[Tensor], object] = network
    if direction == "inference compiled":
        run = torch.compile(network, options={"freezing": True})

    def infer() -> object:
        with torch.no_grad():
            return run(images)

    return infer


def _check_networks(network: nn.Module, formula: nn.Module, images: Tensor) -> None:
    """Fail unless both give the same features after a look at the images, which settles their norms."""
    formula.load_state_dict(network.state_dict())
    with torch.no_grad():
        expected, got = (net.train()(images[:1].expand(2, -1, -1, -1)) for net in (formula, network))
    formula.load_state_dict(network.state_dict())
    if not torch.allclose(expected, got, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise RuntimeError("the network and its form on the unfold formula disagree. Not timed.")


def _here() -> dict[str, Any]:
    """What a time depends on besides the code that is timed."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "threads": torch.get_num_threads(),
        "device": _processor(),
        "implementation": implementations()["cpu"],
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "no repository",
        "date": str(date.today()),
    }


def _figures(
    times: Sequence[float], megaflops: float, megabytes: float
) -> tuple[int, float, float, float, float, float]:
    """Rounds, percentiles in ms, GFLOP/s and GB/s at the median, each to five digits."""
    p20, p50, p80 = cost.percentiles(times)
    p20, p50, p80, gflops, gbytes = (float(f"{n:.5g}") for n in (p20, p50, p80, megaflops / p50, megabytes / p50))
    return len(times), p20, p50, p80, gflops, gbytes


def _processor() -> str:
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _finish(rows: Sequence[Row], path: Path) -> None:
    """Add the rows to the CSV file, print them as a table with ratios, and say where they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(table(rows))
    print(f"\nrows added to {path}")


def table(rows: Sequence[Row]) -> str:
    """Median milliseconds of every contender in Markdown, and how many times as long as the first it took."""
    lines = []
    for direction in dict.fromkeys(row.direction for row in rows):
        here = [row for row in rows if row.direction == direction]
        shapes, names = list(dict.fromkeys(r.shape for r in here)), list(dict.fromkeys(r.contender for r in here))
        times = {(row.contender, row.shape): row.p50_ms for row in here}
        lines += ["", f"| {direction}, ms (times as long) | {' | '.join(shapes)} | geometric mean |"]
        lines += ["|---|" + "---:|" * (len(shapes) + 1)]
        for name in names:
            ratios = [times[name, shape] / times[names[0], shape] for shape in shapes]
            cells = [f"{times[name, s]:.2f} ({ratio:.2f})" for s, ratio in zip(shapes, ratios, strict=True)]
            lines.append(f"| {name} | {' | '.join(cells)} | {geometric_mean(ratios):.2f} |")
    return "\n".join(lines).lstrip()
