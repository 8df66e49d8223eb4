"""Other ways to compute what involution computes, or what it stands in for: what a benchmark compares it with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from involution.models import RedNet
from involution.nn import Involution2d
from involution.ops.functional import involution
from involution.pointwise import PointwiseConv2d

Operator = Callable[[Tensor, Tensor], Tensor]

OURS = "involution"
COPY, COPY_MEGABYTES = "copy of 64 MiB", 2e-6 * 2**26  # what memory can do: read once and written once


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


def ours(size: int) -> Operator:
    """The operator of this library of stride 1, padded to keep the size, for kernels of `size` taps a side, odd."""
    return partial(involution, padding=size // 2)


def copy() -> Callable[[], Tensor]:
    """A call that copies 64 MiB from one place to another. Both are written to before: else they need not be read."""
    return partial(torch.zeros(1 << 24).copy_, torch.ones(1 << 24))


class Contender(NamedTuple):
    """An operator, its second argument, which takes a gradient too, and its multiply-adds for an output element."""

    run: Operator
    weight: Tensor
    macs: int


def operators(x: Tensor, kernel: Tensor, compiled: bool = True) -> dict[str, Contender]:
    """What can be called on x and its weight, by name, ours first: equal ones, then convolutions for scale.

    Args:
        x: input, (B, C, H, W).
        kernel: (B, G, K, K, H, W), K odd.
        compiled: also the compiled loops over taps, which take a minute to compile.
    """
    channels, size = x.shape[1], kernel.shape[2]
    padding = size // 2
    equal: dict[str, Operator] = {
        OURS: ours(size),
        "unfold formula": partial(unfold, padding=padding),
    }
    if compiled:
        torch._dynamo.reset()  # it falls back to eager code without a word after eight shapes
        for name, loop in (("compiled taps", taps), ("compiled taps, channels innermost", taps_innermost)):
            equal[name] = torch.compile(partial(loop, padding=padding), dynamic=False)
    found = {name: Contender(run, kernel, size**2) for name, run in equal.items()}
    depthwise = torch.randn(channels, 1, size, size).to(x, memory_format=torch.channels_last)
    dense = torch.randn(channels, channels, 3, 3).to(x, memory_format=torch.channels_last)
    found[f"depthwise {size}x{size}"] = Contender(
        partial(F.conv2d, padding=padding, groups=channels), depthwise.requires_grad_(), size**2
    )
    found["dense 3x3"] = Contender(partial(F.conv2d, padding=1), dense.requires_grad_(), 9 * channels)
    return found


class UnfoldInvolution2d(nn.Module):
    """An `Involution2d` whose operator is the unfold formula; it shares the layer's generator."""

    def __init__(self, layer: Involution2d) -> None:
        super().__init__()
        self.generator, self.window = layer.generator, layer.window

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer."""
        return unfold(x, self.generator(x), self.window.stride[0], self.window.padding[0])


def with_matrix_products(network: nn.Module) -> nn.Module:
    """`network` with every 1x1 convolution as RedNet has it, a `PointwiseConv2d`, changed in place."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Conv2d and child.kernel_size == (1, 1) and child.groups == 1:
                product = PointwiseConv2d(
                    child.in_channels, child.out_channels, child.stride[0], bias=child.bias is not None
                )
                product.load_state_dict(child.state_dict())
                setattr(module, name, product)
    return network


def with_folded_norms(network: nn.Module) -> nn.Module:
    """A copy of `network` for inference, its batch norms folded into the convolutions right before them."""
    network = network.eval()
    return reparameterize_model(network) if isinstance(network, RedNet) else fuse(network)


def without_involutions(network: nn.Module) -> nn.Module:
    """`network` with a pool of the same stride, or nothing, for every `Involution2d`, changed in place.

    What it takes is what no operator could save, were it infinitely fast.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Involution2d):
                step = child.window.stride[0]
                setattr(module, name, nn.AvgPool2d(step, ceil_mode=True) if step > 1 else nn.Identity())
    return network


def with_unfold(network: nn.Module) -> nn.Module:
    """`network` with every `Involution2d` on the unfold formula, changed in place."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Involution2d):
                setattr(module, name, UnfoldInvolution2d(child))
    return network
