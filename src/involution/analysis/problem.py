"""The involution that a benchmark times: its size, its tensors, its passes, and whether the operator gets it right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from involution.analysis import contenders

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}  # by layout
PASSES = {"forward": 1, "backward": 2, "forward+backward": 3}  # by direction; each has the forward pass's multiply-adds
SHAPES = ((8, 64, 56), (8, 128, 28), (8, 256, 14), (8, 512, 7))  # where RedNet-50 uses its involutions, in batches of 8


@dataclass(frozen=True)
class Problem:
    """An involution of stride 1 that keeps the size.

    Args:
        batch: B.
        channels: C.
        side: H and W.
        kernel_size: K, odd.
        group_channels: D, channels that share a kernel; it divides C.
        dtype: of all tensors, as torch names it.
        layout: memory format of all tensors, channels_last or contiguous.

    Raises:
        ValueError: if the sizes do not fit one another.
    """

    batch: int
    channels: int
    side: int
    kernel_size: int = 7
    group_channels: int = 16
    dtype: str = "float32"
    layout: str = "channels_last"

    def __post_init__(self) -> None:
        if min(self.batch, self.channels, self.side) < 1:
            raise ValueError(f"`shapes` must hold sizes of at least 1; got {self.shape}.")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd and at least 1; got {self.kernel_size}.")
        if self.group_channels < 1 or self.channels % self.group_channels:
            raise ValueError(
                f"`group_channels` must divide the channels in `shapes`; got {self.group_channels} and {self.channels}."
            )

    @property
    def shape(self) -> str:
        """Of x, as benchmarks name it."""
        return f"{self.batch}x{self.channels}x{self.side}x{self.side}"

    def described(self) -> dict[str, Any]:
        """The fields of a row that tell the problem."""
        window = f"K{self.kernel_size} D{self.group_channels}"
        return {"shape": self.shape, "window": window, "dtype": self.dtype, "layout": self.layout}

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """x (B, C, H, W) and kernel (B, G, K, K, H, W), both leaves, and the gradient of the output (B, C, H, W)."""
        groups, size = self.channels // self.group_channels, self.kernel_size
        x, kernel, grad = (
            torch.randn(self.batch, channels, self.side, self.side, device=device)
            .to(getattr(torch, self.dtype))
            .contiguous(memory_format=FORMATS[self.layout])
            for channels in (self.channels, groups * size**2, self.channels)
        )
        return x.requires_grad_(), kernel.unflatten(1, (groups, size, size)).requires_grad_(), grad


def problems(shapes: Sequence[tuple[int, int, int]], **settings: Any) -> list[Problem]:
    """A problem for each batch, channels and side in `shapes`.

    Raises:
        ValueError: if there is no shape, or one does not fit the settings.
    """
    if not shapes:
        raise ValueError("`shapes` must hold at least one batch, channels and side; got none.")
    return [Problem(*shape, **settings) for shape in shapes]


def timed(run: contenders.Operator, x: Tensor, weight: Tensor, grad: Tensor, direction: str) -> Callable[[], object]:
    """The call that a benchmark times.

    Args:
        run: the operator.
        x: its input, a leaf.
        weight: its second argument, a leaf.
        grad: the gradient of its output.
        direction: forward, without a graph; backward, both gradients from a graph built here; or forward+backward.
    """
    if direction == "backward":
        return partial(torch.autograd.grad, run(x, weight), (x, weight), grad, retain_graph=True)

    def forward() -> object:
        with torch.no_grad():
            return run(x, weight)

    def both() -> object:
        return torch.autograd.grad(run(x, weight), (x, weight), grad)

    return forward if direction == "forward" else both


def check(run: contenders.Operator, x: Tensor, kernel: Tensor, grad: Tensor) -> None:
    """Hold the first image's output and gradients against the unfold formula in float64.

    An element that sums n products may miss its value v by one rounding to the dtype, eps / 2 * |v|, and a random walk
    of n roundings of the float32 accumulator, eps (sqrt(n) + 2) * (the sum of the absolute products).

    Raises:
        RuntimeError: if one of them is wrong.
    """
    x, kernel, grad = x.detach()[:1], kernel.detach()[:1], grad[:1]
    exact = partial(contenders.unfold, padding=kernel.shape[2] // 2)
    found = _results(run, x, kernel, grad)
    expected = _results(exact, x.double(), kernel.double(), grad.double())
    absolute = _results(exact, x.double().abs(), kernel.double().abs(), grad.double().abs())
    taps, group_channels = kernel.shape[2] ** 2, x.shape[1] // kernel.shape[1]
    summed = {"output": taps, "gradient of x": taps, "gradient of the kernel": group_channels}
    rounding, step = torch.finfo(x.dtype).eps / 2, torch.finfo(torch.float32).eps
    for (name, terms), got, right, size in zip(summed.items(), found, expected, absolute, strict=True):
        allowed = rounding * right.abs() + step * (sqrt(terms) + 2) * size
        excess = ((got.double() - right).abs() / allowed.clamp(min=torch.finfo(torch.float32).tiny)).max()
        if not excess <= 1:
            raise RuntimeError(
                f"the operator's {name} is wrong here: an error is {excess:.3g} times what rounding allows. Not timed."
            )


def _results(run: contenders.Operator, x: Tensor, kernel: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, kernel = x.requires_grad_(), kernel.requires_grad_()
    y = run(x, kernel)
    return y.detach(), *torch.autograd.grad(y, (x, kernel), grad)
