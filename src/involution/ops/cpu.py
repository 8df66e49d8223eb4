"""The C++ implementation: finds the compiled library of `csrc/involution.cpp`, describes tensors to it, calls it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

Ints = Sequence[int]

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_PROBLEM = struct.Struct("46q6P")  # `struct Problem` of csrc/involution.cpp: sizes and strides, then six addresses
_SUFFIXES = {"AVX512": "avx512", "AVX2": "avx2"}  # by what torch says the processor can do; anything else: baseline


def available() -> bool:
    """Whether the compiled library was found. It is built when the package is installed."""
    return _library is not None


def description() -> str:
    """What serves CPU tensors, in a few words."""
    return _description


def forward(out: Tensor, x: Tensor, kernel: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the involution of `x`; the arguments are those of `reference.forward`."""
    _call("involution_forward", x, kernel, out, stride, padding, dilation)


def generated(
    out: Tensor, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, kernel_size: Ints, *window: Ints
) -> None:
    """Fill `out` as `reference.generated` does, with the kernel made tile by tile in the cache."""
    stride, padding, dilation = window
    accurate = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(accurate).contiguous(), bias.to(accurate).contiguous()
    missing = 3 - len(kernel_size)
    feature_stride = features.stride()
    span = (features.shape[1], *feature_stride[:2], *(0,) * missing, *feature_stride[2:])
    groups = weight.shape[0] // prod(kernel_size)
    _run(
        "involution_forward",
        *(x, out, stride, padding, dilation),
        *(groups, kernel_size, features.shape[2:], (0,) * 8, 0),
        *(span, (features.data_ptr(), weight.data_ptr(), bias.data_ptr())),
    )


def grad_x(out: Tensor, grad: Tensor, kernel: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the gradient of x; the arguments are those of `reference.grad_x`."""
    _call("involution_grad_x", out, kernel, grad, stride, padding, dilation)


def grad_kernel(out: Tensor, grad: Tensor, x: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the gradient of the kernel; the arguments are those of `reference.grad_kernel`."""
    _call("involution_grad_kernel", x, out, grad, stride, padding, dilation)


def _call(name: str, x: Tensor, kernel: Tensor, y: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Call the function `name` on x (B, C, *S), kernel (B, G, *K, *O) and y (B, C, *O); it fills one of them."""
    rank = x.dim() - 2
    zeros, strides, sizes = (0,) * (3 - rank), kernel.stride(), kernel.shape[2:]
    kernel_stride = (*strides[:2], *zeros, *strides[2 : 2 + rank], *zeros, *strides[2 + rank :])
    _run(
        name,
        *(x, y, stride, padding, dilation),
        *(kernel.shape[1], sizes[:rank], sizes[rank:], kernel_stride, kernel.data_ptr()),
        *((0,) * 6, (0,) * 3),
    )


def _run(
    name: str,
    x: Tensor,
    y: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    kernel_size: Ints,
    output_size: Ints,
    kernel_stride: Ints,
    kernel_address: int,
    span: Ints,
    span_addresses: Ints,
) -> None:
    """Describe a problem to the function `name`: x, y and the window, then the kernel or what generates it."""
    rank = x.dim() - 2
    ones, zeros = (1,) * (3 - rank), (0,) * (3 - rank)
    batch, channels, *size = x.shape
    x_stride, y_stride = x.stride(), y.stride()
    problem = _PROBLEM.pack(
        *(_DTYPES[x.dtype], batch, groups, channels // groups),
        *(*ones, *kernel_size, *ones, *size, *ones, *output_size),
        *(*ones, *stride, *zeros, *padding, *ones, *dilation),
        *(*x_stride[:2], *zeros, *x_stride[2:]),
        *kernel_stride,
        *(*y_stride[:2], *zeros, *y_stride[2:]),
        *(*span, x.data_ptr(), kernel_address, y.data_ptr(), *span_addresses),
    )
    if getattr(_library, name)(problem):
        raise MemoryError(
            f"no memory for the scratch of {name} on `x` of shape {tuple(x.shape)} with kernel size "
            f"{tuple(kernel_size)}, stride {tuple(stride)}, padding {tuple(padding)} and dilation {tuple(dilation)}."
        )


def _load(variant: str | None = None, folder: Path = Path(__file__).parent) -> tuple[ctypes.CDLL | None, str]:
    """The library in `folder` for `variant`, by default the best this processor runs, and what to say of it."""
    variant = variant or _SUFFIXES.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    path = folder / f"libinvolution-{variant}.so"
    if not path.exists():
        return None, "reference (the compiled library is missing: install the package to build it)"
    try:
        return ctypes.CDLL(str(path)), f"C++, {variant}"
    except OSError as error:  # built for another machine, or without its OpenMP runtime
        return None, f"reference (the compiled library does not load: {error})"


_library, _description = _load()
