"""Other ways to compute what involution computes, or what it stands in for: what a benchmark compares it with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from involution.nn import Involution2d
from involution.ops.functional import involution

Operator = Callable[[Tensor, Tensor], Tensor]


def unfold(x: Tensor, kernel: Tensor, stride: int = 1, padding: int = 3) -> Tensor:
    """Involution by the formula most implementations use: unfold x, multiply by the kernel, sum over taps.

    Args:
        x: input, (B, C, H, W).
        kernel: (B, G, K, K, *O).
        stride: step between outputs.
        padding: zeros on all sides.
    """
    batch, groups, size = kernel.shape[:3]
    taps = F.unfold(x, size, padding=padding, stride=stride)
    taps = taps.view(batch, groups, -1, size * size, *kernel.shape[4:])
    return (taps * kernel.flatten(2, 3).unsqueeze(2)).sum(3).flatten(1, 2)


def taps(x: Tensor, kernel: Tensor, padding: int = 3) -> Tensor:
    """Involution of stride 1 as a loop over the taps of the padded input; the arguments are those of `unfold`."""
    groups, size = kernel.shape[1:3]
    height, width = kernel.shape[4:]
    padded = F.pad(x, (padding,) * 4).unflatten(1, (groups, -1))
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for i in range(size):
        for j in range(size):
            total = total + padded[..., i : i + height, j : j + width] * kernel[:, :, i, j].unsqueeze(2)
    return total.flatten(1, 2)


def taps_innermost(x: Tensor, kernel: Tensor, padding: int = 3) -> Tensor:
    """`taps` with the channels of a group as the last axis, which gives a compiler one vector to work on."""
    groups, size = kernel.shape[1:3]
    height, width = kernel.shape[4:]
    padded = F.pad(x, (padding,) * 4).unflatten(1, (groups, -1)).permute(0, 3, 4, 1, 2)
    kernel = kernel.permute(0, 4, 5, 1, 2, 3)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for i in range(size):
        for j in range(size):
            total = total + padded[:, i : i + height, j : j + width] * kernel[..., i, j].unsqueeze(-1)
    return total.flatten(3).permute(0, 3, 1, 2)


def operators(size: int, channels: int, dtype: torch.dtype, compiled: bool = True) -> dict[str, Operator]:
    """Operators on (x, kernel) by name, ours first: equal ones, then convolutions of the same size for scale.

    Args:
        size: K, odd.
        channels: C of x.
        dtype: of the convolutions' weights.
        compiled: also the compiled loops over taps, which take a minute to compile.
    """
    padding = size // 2
    depthwise = torch.randn(channels, 1, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    dense = torch.randn(channels, channels, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    for weight in (depthwise, dense):
        weight.requires_grad_()
    found: dict[str, Operator] = {
        "involution": lambda x, kernel: involution(x, kernel, padding=padding),
        "unfold formula": lambda x, kernel: unfold(x, kernel, padding=padding),
    }
    if compiled:
        for name, loop in (("compiled taps", taps), ("compiled taps, channels innermost", taps_innermost)):
            found[name] = torch.compile(partial(loop, padding=padding), dynamic=False)
    found[f"depthwise {size}x{size}"] = lambda x, _: F.conv2d(x, depthwise, padding=padding, groups=channels)
    found["dense 3x3"] = lambda x, _: F.conv2d(x, dense, padding=1)
    return found


class UnfoldInvolution2d(nn.Module):
    """An `Involution2d` whose operator is the unfold formula; it shares the layer's generator."""

    def __init__(self, layer: Involution2d) -> None:
        super().__init__()
        self.generator, self.window = layer.generator, layer.window

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer."""
        return unfold(x, self.generator(x), self.window.stride[0], self.window.padding[0])


def with_unfold(network: nn.Module) -> nn.Module:
    """`network` with every `Involution2d` on the unfold formula, changed in place."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Involution2d):
                setattr(module, name, UnfoldInvolution2d(child))
    return network
