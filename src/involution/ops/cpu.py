"""The C++ implementation: finds the compiled library of `csrc/involution.cpp`, describes tensors to it, calls it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

Ints = Sequence[int]

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_SIZES, _ADDRESSES = struct.Struct("52q"), struct.Struct("13P")  # together `struct Problem` of csrc/problem.h
# Together, with a norm twice, `struct Layer` of csrc/layer.h.
_PRODUCT, _SOURCE, _NORM = struct.Struct("3P"), struct.Struct("6q"), struct.Struct("4Pdq")
_FOLLOWING = struct.Struct("3q2P")  # with a norm, `struct Following` of csrc/follow.h
_PLACES, _POINTWISE = struct.Struct("11q"), struct.Struct("9Pdq")  # together `struct Pointwise` of csrc/pointwise.h
_PADDED = 16  # rows of partial sums are whole vectors of any width
# Lots of partial sums: enough for the threads of a large machine, less where they take much memory. How many never
# depends on the threads there are, so neither do the bits.
_LEAST_LOTS, _MOST_LOTS, _PARTIAL_BYTES = 16, 64, 32 << 20
# Allocations from which on glibc takes fresh memory from the system each time; such an output is better in large pages.
# Smaller ones share the heap with others, which would then take up large pages, too: more memory than they need.
_LARGE_BYTES = 32 << 20
_SUFFIXES = {"AVX512": "avx512", "AVX2": "avx2"}  # by what torch says the processor can do; anything else: baseline


def available() -> bool:
    """Whether the compiled library was found. It is built when the package is installed."""
    return _library is not None


def description() -> str:
    """What serves CPU tensors, in a few words."""
    return _description


def forward(out: Tensor, x: Tensor, kernel: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the involution of `x`; the arguments are those of `reference.forward`."""
    _in_large_pages(out)
    _call("involution_forward", x, kernel, out, stride, padding, dilation)


def generated(
    out: Tensor, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, kernel_size: Ints, *window: Ints
) -> None:
    """Fill `out` as `reference.generated` does, with the kernel made tile by tile in the cache."""
    _in_large_pages(out)
    span = (features, _accurate(weight), _accurate(bias))
    _call_generated("involution_forward", x, out, span, (), kernel_size, window)


def prepared_forward(out: Tensor, x: Tensor, kernel: Tensor, *window: Ints) -> Callable[[Tensor, Tensor], Tensor]:
    """`forward`, into a new tensor like `out`, for tensors that differ from these in nothing but what they hold."""
    sizes, shape, strides = _sizes_given(x, kernel, out, window), out.shape, out.stride()

    def run(x: Tensor, kernel: Tensor) -> Tensor:
        out = x.new_empty_strided(shape, strides)
        _in_large_pages(out)
        _run("involution_forward", (sizes + _addresses_given(x, kernel, out),), x, window)
        return out

    return run


