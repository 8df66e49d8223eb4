"""The Triton implementation: describes tensors to the programs of `programs.py`, chooses among them, launches them.

Imported when the first tensor on a CUDA or ROCm device arrives; Triton comes with torch where torch has such devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from involution.ops import programs, reference

Ints = Sequence[int]

_COLUMNS, _WINDOW = programs.COLUMNS.value, programs.WINDOW.value
_WINDOW_NAMES = [f"{name}_{axis}" for name in "KSL" for axis in "ZYX"]  # kernel size, stride, dilation
_PACKED = torch.version.hip is None and not triton.knobs.runtime.interpret  # whether assembly of NVIDIA's GPUs is known
_FEATURES = 32  # the most that `generated_tile` is worth: with more, its products cost more than a kernel in memory


def forward(out: Tensor, x: Tensor, kernel: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the involution of `x`; the arguments are those of `reference.forward`."""
    _slide(out, x, kernel, stride, padding, dilation, transposed=False)


def grad_x(out: Tensor, grad: Tensor, kernel: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the gradient of x; the arguments are those of `reference.grad_x`."""
    _slide(out, grad, kernel, stride, padding, dilation, transposed=True)


def grad_kernel(out: Tensor, grad: Tensor, x: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the gradient of the kernel; the arguments are those of `reference.grad_kernel`."""
    if not x.shape[1]:
        out.zero_()
        return
    rank, groups = x.dim() - 2, out.shape[1]
    window = map(tuple, (stride, padding, dilation))
    plan = _plan(x.shape, groups, tuple(out.shape[2 : 2 + rank]), tuple(grad.shape[2:]), *window, False, x.dtype)
    described = (x, out, grad, *_strides(x), *_kernel_strides(out, rank), *_strides(grad), *plan.sizes)
    shared = {"INDEX": _index(x, out, grad), "PRECISION": _precision(x.dtype, x.shape[1] // groups)}
    with _on(x):
        if plan.tile:
            programs.products_tile[plan.grid](*described, **plan.tile, **shared, num_warps=1)
        else:
            programs.products[plan.grid](*described, **plan.block, **shared, num_warps=plan.warps)


def generated(
    out: Tensor, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, kernel_size: Ints, *window: Ints
) -> None:
    """Fill `out` as `reference.generated` does: on the chip for half types where that pays, else by way of memory."""
    groups, reduced = weight.shape[0] // prod(kernel_size), features.shape[1]
    settings = map(tuple, window)
    plan = _plan(x.shape, groups, tuple(kernel_size), tuple(out.shape[2:]), *settings, False, x.dtype)
    fits = plan.tile and plan.tile["L_X"] == 1 and plan.tile["K_X"] < _COLUMNS and x.element_size() == 2 and 1 <= reduced <= _FEATURES
    if not fits or torch.version.hip is not None:  # for AMD's GPUs the program spills registers
        forward(out, x, reference.span(features, weight, bias, kernel_size), *window)
        return
    with _on(x):
        programs.generated_tile[plan.grid](
            *(x, features, weight, bias.contiguous(), out),
            *(*_strides(x), *_strides(features), *weight.stride(), *_strides(out), *plan.sizes),
            **{name: value for name, value in plan.tile.items() if name != "L_X"},
            REDUCED=reduced,
            REDUCED_BLOCK=max(16, triton.next_power_of_2(reduced)),
            PACKED=_PACKED,
            INDEX=_index(x, features, out),
            num_warps=1,
        )


def generated_grad_x(
    out: Tensor, grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor, kernel_size: Ints, *window: Ints
) -> None:
    """Fill `out` as `reference.generated_grad_x` does, by way of memory."""
    grad_x(out, grad, reference.span(features, weight, bias, kernel_size), *window)


def grad_span(
    outs: Sequence[Tensor],
    grad: Tensor,
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    kernel_size: Ints,
    *window: Ints,
) -> None:
    """Fill `outs` as `reference.grad_span` does, by way of memory."""
    kernel = reference.like_span(features, weight, kernel_size)
    if kernel.numel():
        grad_kernel(kernel, grad, x, *window)
    for out, value in zip(outs, reference.through_span(kernel, features, weight), strict=True):
        out.copy_(value)


def _slide(
    out: Tensor, x: Tensor, kernel: Tensor, stride: Ints, padding: Ints, dilation: Ints, transposed: bool
) -> None:
    """Fill `out` from `x`; transposed, these are the gradients of x and of the output."""
    rank, groups = x.dim() - 2, kernel.shape[1]
    taps = prod(kernel.shape[2 : 2 + rank])
    if not _taps_in_line(kernel, rank):
        kernel = kernel.contiguous()
    window = map(tuple, (stride, padding, dilation))
    plan = _plan(x.shape, groups, tuple(kernel.shape[2 : 2 + rank]), tuple(out.shape[2:]), *window, transposed, x.dtype)
    described = (x, kernel, out, *_strides(x), *_kernel_strides(kernel, rank), *_strides(out), *plan.sizes)
    shared = {"TRANSPOSED": transposed, "INDEX": _index(x, kernel, out), "PRECISION": _precision(x.dtype, taps)}
    with _on(x):
        if plan.tile:
            ahead = min(2, plan.tile["ROWS"]) * plan.tile["K_Y"] if x.element_size() == 2 else 1
            programs.slide_tile[plan.grid](*described, **plan.tile, **shared, AHEAD=ahead, num_warps=1)
        else:
            programs.slide[plan.grid_of_depths](*described, **plan.block, **shared, num_warps=plan.warps)


class _Plan(NamedTuple):
    """How a problem is cut: the grid, arguments all programs share, and settings of one family or the other."""

    grid: tuple[int]
    grid_of_depths: tuple[int]  # where each block of channels in a group has a program of its own
    sizes: tuple[int, ...]
    tile: dict[str, Any]  # empty where the window does not fit a tile
    block: dict[str, Any]
    warps: int


@lru_cache(maxsize=1024)
def _plan(
    x: Ints,
    groups: int,
    kernel_size: Ints,
    output: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    dtype: torch.dtype,
) -> _Plan:
    """The plan for reading `x` (B, C, *S) and writing (B, C, *output), or a kernel for these outputs."""
    batch, total, *size = x
    channels, lead = total // groups, (1,) * (3 - len(size))
    kernel_size, stride, dilation = (*lead, *kernel_size), (*lead, *stride), (*lead, *dilation)
    padding = (*(0,) * len(lead), *padding)
    depths, rows, columns = (*lead, *output)
    reach = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    window = dict(zip(_WINDOW_NAMES, (*kernel_size, *stride, *dilation), strict=True))
    tile: dict[str, Any] = {}
    block: dict[str, Any] = {}
    registers = max(1, dtype.itemsize // 2)  # that hold two elements
    if lead and max(stride) == 1 and channels <= 16 and max(reach) <= _WINDOW - _COLUMNS and registers <= 2:
        height, strips, each, blocks, warps = _height(rows) if registers == 1 else min(2, _height(rows)), 1, 1, 1, 1
        tile = {name: window[name] for name in ("K_Y", "K_X", "L_Y", "L_X")} | {"CHANNELS": channels, "ROWS": height}
    else:
        depth = min(64, max(16, triton.next_power_of_2(channels)))
        each, blocks = min(64 // depth, triton.next_power_of_2(groups)), triton.cdiv(channels, depth)
        height = min(4, triton.next_power_of_2(rows))
        strips = min(4 // height, triton.next_power_of_2(triton.cdiv(columns, _COLUMNS)))
        warps = min(8, max(1, height * strips * each * depth * registers // 64))
        # The last position that a strip reads, from the first on.
        last = (_COLUMNS - 1 + reach[2]) // stride[2] if transposed else (_COLUMNS - 1) * stride[2] + reach[2]
        block = window | {"CHANNELS": channels, "DEPTH": depth, "GROUPS": each, "ROWS": height, "STRIPS": strips}
        block["CHUNKS"] = last // _WINDOW + 1
    row_blocks, strip_blocks = triton.cdiv(rows, height), triton.cdiv(columns, _COLUMNS * strips)
    sizes = (*lead, *size, *lead, *output, *padding, groups, row_blocks, strip_blocks)
    count = batch * depths * row_blocks * strip_blocks * triton.cdiv(groups, each)
    return _Plan((count,), (count * blocks,), sizes, tile, block, warps)


def _height(rows: int) -> int:
    """Rows of a tile: seven or eight, whichever leaves less over; the sizes of ResNets are multiples of seven."""
    if rows < 7:
        return int(triton.next_power_of_2(rows))
    return 7 if -rows % 7 <= -rows % 8 else 8


def _taps_in_line(kernel: Tensor, rank: int) -> bool:
    """Whether one stride leads from each tap to the next."""
    axes = list(zip(kernel.shape, kernel.stride(), strict=True))[2 : 2 + rank]
    return all(outer == n * inner for (_, outer), (n, inner) in pairwise(axis for axis in axes if axis[0] > 1))


def _kernel_strides(kernel: Tensor, rank: int) -> tuple[int, ...]:
    """Strides of batch, groups, taps and three axes of outputs."""
    strides = kernel.stride()
    taps = [step for n, step in zip(kernel.shape[2 : 2 + rank], strides[2 : 2 + rank], strict=True) if n > 1]
    return (*strides[:2], taps[-1] if taps else 1, *(0,) * (3 - rank), *strides[2 + rank :])


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of batch, channels and three axes."""
    return (*x.stride()[:2], *(0,) * (5 - x.dim()), *x.stride()[2:])


def _index(*tensors: Tensor) -> tl.dtype:
    """The type that counts the elements between any two of an image; the batch is always counted in 64 bits."""
    reach = max(sum((n - 1) * step for n, step in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
    return tl.int64 if reach + 64 * max(max(t.stride()[1:]) for t in tensors) >= 2**31 else tl.int32


def _precision(dtype: torch.dtype, terms: int) -> str:
    """How products of float32 are made, of which `terms` are summed.

    Tensor cores multiply numbers of 11 bits. A product in three parts, of high and low halves, misses by up to six
    units of the last place; that is within the rounding of a sum of sixteen products or more, sqrt(n) + 2 units.
    """
    return "tf32x3" if dtype == torch.float32 and terms >= 16 and torch.version.hip is None else "ieee"


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Launch on the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else nullcontext()
