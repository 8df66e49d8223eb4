"""The C++ implementation: finds the compiled library of `csrc/involution.cpp`, describes tensors to it, calls it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

Ints = Sequence[int]

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_PROBLEM = struct.Struct("40q3P")  # `struct Problem` of csrc/involution.cpp: sizes and strides, then three addresses
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


def grad_x(out: Tensor, grad: Tensor, kernel: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the gradient of x; the arguments are those of `reference.grad_x`."""
    _call("involution_grad_x", out, kernel, grad, stride, padding, dilation)


def grad_kernel(out: Tensor, grad: Tensor, x: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the gradient of the kernel; the arguments are those of `reference.grad_kernel`."""
    _call("involution_grad_kernel", x, out, grad, stride, padding, dilation)


def _call(name: str, x: Tensor, kernel: Tensor, y: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Call the function `name` on x (B, C, *S), kernel (B, G, *K, *O) and y (B, C, *O); it fills one of them."""
    rank = x.dim() - 2
    missing = 3 - rank
    ones, zeros = (1,) * missing, (0,) * missing
    batch, channels, *size = x.shape
    groups, sizes = kernel.shape[1], kernel.shape[2:]
    x_stride, kernel_stride, y_stride = x.stride(), kernel.stride(), y.stride()
    problem = _PROBLEM.pack(
        *(_DTYPES[x.dtype], batch, groups, channels // groups),
        *(*ones, *sizes[:rank], *ones, *size, *ones, *sizes[rank:]),
        *(*ones, *stride, *zeros, *padding, *ones, *dilation),
        *(*x_stride[:2], *zeros, *x_stride[2:]),
        *(*kernel_stride[:2], *zeros, *kernel_stride[2 : 2 + rank], *zeros, *kernel_stride[2 + rank :]),
        *(*y_stride[:2], *zeros, *y_stride[2:]),
        *(x.data_ptr(), kernel.data_ptr(), y.data_ptr()),
    )
    if getattr(_library, name)(problem):
        raise MemoryError(
            f"no memory for the scratch of {name} on `x` of shape {tuple(x.shape)} with kernel size "
            f"{tuple(sizes[:rank])}, stride {tuple(stride)}, padding {tuple(padding)} and dilation {tuple(dilation)}."
        )


def _load(variant: str | None = None) -> tuple[ctypes.CDLL | None, str]:
    """The library compiled for `variant`, by default the best this processor runs, and what to say of it."""
    variant = variant or _SUFFIXES.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    path = Path(__file__).with_name(f"libinvolution-{variant}.so")
    if not path.exists():
        return None, "reference (the compiled library is missing: install the package to build it)"
    try:
        return ctypes.CDLL(str(path)), f"C++, {variant}"
    except OSError as error:  # built for another machine, or without its OpenMP runtime
        return None, f"reference (the compiled library does not load: {error})"


_library, _description = _load()
