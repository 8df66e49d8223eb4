"""The benchmark of whole networks: each RedNet against the ResNet it mirrors and against the unfold formula."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from involution import cost
from involution.analysis import contenders, record, table
from involution.analysis.memory import Step, peak_mib
from involution.analysis.plot import draw
from involution.analysis.problem import FORMATS
from involution.analysis.record import Row
from involution.models import mirrored_resnet
from involution.names import unknown

Direction = Literal["inference", "inference compiled", "training step"]
Layout = Literal["channels_last", "contiguous"]

_FORMULA, _PRODUCTS, _STORED, _FOLDED, _WITHOUT = (
    " (unfold formula)",
    " (matrix products)",
    " (kernels stored)",
    " (norms folded)",
    " (no involutions)",
)
_LEFT_OUT: dict[str, tuple[str, ...]] = {
    "inference": (),
    "inference compiled": (_FORMULA,),
    "training step": (_FOLDED,),
}


def model(
    archs: Sequence[str] = ("rednet50",),
    batches: Sequence[int] = (1, 8),
    size: int = 224,
    directions: Sequence[Direction] = ("inference", "inference compiled", "training step"),
    layout: Layout = "channels_last",
    unfold: bool = True,
    memory: bool = True,
    rounds: int = 20,
    plot: Path | None = None,
    out: Path = Path("runs/bench"),
) -> list[Row]:
    """Time RedNets against the ResNets they mirror, and against themselves on the unfold formula.

    The ResNets are timm's, and once more with 1x1 convolutions done as matrix products, as RedNet does them. RedNet is
    timed once more with layers that store their kernels, and with nothing in place of its involutions: what it takes
    then bounds what a faster operator could gain. Both are timed once more with their norms folded into the
    convolutions before them.

    Args:
        archs: any of rednet26, rednet38, rednet50, rednet101 and rednet152.
        batches: batch sizes; a training step is timed for the largest only.
        size: pixels a side.
        directions: eager inference, inference compiled with frozen weights, an eager training step.
        layout: memory format of images and networks; contiguous is what torch makes unasked.
        unfold: also time each RedNet on the unfold formula, eager.
        memory: also measure the peak memory of a training step, each in a process of its own.
        rounds: how often each network is timed, in turns with those it is compared with.
        plot: PNG file for a chart of the times.
        out: folder for model.csv, to which the rows are added.

    Raises:
        ValueError: if an architecture is unknown, or there is nothing to time.
        RuntimeError: if a RedNet and its form on the unfold formula disagree; it is not timed then.
    """
    _check(archs, batches, size, directions)
    record.check(out / "model.csv")
    here = record.here() | {"layout": layout}
    rows: list[Row] = []
    for arch in archs:
        torch.manual_seed(0)
        mirror = f"resnet{arch.removeprefix('rednet')}"
        bases = {arch: mirror, mirror: mirror, mirror + _PRODUCTS: mirror}
        bases |= {arch + _STORED: arch, arch + _WITHOUT: arch}
        bases |= {name + _FOLDED: mirror for name in (arch, mirror)}
        if unfold:
            bases[arch + _FORMULA] = arch
        networks = {name: _network(name, layout) for name in bases}
        for batch in batches:
            chosen = [d for d in directions if d != "training step" or batch == max(batches)]
            found = _rows(networks, bases, _images(batch, size, layout), chosen, memory, rounds, here)
            record.add(found, out / "model.csv")  # at once: what follows takes minutes, and may be interrupted
            rows += found
    print(f"\nrows added to {out / 'model.csv'}")
    for quantity in (table.TIME, table.MEMORY) if memory else (table.TIME,):
        print(f"\n{table.with_ratios(rows, quantity)}")
    if plot:
        draw(rows, archs, plot)
    return rows


def _check(archs: Sequence[str], batches: Sequence[int], size: int, directions: Sequence[str]) -> None:
    for name, values in (("archs", archs), ("batches", batches), ("directions", directions)):
        if not values:
            raise ValueError(f"`{name}` must hold at least one; got none.")
    if min(*batches, size) < 1:
        raise ValueError(f"`batches` and `size` must be at least 1; got {list(batches)} and {size}.")
    known = timm.list_models("rednet*", module="rednet")
    for arch in archs:
        if arch not in known:
            raise ValueError(f"`archs`: {unknown('RedNet', arch, known)}")


def _network(name: str, layout: Layout) -> nn.Module:
    """A network by the name that rows give it."""
    arch = name.partition(" ")[0]
    if arch.startswith("rednet"):
        network = timm.create_model(arch, fused=not name.endswith(_STORED))
    else:
        network = mirrored_resnet(int(arch.removeprefix("resnet")))
    if name.endswith(_FORMULA):
        network = contenders.with_unfold(network)
    if name.endswith(_WITHOUT):
        network = contenders.without_involutions(network)
    if name.endswith(_PRODUCTS):
        network = contenders.with_matrix_products(network)
    if name.endswith(_FOLDED):
        network = contenders.with_folded_norms(network)
    return network.to(memory_format=FORMATS[layout])


def _images(batch: int, size: int, layout: Layout) -> Tensor:
    """(batch, 3, size, size)."""
    return torch.randn(batch, 3, size, size).to(memory_format=FORMATS[layout])


def _rows(
    networks: dict[str, nn.Module],
    bases: dict[str, str],
    images: Tensor,
    directions: Sequence[str],
    memory: bool,
    rounds: int,
    here: dict[str, Any],
) -> list[Row]:
    """Rows of all networks; `bases` names the one that each is compared with, and begins with the RedNet."""
    arch, formula = next(iter(bases)), [name for name in bases if name.endswith(_FORMULA)]
    work = {name: 2 * cost.macs(network.eval(), images) / 1e6 for name, network in networks.items()}
    for name in formula:
        work[name] = work[arch]
        _check_formula(networks[arch], networks[name], images)
    shape = "x".join(map(str, images.shape))
    described: dict[str, Any] = {"shape": shape, "window": "", "dtype": "float32"}
    rows = []
    for direction in directions:
        print(f"timing {arch}, {shape}, {direction} ...", file=sys.stderr, flush=True)
        torch._dynamo.reset()  # else it would compile for any size once it has seen two
        names = [name for name in networks if not name.endswith(_LEFT_OUT[direction])]
        runs = {name: _step(networks[name], images, direction) for name in names}
        for name, times in cost.interleaved(runs, rounds, warm_up=3, seconds=90).items():
            training = direction == "training step"
            given = (name, len(images), images.shape[-1], here["layout"])
            peak = peak_mib(_training_steps, *given) if memory and training else None
            figures = record.figures(times, (3 if training else 1) * work[name], peak_mib=peak)
            rows.append(Row("model", name, bases[name], direction, **described, **figures, **here))
    return rows


def _step(network: nn.Module, images: Tensor, direction: str) -> Step:
    if direction == "training step":
        return _training_step(network, images, _optimizer(network))
    network.eval()
    run: Callable[[Tensor], object] = network
    if direction == "inference compiled":
        run = torch.compile(network, options={"freezing": True})

    def infer() -> object:
        with torch.no_grad():
            return run(images)

    return infer


def _training_step(network: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> Step:
    network.train()

    def step() -> None:
        network(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)


def _training_steps(name: str, batch: int, size: int, layout: Layout) -> tuple[Step, Step]:
    """A training step of the network on two small images, which makes the optimiser's state, and the one to measure."""
    network = _network(name, layout)
    optimizer = _optimizer(network)
    small, images = _images(2, 64, layout), _images(batch, size, layout)
    return _training_step(network, small, optimizer), _training_step(network, images, optimizer)


def _check_formula(network: nn.Module, formula: nn.Module, images: Tensor) -> None:
    """Fail unless both give the same features after a look at the images, which settles their norms."""
    formula.load_state_dict(network.state_dict())
    with torch.no_grad():
        expected, got = (net.train()(images[:1].expand(2, -1, -1, -1)) for net in (formula, network))
    formula.load_state_dict(network.state_dict())
    if not torch.allclose(expected, got, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise RuntimeError("the network and its form on the unfold formula disagree. Not timed.")
