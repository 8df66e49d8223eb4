"""The operator: its definition, every check of what the user gives, and one call. It knows no implementation.

Letters, here and everywhere: `B` batch, `C` channels, `G` groups, `D` = C / G channels per group, `T` taps,
`*S` input sizes, `*K` kernel sizes, `*O` output sizes. "Kernel" always means the involution kernel tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from involution.ops import library
from involution.ops.window import IntOrInts, Window

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
    _check_tensors(x, kernel)
    if autocast_enabled(x.device.type):
        x, kernel = _autocast(x), _autocast(kernel)
    if x.dtype != kernel.dtype:
        raise TypeError(
            f"`x` and `kernel` must share a dtype; got {x.dtype} and {kernel.dtype}. "
            "Convert one of them; torch.autocast does so for all but float64."
        )
    window = Window.normalise(x.dim() - 2, kernel.shape[2 : x.dim()], stride, padding, dilation)
    _check_sizes(x, kernel, window)
    if forward_ad._current_level >= 0:
        return _with_tangent(x, kernel, window)
    return library.forward(x, kernel, window.stride, window.padding, window.dilation)


def _with_tangent(x: Tensor, kernel: Tensor, window: Window) -> Tensor:
    """The involution of dual tensors of forward-mode differentiation, by the product rule."""
    settings = (window.stride, window.padding, window.dilation)
    (x, dx), (kernel, dkernel) = forward_ad.unpack_dual(x), forward_ad.unpack_dual(kernel)
    y = library.forward(x, kernel, *settings)
    tangents = [library.forward(dx, kernel, *settings)] if dx is not None else []
    tangents += [library.forward(x, dkernel, *settings)] if dkernel is not None else []
    return forward_ad.make_dual(y, torch.stack(tangents).sum(0)) if tangents else y


def _check_tensors(x: Tensor, kernel: Tensor) -> None:
    for name, value in (("x", x), ("kernel", kernel)):
        if not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a tensor; got {type(value).__name__}.")
        if value.layout is not torch.strided or value.is_nested:
            raise TypeError(f"`{name}` must be a dense tensor; got layout {value.layout}. Use `to_dense()`.")
        if value.dtype not in _DTYPES:
            served = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise TypeError(f"`{name}` must have one of the dtypes {served}; got {value.dtype}.")
    rank = x.dim() - 2
    if not 1 <= rank <= 3:
        raise ValueError(f"`x` must have 3, 4 or 5 dimensions (B, C, 1 to 3 spatial); got shape {tuple(x.shape)}.")
    if kernel.dim() != 2 + 2 * rank:
        raise ValueError(
            f"`kernel` must have {2 + 2 * rank} dimensions (B, G, {rank} kernel sizes, {rank} output sizes) for `x` of "
            f"shape {tuple(x.shape)}; got shape {tuple(kernel.shape)}."
        )
    if 0 in kernel.shape[2 : x.dim()]:
        raise ValueError(f"`kernel` must have at least one tap on every axis; got shape {tuple(kernel.shape)}.")
    if x.device != kernel.device:
        raise ValueError(f"`x` and `kernel` must share a device; got {x.device} and {kernel.device}.")


def autocast_enabled(device: str) -> bool:
    """Whether tensors on this type of device are cast by `torch.autocast` now; never on one that it does not know."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def _check_sizes(x: Tensor, kernel: Tensor, window: Window) -> None:
    batch, channels = x.shape[:2]
    groups = kernel.shape[1]
    if kernel.shape[0] != batch:
        raise ValueError(f"`kernel` has batch size {kernel.shape[0]}, `x` has {batch}; they must be equal.")
    if groups == 0 or channels == 0 or channels % groups:
        raise ValueError(f"`kernel` has {groups} groups, which does not divide the {channels} channels of `x`.")
    expected, given = window.output_size(x.shape[2:]), tuple(kernel.shape[x.dim() :])
    if given != expected:
        hint = " Was it generated at the input resolution?" if given == tuple(x.shape[2:]) else ""
        raise ValueError(
            f"`kernel` must end in the output size {expected} for `x` of spatial size {tuple(x.shape[2:])}, "
            f"kernel size {window.kernel_size}, stride {window.stride}, padding {window.padding} and dilation "
            f"{window.dilation}; got {given}.{hint}"
        )
