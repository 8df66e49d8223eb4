"""What a computation costs here: multiply-adds, parameters, and time taken in turns with others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from math import prod
from statistics import quantiles
from time import perf_counter
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

from involution.generators import AttentionGenerator
from involution.nn import _Involution

Name = TypeVar("Name", bound=Hashable)

_SETTLING = 0.01  # seconds
_FEWEST = 5  # rounds
_LARGEST = 31 << 20  # bytes: no larger block ever stays with a process whose allocator is glibc's


def parameters(network: nn.Module) -> int:
    """Number of parameters of `network`."""
    return sum(p.numel() for p in network.parameters())


def macs(network: nn.Module, image: Tensor | list[Tensor]) -> int:
    """Multiply-adds of `network` on `image`, or a list of them: of all convolutions, linear layers and involutions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops() // 2


class Counts(NamedTuple):
    """Multiply-adds, and FLOPs as the involution paper counts them."""

    macs: int
    flops: int


def counts(network: nn.Module, image: Tensor | list[Tensor]) -> Counts:
    """The work of `network` on `image`: multiply-adds, and FLOPs by the rules of the authors' tables, those of mmcv.

    By these a multiply-add, a bias and an activation count one each, and a batch norm two for every element; pooling
    and the sums of shortcuts do not count.

    Args:
        network: of convolutions, linear layers, batch norms, ReLUs and involutions.
        image: a batch of images, or whatever the network takes; on the meta device nothing is computed.
    """
    macs = others = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal macs, others
        if isinstance(module, _ConvTransposeNd):  # every input meets every weight of its channel
            macs += args[0].numel() * module.weight[0].numel()
            others += out.numel() * (module.bias is not None)
        elif isinstance(module, (_ConvNd, nn.Linear)):
            macs += out.numel() * module.weight[0].numel()
            others += out.numel() * (module.bias is not None)
        elif isinstance(module, _BatchNorm):
            others += 2 * out.numel()
        elif isinstance(module, nn.ReLU):
            others += out.numel()
        elif isinstance(module, AttentionGenerator):
            products = 1 if module.position is None else 2
            macs += out.numel() * products * module.query.out_channels // module.shape[0]
        elif isinstance(module, _Involution):
            macs += args[0].shape[1] * out[0, 0].numel() * len(out) * prod(module.window.kernel_size)

    hooks = [module.register_forward_hook(count) for module in network.modules()]  # so watched, layers call all parts
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return Counts(macs, macs + others)


def interleaved(
    runs: Mapping[Name, Callable[[], object]],
    rounds: int = 100,
    warm_up: int = 10,
    seconds: float = float("inf"),
    device: torch.device | None = None,
) -> dict[Name, list[float]]:
    """Milliseconds of every run in every round.

    The runs take turns, so that whatever else the machine does hits all alike: compare them by ratios. In its turn each
    first runs untimed, for 10 ms or once, and pays for what its predecessor did to caches and free memory.

    Args:
        runs: what to time, by name.
        rounds: times each is measured.
        warm_up: rounds before those.
        seconds: begin no further round after this time, the warm-up not counted; but take five.
        device: the accelerator to wait for, if the runs use one.

    Raises:
        ValueError: if there is no round.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1; got {rounds}.")
    times: dict[Name, list[float]] = {name: [] for name in runs}
    # glibc gives each large block back to the system, and asks for it anew with a page fault for every 4 KiB, until it
    # has seen one as large freed. Networks have come that far after a few layers, but not an operator timed alone.
    torch.empty(_LARGEST, dtype=torch.uint8)
    begin = perf_counter()
    for index in range(warm_up + rounds):
        if index == warm_up:
            begin = perf_counter()  # the warm-up may compile for minutes
        if index >= warm_up + _FEWEST and perf_counter() - begin > seconds:
            break
        for name, run in runs.items():
            start = perf_counter()
            while True:
                run()
                _wait(device)
                if perf_counter() - start > _SETTLING:
                    break
            start = perf_counter()
            run()
            _wait(device)
            if index >= warm_up:
                times[name].append(1e3 * (perf_counter() - start))
    return times


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(times) < 2:
        return (times[0],) * 3
    tenths = quantiles(times, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