def prepared_generated(
    out: Tensor, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, kernel_size: Ints, *window: Ints
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`generated`, into a new tensor like `out`, for tensors that differ from these in nothing but what they hold."""
    sizes, shape, strides = _sizes_generated(x, out, features, weight, kernel_size, window), out.shape, out.stride()

    def run(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = x.new_empty_strided(shape, strides)
        _in_large_pages(out)
        span = (features, _accurate(weight), _accurate(bias))
        _run("involution_forward", (sizes + _addresses_generated(x, out, span),), x, window)
        return out

    return run


def layer(
    out: Tensor,
    x: Tensor,
    source: Tensor,
    parameters: Sequence[Tensor | None],
    eps: Sequence[float],
    relu: Sequence[bool],
    kernel_size: Ints,
    *window: Ints,
) -> None:
    """Fill `out` with norm(generated(x, norm(product(source)))), each norm by known statistics and followed by ReLU.

    Args:
        out: (B, C, *O).
        x: (B, C, *S).
        source: (B, Q, *O).
        parameters: weight (R, Q) and bias (R,) of the product; weight (G * T, R) and bias (G * T,) of the span; mean,
            variance, weight and bias of the norm of features, each (R,), and of that of `out`, each (C,). None leaves
            out a part. Axes of size one may follow; all are of the dtype of x, float32 or float64. Their sizes are
            not checked here, but by who calls this.
        eps: what the norms add to their variances.
        relu: whether ReLU follows each of them.
        kernel_size: *K.
        window: stride, padding and dilation.
    """
    _in_large_pages(out)
    weight, span = (_accurate(matrix) for matrix in (parameters[0], parameters[2]) if matrix is not None)
    features = torch.empty((weight.shape[0], source.shape[0], *source.shape[2:]), dtype=x.dtype, device=x.device)
    sizes, of_source = _pack_layer(
        *(x.dtype, x.shape, x.stride(), out.stride(), span.shape[0], tuple(kernel_size), weight.shape[0]),
        *(source.shape, source.stride(), *map(tuple, window)),
    )
    _, bias, _, span_bias, *norms = map(_address, parameters)
    given = (x.data_ptr(), 0, out.data_ptr(), features.data_ptr(), span.data_ptr(), span_bias)
    around = _PRODUCT.pack(source.data_ptr(), weight.data_ptr(), bias) + of_source
    around += _NORM.pack(*norms[:4], eps[0], relu[0]) + _NORM.pack(*norms[4:], eps[1], relu[1])
    _run("involution_layer", (sizes + _ADDRESSES.pack(*given, *(0,) * 7), around), x, window)


def follow(y: Tensor, norm: Sequence[Tensor | None], eps: float, beside: Tensor | None, relu: bool) -> None:
    """Make of `y` norm(y) + beside by known statistics, followed by ReLU or not, by one pass over memory.

    Args:
        y: (B, C, *S), dense with channels innermost; float32 or float64.
        norm: mean, variance, weight and bias, each (C,), dense and of the dtype of `y`; None leaves out a part.
        eps: what the norm adds to its variance.
        beside: as `y`, or None to add nothing.
        relu: whether ReLU follows.
    """
    assert _library is not None
    channels = y.shape[1]
    sizes = (_DTYPES[y.dtype], y.numel() // channels, channels)
    following = _FOLLOWING.pack(*sizes, y.data_ptr(), _address(beside))
    if _library.involution_follow(following + _NORM.pack(*map(_address, norm), eps, relu)):
        raise MemoryError(f"no memory for the norm of a tensor of shape {tuple(y.shape)}.")


def pointwise(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    norm: Sequence[Tensor | None],
    eps: float,
    beside: Tensor | None,
    relu: bool,
) -> None:
    """Fill `out` with norm(weight @ x + bias) + beside, by known statistics, followed by ReLU or not.

    Args:
        out: (B, N, *O), dense with channels innermost, O = ceil(S / stride); float32 or float64.
        x: (B, C, *S), of the same kind; neither is empty.
        weight: (N, C), dense. Axes of size one may follow.
        bias: (N,), dense, or None.
        stride: step between outputs, one int per axis.
        norm: mean, variance, weight and bias, each (N,), dense; None leaves out a part.
        eps: what the norm adds to its variance.
        beside: as `out`, or None to add nothing.
        relu: whether ReLU follows.
    """
    assert _library is not None
    _in_large_pages(out)
    places = _pack_places(x.dtype, x.shape, out.shape[1], tuple(stride))
    given = (x.data_ptr(), weight.data_ptr(), *map(_address, (bias, out, beside, *norm)), eps, relu)
    if _library.involution_pointwise(places + _POINTWISE.pack(*given)):
        raise MemoryError(f"no memory for the scratch of a 1x1 convolution of `x` of shape {tuple(x.shape)}.")


def generated_grad_x(
    out: Tensor, grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor, kernel_size: Ints, *window: Ints
) -> None:
    """Fill `out` with the gradient of x in `generated`, with the kernel made tile by tile in the cache."""
    _in_large_pages(out)
    span = (features, _accurate(weight), _accurate(bias))
    _call_generated("involution_grad_x", out, grad, span, (), kernel_size, window)


def grad_span(
    outs: Sequence[Tensor],
    grad: Tensor,
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    kernel_size: Ints,
    *window: Ints,
) -> None:
    """Fill `outs` with the gradients of features, weight and bias in `generated`; the kernel's stays in the cache.

    The last two are sums over all positions, taken in an order that does not depend on the number of threads.
    """
    weight = _accurate(weight)
    (taps, reduced), padded = weight.shape, -(-weight.shape[1] // _PADDED) * _PADDED
    lots = max(_LEAST_LOTS, min(_MOST_LOTS, _PARTIAL_BYTES // (taps * padded * weight.itemsize)))
    partial = weight.new_empty(lots, taps * (padded + 1))
    sums = weight.new_empty(taps, reduced), weight.new_empty(taps)
    _call_generated(
        "involution_grad_kernel", x, grad, (features, weight, None), (outs[0], *sums, partial), kernel_size, window
    )
    outs[1].copy_(sums[0])
    outs[2].copy_(sums[1])


def grad_x(out: Tensor, grad: Tensor, kernel: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the gradient of x; the arguments are those of `reference.grad_x`."""
    _in_large_pages(out)
    _call("involution_grad_x", out, kernel, grad, stride, padding, dilation)


def grad_kernel(out: Tensor, grad: Tensor, x: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> None:
    """Fill `out` with the gradient of the kernel; the arguments are those of `reference.grad_kernel`."""
    _in_large_pages(out)
    _call("involution_grad_kernel", x, out, grad, stride, padding, dilation)


def prepared_gradients(
    outs: tuple[Tensor, Tensor], grad: Tensor, x: Tensor, kernel: Tensor, *window: Ints
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`grad_x` and `grad_kernel` in turns, to the bit, so that the second finds `grad` in the cache: into new tensors.

    They are like `outs`; grad, x and kernel may differ from these in what they hold. All may be on the meta device.
    """
    sizes = _sizes_given(outs[0], kernel, grad, window), _sizes_given(x, outs[1], grad, window)
    layouts = [(out.shape, out.stride()) for out in outs]

    def run(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
        of_x, of_kernel = (x.new_empty_strided(*layout) for layout in layouts)
        _in_large_pages(of_x)
        _in_large_pages(of_kernel)
        addresses = _addresses_given(of_x, kernel, grad), _addresses_given(x, of_kernel, grad)
        _run("involution_gradients", (sizes[0] + addresses[0], sizes[1] + addresses[1]), x, window)
        return of_x, of_kernel

    return run


def _call(name: str, x: Tensor, kernel: Tensor, y: Tensor, *window: Ints) -> None:
    """Call the function `name` on x (B, C, *S), kernel (B, G, *K, *O) and y (B, C, *O); it fills one of them."""
    _run(name, (_problem(x, kernel, y, window),), x, window)


def _problem(x: Tensor, kernel: Tensor, y: Tensor, window: Sequence[Ints]) -> bytes:
    return _sizes_given(x, kernel, y, window) + _addresses_given(x, kernel, y)


def _sizes_given(x: Tensor, kernel: Tensor, y: Tensor, window: Sequence[Ints]) -> bytes:
    _check_alike(x, kernel, y)
    return _pack_given(x.dtype, x.shape, x.stride(), y.stride(), kernel.shape, kernel.stride(), *map(tuple, window))


def _addresses_given(x: Tensor, kernel: Tensor, y: Tensor) -> bytes:
    return _ADDRESSES.pack(x.data_ptr(), kernel.data_ptr(), y.data_ptr(), *(0,) * 10)


def _call_generated(
    name: str,
    x: Tensor,
    y: Tensor,
    span: tuple[Tensor, Tensor, Tensor | None],
    grads: tuple[Tensor, ...],
    kernel_size: Ints,
    window: Sequence[Ints],
) -> None:
    """Call the function `name` on x (B, C, *S) and y (B, C, *O), with a kernel generated from what `span` holds.

    That is features, weight and bias; `grads` are their gradients and memory for partial sums, (lots, ...), or nothing.
    """
    sizes = _sizes_generated(x, y, *span[:2], kernel_size, window, grads)
    _run(name, (sizes + _addresses_generated(x, y, span, grads),), x, window)


def _sizes_generated(
    x: Tensor,
    y: Tensor,
    features: Tensor,
    weight: Tensor,
    kernel_size: Ints,
    window: Sequence[Ints],
    grads: tuple[Tensor, ...] = (),
) -> bytes:
    _check_alike(x, y, features)
    grad_stride, lots = (grads[0].stride(), len(grads[-1])) if grads else ((0,) * x.dim(), 0)
    return _pack_generated(
        *(x.dtype, x.shape, x.stride(), y.stride(), weight.shape[0] // prod(kernel_size), tuple(kernel_size)),
        *(features.shape, features.stride(), grad_stride, lots, *map(tuple, window)),
    )


def _addresses_generated(
    x: Tensor, y: Tensor, span: tuple[Tensor, Tensor, Tensor | None], grads: tuple[Tensor, ...] = ()
) -> bytes:
    filled = tuple(t.data_ptr() for t in grads) or (0,) * 4
    return _ADDRESSES.pack(x.data_ptr(), 0, y.data_ptr(), *map(_address, span), *filled, 0, 0, 0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_alike(a: Tensor, b: Tensor, c: Tensor) -> None:
    """The C++ code takes the dtype of one for that of all; the ops may be called without the checks of `functional`."""
    if not a.dtype is b.dtype is c.dtype:
        raise TypeError(f"the tensors of an op must share a dtype; got {a.dtype}, {b.dtype} and {c.dtype}.")


def _in_large_pages(out: Tensor) -> None:
    """Spare a large output, which is fresh memory, a page fault for every 4 KiB: they take longer than to fill it."""
    if out.nbytes >= _LARGE_BYTES:
        assert _library is not None
        _library.involution_large_pages(ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.nbytes))


def _accurate(weight: Tensor) -> Tensor:
    """Dense, and of the type computed in."""
    return weight.contiguous() if weight.dtype in (torch.float32, torch.float64) else weight.float().contiguous()


def _run(name: str, problems: Sequence[bytes], x: Tensor, window: Sequence[Ints]) -> None:
    if getattr(_library, name)(*problems):
        stride, padding, dilation = map(tuple, window)
        raise MemoryError(
            f"no memory for the scratch of {name} on `x` of shape {tuple(x.shape)} with stride {stride}, "
            f"padding {padding} and dilation {dilation}."
        )


# A network calls with the same sizes again and again, and to pack them takes longer than all else that is done here.


@lru_cache(maxsize=1024)
def _pack_given(
    dtype: torch.dtype, x: Ints, x_stride: Ints, y_stride: Ints, kernel: Ints, kernel_stride: Ints, *window: Ints
) -> bytes:
    """The problem with a kernel of shape `kernel`."""
    rank, zeros = len(x) - 2, (0,) * (5 - len(x))
    taps, places = kernel_stride[2 : 2 + rank], kernel_stride[2 + rank :]
    kernel_stride = (*kernel_stride[:2], *zeros, *taps, *zeros, *places)
    sizes = (kernel[1], kernel[2 : 2 + rank], kernel[2 + rank :])
    return _sizes(dtype, x, x_stride, y_stride, *sizes, kernel_stride, (0,) * 12, *window)


@lru_cache(maxsize=1024)
def _pack_generated(
    dtype: torch.dtype,
    x: Ints,
    x_stride: Ints,
    y_stride: Ints,
    groups: int,
    kernel_size: Ints,
    features: Ints,
    features_stride: Ints,
    grad_features_stride: Ints,
    lots: int,
    *window: Ints,
) -> bytes:
    """The problem with a kernel that is generated from features of shape `features`."""
    span = (features[1], *_lifted(features_stride), *_lifted(grad_features_stride), lots)
    return _sizes(dtype, x, x_stride, y_stride, groups, kernel_size, features[2:], (0,) * 8, span, *window)


@lru_cache(maxsize=1024)
def _pack_layer(
    dtype: torch.dtype,
    x: Ints,
    x_stride: Ints,
    y_stride: Ints,
    taps: int,
    kernel_size: Ints,
    reduced: int,
    source: Ints,
    source_stride: Ints,
    *window: Ints,
) -> tuple[bytes, bytes]:
    """The problem with a kernel that a whole layer generates, and the layer's source."""
    batch, sources, *size = source
    pixels = prod(size)
    features_stride = (pixels, batch * pixels, *(prod(size[axis + 1 :]) for axis in range(len(size))))
    features, nothing = (batch, reduced, *size), (0,) * len(source)
    of_kernel = (taps // prod(kernel_size), kernel_size, features, features_stride, nothing, 0)
    problem = _pack_generated(dtype, x, x_stride, y_stride, *of_kernel, *window)
    return problem, _SOURCE.pack(sources, *_lifted(source_stride))


@lru_cache(maxsize=1024)
def _pack_places(dtype: torch.dtype, x: Ints, channels: int, stride: Ints) -> bytes:
    """The outputs of a 1x1 convolution of `x` of this shape, and the steps between what they read."""
    (batch, sources, *size), missing = x, 5 - len(x)
    steps = [sources * step * prod(size[axis + 1 :]) for axis, step in enumerate(stride)]
    outputs = [-(-length // step) for length, step in zip(size, stride, strict=True)]
    return _PLACES.pack(
        *(_DTYPES[dtype], batch, sources, channels, *(1,) * missing, *outputs),
        *(sources * prod(size), *(0,) * missing, *steps),
    )


def _sizes(
    dtype: torch.dtype,
    x: Ints,
    x_stride: Ints,
    y_stride: Ints,
    groups: int,
    kernel_size: Ints,
    output_size: Ints,
    kernel_stride: Ints,
    span: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
) -> bytes:
    batch, channels, *size = x
    ones, zeros = (1,) * (3 - len(size)), (0,) * (3 - len(size))
    return _SIZES.pack(
        *(_DTYPES[dtype], batch, groups, channels // groups),
        *(*ones, *kernel_size, *ones, *size, *ones, *output_size),
        *(*ones, *stride, *zeros, *padding, *ones, *dilation),
        *(*_lifted(x_stride), *kernel_stride, *_lifted(y_stride), *span),
    )


def _lifted(stride: Ints) -> Ints:
    """Strides of (B, C, *S) with axes of size one in front of *S, up to three axes."""
    return (*stride[:2], *(0,) * (5 - len(stride)), *stride[2:])


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
