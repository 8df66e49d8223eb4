"""The Triton implementation: describes tensors to the programs of `programs.py`, chooses among them, launches them.

Imported when the first tensor on a CUDA or ROCm device arrives; Triton comes with torch where torch has such devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import pairwise, product
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from involution.ops import generated as on_chip
from involution.ops import programs, reference

Ints = Sequence[int]

_COLUMNS, _WINDOW = programs.COLUMNS.value, programs.WINDOW.value
_WINDOW_NAMES = [f"{name}_{axis}" for name in "KSL" for axis in "ZYX"]  # kernel size, stride, dilation
_PACKED = not triton.knobs.runtime.interpret  # whether assembly of NVIDIA's GPUs, since Ampere, is known
_HEIGHT = 28  # rows of a strip, at most: few enough for several strips to each processor
_FEATURES = 64  # the most for which generating a kernel takes less time than to store and load it


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
    strip = _strip(x, groups, kernel_size, window)
    if strip is None or not 1 <= reduced <= _FEATURES:
        forward(out, x, reference.span(features, weight, bias, kernel_size), *window)
        return
    sizes, grid = _strips(x, out, window[1], groups, _strip_height(out.shape[2]))
    with _on(x):
        on_chip.generated_strip[grid](
            *(x, features, weight, bias.contiguous(), out),
            *(*_strides(x), *_strides(features), *weight.stride(), *_strides(out), *sizes),
            **strip,
            **_features(reduced),
            INDEX=_index(x, features, weight[None], out),
            num_warps=1,
        )


def generated_grad_x(
    out: Tensor, grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor, kernel_size: Ints, *window: Ints
) -> None:
    """Fill `out` as `reference.generated_grad_x` does: on the chip where that pays, with strides phase by phase."""
    groups, reduced = weight.shape[0] // prod(kernel_size), features.shape[1]
    strip = _strip(grad, groups, kernel_size, window)
    # Without strides the weights of seven rows of taps are at hand at once, and do not fit the registers.
    if strip is None or not 1 <= reduced <= (_FEATURES if max(window[0]) > 1 else _FEATURES // 2):
        grad_x(out, grad, reference.span(features, weight, bias, kernel_size), *window)
        return
    (height, width), stride, padding, bias = kernel_size, window[0], window[1], bias.contiguous()
    for y, x in product(*map(range, stride)):
        phase = out[:, :, y :: stride[0], x :: stride[1]]
        if not phase.numel():
            continue
        # Tap t reads position i for output (i + padding - t) / stride, so that of a phase every stride-th tap does.
        taps = [(at + p) % s for at, p, s in zip((y, x), padding, stride, strict=True)]
        if height <= taps[0] or width <= taps[1]:
            phase.zero_()
            continue
        first = taps[0] * width + taps[1]
        strip |= {f"K_{axis}": -(-(k - t) // s) for axis, k, t, s in zip("YX", kernel_size, taps, stride, strict=True)}
        before = [(at + p) // s for at, p, s in zip((y, x), padding, stride, strict=True)]
        sizes, grid = _strips(grad, phase, before, groups, _strip_height(phase.shape[2]))
        with _on(grad):
            on_chip.generated_grad_x_strip[grid](
                *(grad, features, weight[first:], bias[first:], phase),
                *(*_strides(grad), *_strides(features), *weight.stride(), *_strides(phase), *sizes[:-1]),
                *(height * width, sizes[-1]),
                **strip,
                TAPS_X=width,
                **_features(reduced),
                INDEX=_index(grad, features, weight[None], phase),
                num_warps=1,
            )


def grad_span(
    outs: Sequence[Tensor],
    grad: Tensor,
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    kernel_size: Ints,
    *window: Ints,
) -> None:
    """Fill `outs` as `reference.grad_span` does: the gradient of the kernel is stored, then multiplied."""
    (taps, reduced), batch, size = weight.shape, features.shape[0], features.shape[2:]
    groups, places = taps // prod(kernel_size), batch * prod(size)
    strip = _strip(x, groups, kernel_size, window) if places and x.shape[1] else None
    if strip is None:
        kernel = reference.like_span(features, weight, kernel_size)
        if kernel.numel():
            grad_kernel(kernel, grad, x, *window)
        last, used = kernel.reshape(batch, taps, *size).movedim(1, -1).reshape(places, taps), weight
    else:
        rows, width, step = taps // kernel_size[1], kernel_size[1], strip["S_X"]
        pairs = torch.empty((places, rows * _COLUMNS // 2), dtype=torch.int32, device=x.device)
        height = 4 if step > 1 else _height(size[0])
        sizes, grid = _strips(x, grad, window[1], groups, height)
        with _on(x):
            on_chip.generated_grad_kernel_tile[grid](
                *(grad, x, pairs, *_strides(grad), *_strides(x), *sizes[:-1]),
                **strip,
                ROWS=height,
                INDEX=_index(x, grad),
                num_warps=1,
            )
        last = pairs.view(x.dtype)
        used = F.pad(weight.reshape(rows, width, reduced), (0, 0, 0, _COLUMNS - width))
        used = used.view(rows, _COLUMNS // step, step, reduced).transpose(1, 2).reshape(-1, reduced)
    # A column of ones sums for the bias: a sum by itself would take longer than the product with features does.
    made = F.pad(features.movedim(1, -1).reshape(places, reduced), (0, 8), value=1.0)
    innermost = outs[0].movedim(1, -1)
    with reference.as_given(features):
        if innermost.is_contiguous():
            torch.mm(last, used, out=innermost.view(places, reduced))
        else:
            innermost.copy_((last @ used).view(batch, *size, reduced))
        sums = last.T @ made
    if strip is not None:
        sums = sums.view(rows, step, _COLUMNS // step, -1).transpose(1, 2).flatten(1, 2)[:, :width].flatten(0, 1)
    outs[1].copy_(sums[:, :reduced])
    outs[2].copy_(sums[:, reduced])


def _strip(x: Tensor, groups: int, kernel_size: Ints, window: Sequence[Ints]) -> dict[str, Any] | None:
    """Settings of the programs of `generated.py`, if the problem is one for them."""
    stride, _, dilation = window
    channels = x.shape[1] // groups if groups else 0
    if x.dim() != 4 or x.element_size() != 2 or not 1 <= channels <= _WINDOW or not _serves(x.device):
        return None
    if stride[0] != stride[1] or stride[0] > 2 or max(dilation) > 1 or max(kernel_size) >= _COLUMNS:
        return None
    names = {"K_Y": kernel_size[0], "K_X": kernel_size[1], "S_Y": stride[0], "S_X": stride[1]}
    return names | {"CHANNELS": channels, "PACKED": _PACKED}


@lru_cache
def _serves(device: torch.device) -> bool:
    """Whether a device is one for `generated.py`: AMD's would spill registers; before Ampere a rounding is missing."""
    if torch.version.hip is not None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _strips(
    read: Tensor, written: Tensor, padding: Ints, groups: int, height: int
) -> tuple[tuple[int, ...], tuple[int]]:
    """Sizes as the programs take them, with the height of a strip as the last, and the grid."""
    batch, _, rows, columns = written.shape
    row_blocks, strips = triton.cdiv(rows, height), triton.cdiv(columns, _COLUMNS)
    sizes = (1, *read.shape[2:], 1, rows, columns, 0, *padding, groups, row_blocks, strips, height)
    return sizes, (batch * row_blocks * strips * groups,)


def _strip_height(rows: int) -> int:
    """Rows of strips that are all but equally high."""
    return triton.cdiv(rows, triton.cdiv(rows, _HEIGHT))


def _features(reduced: int) -> dict[str, int]:
    return {"REDUCED": reduced, "REDUCED_BLOCK": max(16, triton.next_power_of_2(reduced))}


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
