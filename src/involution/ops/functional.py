"""The operator: its definition, every check of what the user gives, and one call. It knows no implementation.

Letters, here and everywhere: `B` batch, `C` channels, `G` groups, `D` = C / G channels per group, `T` taps,
`*S` input sizes, `*K` kernel sizes, `*O` output sizes. "Kernel" always means the involution kernel tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from involution.ops import library, reference
from involution.ops.transformed import transformed
from involution.ops.unwatched import autocast_enabled, unwatched
from involution.ops.window import IntOrInts, Window, whole

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def involution(
    x: Tensor, kernel: Tensor, stride: IntOrInts = 1, padding: IntOrInts = 0, dilation: IntOrInts = 1
) -> Tensor:
    """Slide over `x` with a kernel of its own at every output position, shared by the channels of a group.

    y[b, c, o] = sum over taps t of kernel[b, c // D, t, o] * x[b, c, o * stride - padding + t * dilation],
    where x is zero outside its bounds.

    Args:
        x: input, (B, C, *S) with one to three spatial axes.
        kernel: one kernel per output position and group, (B, G, *K, *O); G divides C.
        stride: step between outputs, an int or one per spatial axis.
        padding: zeros on both sides of each spatial axis, an int or one per axis.
        dilation: step between taps, an int or one per spatial axis.

    Returns:
        (B, C, *O) with O = floor((S + 2 padding - dilation (K - 1) - 1) / stride) + 1, in the dtype and memory
        format of `x`.

    Raises:
        TypeError: if an argument is no tensor, or the dtypes disagree or are not floating point.
        ValueError: if shapes, devices or window settings do not fit; the message shows both sides.

    Numerics: half types accumulate in float32. Every implementation is deterministic. Under `torch.autocast` both
    tensors are cast to the autocast dtype unless they are float64, as convolution does.

    Example:
        >>> x, kernel = torch.randn(2, 32, 13, 13), torch.randn(2, 2, 3, 3, 7, 7)
        >>> involution(x, kernel, stride=2, padding=1).shape
        torch.Size([2, 32, 7, 7])

    Source: Li et al., "Involution: Inverting the Inherence of Convolution for Visual Recognition", CVPR 2021.
    """
    given = (stride, padding, dilation)
    if (before := _before(library.forward, (x, kernel), given)) is not None:
        return before(x, kernel)
    _check_tensor("x", x)
    _check_tensor("kernel", kernel)
    rank = _rank(x)
    if kernel.dim() != 2 + 2 * rank:
        raise ValueError(
            f"`kernel` must have {2 + 2 * rank} dimensions (B, G, {rank} kernel sizes, {rank} output sizes) for `x` of "
            f"shape {tuple(x.shape)}; got shape {tuple(kernel.shape)}."
        )
    kernel_size = tuple(kernel.shape)[2 : 2 + rank]
    if 0 in kernel_size:
        raise ValueError(f"`kernel` must have at least one tap on every axis; got shape {tuple(kernel.shape)}.")
    if autocast_enabled(x.device.type):
        x, kernel = _autocast(x), _autocast(kernel)
    _check_alike(x, "kernel", kernel)
    window = Window.normalise(rank, kernel_size, stride, padding, dilation)
    _check_sizes(x, "kernel", kernel, kernel.shape[1], window)
    settings = (window.stride, window.padding, window.dilation)
    return _call(library.forward, (x, kernel), given, settings)


def generated_involution(
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    dilation: IntOrInts = 1,
) -> Tensor:
    """`involution` of `x` by the kernel weight @ features + bias, a 1x1 convolution that is never stored as a whole.

    The kernel of a layer is K * K / D times as large as x. Here every part of it is generated where it is used, and
    again in the backward pass, so that training keeps `features` in its place; the numbers are the same to rounding.

    Args:
        x: input, (B, C, *S) with one to three spatial axes.
        features: what the kernels are generated from, (B, R, *O).
        weight: (G * T, R), T the number of taps; G divides C.
        bias: (G * T,).
        kernel_size: *K, an int or one per spatial axis.
        stride: as for `involution`.
        padding: as for `involution`.
        dilation: as for `involution`.

    Returns:
        (B, C, *O), in the dtype and memory format of `x`.

    Raises:
        TypeError: if an argument is no tensor, or the dtypes disagree or are not floating point.
        ValueError: if shapes, devices or window settings do not fit; the message shows both sides.

    Numerics: kernels of half types are generated in float32; on a CPU they are used so, on a GPU rounded once.

    Example:
        >>> x, features = torch.randn(2, 32, 13, 13), torch.randn(2, 8, 13, 13)
        >>> generated_involution(x, features, torch.randn(2 * 9, 8), torch.randn(2 * 9), 3, padding=1).shape
        torch.Size([2, 32, 13, 13])
    """
    given = (kernel_size, stride, padding, dilation)
    if (before := _before(library.generated, (x, features, weight, bias), given)) is not None:
        return before(x, features, weight, bias)
    tensors = {"x": x, "features": features, "weight": weight, "bias": bias}
    for name, value in tensors.items():
        _check_tensor(name, value)
    rank = _rank(x)
    if autocast_enabled(x.device.type):
        x, features, weight, bias = map(_autocast, tensors.values())
    for name, value in (("features", features), ("weight", weight), ("bias", bias)):
        _check_alike(x, name, value)
    window = Window.normalise(rank, kernel_size, stride, padding, dilation)
    taps = prod(window.kernel_size)
    if features.dim() != x.dim() or weight.dim() != 2 or bias.dim() != 1:
        raise ValueError(
            f"`features`, `weight` and `bias` must have {x.dim()}, 2 and 1 dimensions for `x` of shape "
            f"{tuple(x.shape)}; got shapes {tuple(features.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}."
        )
    if features.shape[1] == 0:
        raise ValueError(f"`features` must have at least one channel; got shape {tuple(features.shape)}.")
    if weight.shape[1] != features.shape[1] or weight.shape[0] != bias.shape[0] or weight.shape[0] % taps:
        raise ValueError(
            f"`weight` must have shape (G * {taps}, {features.shape[1]}) and `bias` (G * {taps},) for kernel size "
            f"{window.kernel_size} and `features` of shape {tuple(features.shape)}; got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}."
        )
    _check_sizes(x, "features", features, weight.shape[0] // taps, window)
    if transformed():
        kernel = reference.span(features, weight, bias, window.kernel_size)
        return _call(library.forward, (x, kernel), given, (window.stride, window.padding, window.dilation))
    settings = (window.kernel_size, window.stride, window.padding, window.dilation)
    return _call(library.generated, (x, features, weight, bias), given, settings)


def local_products(
    query: Tensor,
    x: Tensor,
    groups: int,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    dilation: IntOrInts = 1,
) -> Tensor:
    """Products of each query with the keys in a window around it: the kernel of local self-attention, before softmax.

    kernel[b, g, t, o] = sum over c in group g of query[b, c, o] * x[b, c, o * stride - padding + t * dilation], where
    x, the keys, is zero outside its bounds. It is the gradient of the kernel in `involution`, so nothing is unfolded.

    Args:
        query: one vector per output position, (B, C, *O).
        x: the keys, (B, C, *S) with one to three spatial axes.
        groups: G, heads; it divides C.
        kernel_size: *K, an int or one per spatial axis.
        stride: as for `involution`.
        padding: as for `involution`.
        dilation: as for `involution`.

    Returns:
        (B, G, *K, *O), which `involution` takes as its kernel.

    Raises:
        TypeError: if an argument is no tensor, or the dtypes disagree or are not floating point.
        ValueError: if shapes, devices or window settings do not fit; the message shows both sides.

    Example:
        >>> x = torch.randn(2, 32, 13, 13)
        >>> local_products(x, x, groups=4, kernel_size=3, padding=1).shape
        torch.Size([2, 4, 3, 3, 13, 13])
    """
    _check_tensor("query", query)
    _check_tensor("x", x)
    rank = _rank(x)
    if autocast_enabled(x.device.type):
        query, x = _autocast(query), _autocast(x)
    _check_alike(x, "query", query)
    window = Window.normalise(rank, kernel_size, stride, padding, dilation)
    if query.dim() != x.dim() or query.shape[1] != x.shape[1]:
        raise ValueError(
            f"`query` must have as many dimensions and channels as `x`, of shape {tuple(x.shape)}; got shape "
            f"{tuple(query.shape)}."
        )
    groups = whole("groups", groups)
    if x.shape[1] % groups:
        raise ValueError(f"`groups` must divide the {x.shape[1]} channels of `query` and `x`; got {groups}.")
    _check_sizes(x, "query", query, groups, window)
    settings = (groups, window.kernel_size, window.stride, window.padding, window.dilation)
    kernel: Tensor = library.call(library.grad_kernel, (query, x), *settings)
    return kernel


# What to do for calls that have passed all checks, by all that these look at, and by strides: to check, and to find out
# what depends on nothing else, takes longer than to compute on a small image.
_passed: dict[object, Callable[..., Tensor]] = {}
_MOST_PASSED = 1024


def _before(op: object, tensors: tuple[Tensor, ...], given: tuple[object, ...]) -> Callable[..., Tensor] | None:
    """What gives op(*tensors), if such a call passed all checks before and nothing watches this one; else None."""
    return _passed.get(_looked_at(op, tensors, given)) if unwatched(tensors) else None


def _call(op: OpOverload, tensors: tuple[Tensor, ...], given: tuple[object, ...], settings: tuple[Any, ...]) -> Tensor:
    """op(*tensors, *settings), which have passed all checks."""
    out: Tensor = library.call(op, tensors, *settings) if transformed() else op(*tensors, *settings)
    if unwatched(tensors) and (looked_at := _looked_at(op, tensors, given)):
        if len(_passed) >= _MOST_PASSED:
            _passed.clear()
        _passed[looked_at] = library.remembering(op, settings)
    return out


def _looked_at(op: object, tensors: tuple[Tensor, ...], given: tuple[object, ...]) -> object:
    """None for settings that are no ints and tuples of ints: others may be equal to these, or cannot be looked up."""
    for value in given:
        if type(value) is not int and (type(value) is not tuple or any(type(entry) is not int for entry in value)):
            return None
    return (op, given, *[(t.dtype, t.shape, t.stride()) for t in tensors])


def _check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor; got {type(value).__name__}.")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"`{name}` must be a dense tensor; got layout {value.layout}. Use `to_dense()`.")
    if value.dtype not in _DTYPES:
        served = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"`{name}` must have one of the dtypes {served}; got {value.dtype}.")


def _rank(x: Tensor) -> int:
    rank = x.dim() - 2
    if not 1 <= rank <= 3:
        raise ValueError(f"`x` must have 3, 4 or 5 dimensions (B, C, 1 to 3 spatial); got shape {tuple(x.shape)}.")
    return rank


def _check_alike(x: Tensor, name: str, value: Tensor) -> None:
    if x.device != value.device:
        raise ValueError(f"`x` and `{name}` must share a device; got {x.device} and {value.device}.")
    if x.dtype != value.dtype:
        raise TypeError(
            f"`x` and `{name}` must share a dtype; got {x.dtype} and {value.dtype}. "
            "Convert one of them; torch.autocast does so for all but float64."
        )


def _autocast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def _check_sizes(x: Tensor, name: str, value: Tensor, groups: int, window: Window) -> None:
    """Hold `x` against the tensor `name` of shape (B, ..., *O), the kernel or what it is generated from."""
    batch, channels, *size = x.shape
    if value.shape[0] != batch:
        raise ValueError(f"`{name}` has batch size {value.shape[0]}, `x` has {batch}; they must be equal.")
    if groups == 0 or channels == 0 or channels % groups:
        holder = "kernel" if name == "kernel" else "weight"
        raise ValueError(f"`{holder}` has {groups} groups, which does not divide the {channels} channels of `x`.")
    expected, given = window.output_size(size), tuple(value.shape)[2 - x.dim() :]
    if given != expected:
        hint = " Was it generated at the input resolution?" if given == tuple(size) else ""
        raise ValueError(
            f"`{name}` must end in the output size {expected} for `x` of spatial size {tuple(size)}, "
            f"kernel size {window.kernel_size}, stride {window.stride}, padding {window.padding} and dilation "
            f"{window.dilation}; got {given}.{hint}"
        )
