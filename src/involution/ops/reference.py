"""The definition of involution in plain PyTorch: any rank, device and dtype; slow and obviously right.

Each function fills `out`. All three run the same loop over taps: for tap t, output position o reads input
position o * stride - padding + t * dilation, so one strided slice of the padded input holds what tap t needs.
Shapes: x, its gradient (B, C, *S); out, its gradient (B, C, *O); kernel (B, G, *K, *O); D = C / G.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from involution.ops.unwatched import autocast_enabled

Ints = Sequence[int]


def forward(out: Tensor, x: Tensor, kernel: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the sum over taps of what each reads of x, times its entry of the kernel."""
    padded, groups = _pad(_accurate(x), padding), kernel.shape[1]
    total = _grouped(torch.zeros(out.shape, dtype=padded.dtype, device=out.device), groups)
    for tap, place in _taps(kernel.shape, out.shape, stride, dilation):
        total += _grouped(padded[place], groups) * _accurate(kernel[tap]).unsqueeze(2)
    out.copy_(total.flatten(1, 2))


def generated(
    out: Tensor, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, kernel_size: Ints, *window: Ints
) -> None:
    """Fill `out` with the involution of `x` by the kernel that `span` generates; `window` as in `forward`."""
    forward(out, x, span(features, weight, bias, kernel_size), *window)


def span(features: Tensor, weight: Tensor, bias: Tensor, kernel_size: Ints) -> Tensor:
    """The kernel (B, G, *K, *O): weight (G * T, R) @ features (B, R, *O) + bias (G * T,) at every position."""
    with as_given(features):
        taps = F.linear(features.movedim(1, -1), weight, bias)
    return taps.movedim(-1, 1).unflatten(1, (-1, *kernel_size))  # channels innermost, as the loops like it


def generated_grad_x(
    out: Tensor, grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor, kernel_size: Ints, *window: Ints
) -> None:
    """Fill `out` with the gradient of x in `generated`."""
    grad_x(out, grad, span(features, weight, bias, kernel_size), *window)


def grad_span(
    outs: Sequence[Tensor],
    grad: Tensor,
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    kernel_size: Ints,
    *window: Ints,
) -> None:
    """Fill `outs` with the gradients of features, weight and bias in `generated`."""
    kernel = like_span(features, weight, kernel_size)
    grad_kernel(kernel, grad, x, *window)
    for out, value in zip(outs, through_span(kernel, features, weight), strict=True):
        out.copy_(value)


def through_span(kernel: Tensor, features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of features, weight and bias in `span` from that of the kernel."""
    (batch, reduced, *size), taps = features.shape, weight.shape[0]
    places = batch * prod(size)
    # The old vmap that torch.autograd.functional uses has no rule for `flatten`.
    last = kernel.reshape(batch, taps, *size).movedim(1, -1)
    every, made = last.reshape(places, taps), features.movedim(1, -1).reshape(places, reduced)
    with as_given(features):
        return (last @ weight).movedim(-1, 1), every.T @ made, every.sum(0)


def like_span(features: Tensor, weight: Tensor, kernel_size: Ints) -> Tensor:
    """An empty tensor of the shape, dtype and layout of what `span` gives."""
    taps = features.new_empty((features.shape[0], *features.shape[2:], weight.shape[0])).movedim(-1, 1)
    return taps.unflatten(1, (-1, *kernel_size))


def grad_x(out: Tensor, grad: Tensor, kernel: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the gradient of x: each tap adds its share of `grad` to the positions it read."""
    grouped = _grouped(_accurate(grad), kernel.shape[1])
    total = _pad(torch.zeros(out.shape, dtype=grouped.dtype, device=out.device), padding)
    for tap, place in _taps(kernel.shape, grad.shape, stride, dilation):
        total[place] += (grouped * _accurate(kernel[tap]).unsqueeze(2)).flatten(1, 2)
    for axis, (p, size) in enumerate(zip(padding, out.shape[2:], strict=True), start=2):
        total = total.narrow(axis, p, size)
    out.copy_(total)


def grad_kernel(out: Tensor, grad: Tensor, x: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the gradient of the kernel: `grad` times what each tap read, summed over the group."""
    padded, grouped = _pad(_accurate(x), padding), _grouped(_accurate(grad), out.shape[1])
    for tap, place in _taps(out.shape, grad.shape, stride, dilation):
        out[tap] = (grouped * _grouped(padded[place], out.shape[1])).sum(2)


def _taps(
    kernel_shape: Ints, output_shape: Ints, stride: Ints, dilation: Ints
) -> Iterator[tuple[tuple[slice | int, ...], tuple[slice, ...]]]:
    """For each tap: its index into the kernel (B, G, *K, *O), and what it reads of the padded input."""
    everything, size = slice(None), output_shape[2:]
    for tap in product(*map(range, kernel_shape[2 : 2 + len(size)])):
        steps = zip(tap, size, stride, dilation, strict=True)
        reads = (slice(t * d, t * d + (o - 1) * s + 1, s) for t, o, s, d in steps)
        yield (everything, everything, *tap), (everything, everything, *reads)


def _pad(x: Tensor, padding: Ints) -> Tensor:
    return F.pad(x, [side for p in reversed(padding) for side in (p, p)])


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1))  # (B, C, *) -> (B, G, D, *)


def as_given(x: Tensor) -> AbstractContextManager[Any]:
    """Within it, torch.autocast leaves products their dtype: what it had to cast was cast before it came here."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if autocast_enabled(device) else nullcontext()


def _accurate(x: Tensor) -> Tensor:
    """`x` in the dtype to accumulate in: float32 for half types, its own otherwise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
