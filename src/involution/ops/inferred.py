"""Layers with what follows them, for networks that only infer: each by one call of the C++ code, for compilers one op.

Each function gives None where that is not done, so that the parts run in turn; they also say what is wrong with sizes
that do not fit. It is done for float32 and float64 on a CPU, where no derivative is asked for and nothing watches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from involution.ops import cpu, reference
from involution.ops.library import WINDOW, allocate
from involution.ops.transformed import transformed
from involution.ops.unwatched import autocast_enabled, recorded, unwatched

Ints = Sequence[int]


class Product(NamedTuple):
    """A 1x1 convolution: weight (N, C, 1, ...), bias (N,) or None."""

    weight: Tensor
    bias: Tensor | None


class Behind(NamedTuple):
    """What follows: a norm by known statistics, and ReLU or not."""

    mean: Tensor | None = None
    variance: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    relu: bool = False


NOTHING = Behind()
_DTYPES = (torch.float32, torch.float64)


def pointwise(
    x: Tensor, product: Product, stride: Ints, behind: Behind = NOTHING, beside: Tensor | None = None
) -> Tensor | None:
    """norm(conv(x)) + beside, with ReLU behind it or not, where channels lie innermost.

    Args:
        x: (B, C, *S).
        product: from C to N channels.
        stride: step between outputs, one int per axis.
        behind: for N channels; its ReLU comes last.
        beside: (B, N, *O), or None to add nothing.

    Returns:
        (B, N, *O), channels innermost, with O = ceil(S / stride); or None.
    """
    if not x.is_cpu or not _only_infers([x, *product, *behind[:4], beside]):
        return None
    output = _output_of(x, product, stride, behind, beside)
    if output is None:
        return None
    if torch.compiler.is_compiling():
        return _pointwise(x, *product, list(stride), *behind, beside)
    y = x.new_empty_strided(*output)
    cpu.pointwise(y, x, *product, stride, behind[:4], behind.eps, beside, behind.relu)
    return y


def follow(y: Tensor, behind: Behind, beside: Tensor | None = None) -> bool:
    """Make of `y` norm(y) + beside, with ReLU behind it or not, by one pass over memory; False where that is not done.

    Not for compilers: they do as much. Nobody else may hold `y`.

    Args:
        y: (B, C, H, W), dense with channels innermost.
        behind: for C channels; its ReLU comes last.
        beside: as `y`, or None to add nothing.
    """
    if torch.compiler.is_compiling() or not y.is_cpu or not _only_infers([y, *behind[:4], beside]):
        return False
    if y.dim() != 4 or not _fit(y, behind[:4], (y.shape[1],) * 4, beside) or not _channels_innermost(y):
        return False
    if beside is not None and (beside.shape != y.shape or beside.stride() != y.stride()):
        return False
    cpu.follow(y, behind[:4], behind.eps, beside, behind.relu)
    return True


def fits_layer(x: Tensor, reduce: Product, features: Behind, span: Product, behind: Behind, taps: int) -> bool:
    """Whether `layer` may be called: whether the sizes fit, for `taps` of all groups, and nothing would be noticed."""
    parameters = (*reduce, *span, *features[:4], *behind[:4])
    return _fit(x, parameters, _sizes_of_layer(x, reduce, taps)) and _only_infers([x, *parameters])


def layer(
    x: Tensor,
    source: Tensor,
    reduce: Product,
    features: Behind,
    span: Product,
    behind: Behind,
    kernel_size: Ints,
    *window: Ints,
) -> Tensor:
    """norm(generated(x, norm(product(source)))), with ReLU behind each norm or not: an involution of `x`.

    Args:
        x: (B, C, *S).
        source: (B, C, *O), what kernels are generated from.
        reduce: from C to R channels.
        features: what follows it.
        span: from R to G * T channels, with a bias.
        behind: what follows the involution.
        kernel_size: *K.
        window: stride, padding and dilation.

    Returns:
        (B, C, *O), in the memory format of `x`.
    """
    if torch.compiler.is_compiling():
        return _layer(x, source, *reduce, *features, *span, *behind, list(kernel_size), *map(list, window))
    y = _allocate_layer(x, source)
    parameters = (*reduce, *span, *features[:4], *behind[:4])
    cpu.layer(y, x, source, parameters, (features.eps, behind.eps), (features.relu, behind.relu), kernel_size, *window)
    return y


def _fit(x: Tensor, parameters: Sequence[Tensor | None], sizes: Ints, beside: Tensor | None = None) -> bool:
    """Whether the C++ code takes these tensors: it does if parameters are dense and of these sizes."""
    dtype = x.dtype
    if not x.is_cpu or dtype not in _DTYPES or not cpu.available() or x.numel() == 0:
        return False
    for t, size in zip(parameters, sizes, strict=True):
        if t is not None and (t.dtype is not dtype or t.numel() != size or not t.is_contiguous()):
            return False
    return beside is None or beside.dtype is dtype


def _only_infers(tensors: Sequence[Tensor | None]) -> bool:
    """Whether no derivative is asked for, and nothing watches but a compiler."""
    if torch.compiler.is_compiling():
        exporting = torch.compiler.is_exporting()  # for who may know torch's own ops only
        return not (exporting or torch.is_grad_enabled() or autocast_enabled("cpu") or transformed())
    given = [t for t in tensors if t is not None]
    return unwatched(given) and not recorded(given)


def _sizes_of_layer(x: Tensor, reduce: Product, taps: int) -> Ints:
    """How many numbers are in each of a layer's parameters."""
    channels, reduced = x.shape[1], reduce.weight.shape[0]
    return (reduced * channels, reduced, taps * reduced, taps, *(reduced,) * 4, *(channels,) * 4)


def _output_of(
    x: Tensor, product: Product, stride: Ints, behind: Behind, beside: Tensor | None
) -> tuple[Ints, Ints] | None:
    """Shape and strides of what `pointwise` gives; None if the C++ code does not take these tensors."""
    shape, channels = x.shape, product.weight.shape[0]
    if len(shape) != product.weight.dim():
        return None
    sizes = (channels * shape[1], *(channels,) * 5)
    if not _fit(x, (*product, *behind[:4]), sizes, beside) or not _channels_innermost(x):
        return None
    output = (_output if torch.compiler.is_compiling() else _known_output)(shape, channels, tuple(stride))
    if beside is not None and (beside.shape != output[0] or not _channels_innermost(beside)):
        return None
    return output


def _channels_innermost(x: Tensor) -> bool:
    """Whether `x` is dense with the channels innermost."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def _output(x: Ints, channels: int, stride: Ints) -> tuple[Ints, Ints]:
    """Shape and strides of the output of a 1x1 convolution of `x` of this shape."""
    size = [-(-length // step) for length, step in zip(x[2:], stride, strict=True)]
    steps = [channels * prod(size[axis + 1 :]) for axis in range(len(size))]
    return (x[0], channels, *size), (channels * prod(size), 1, *steps)


_known_output = lru_cache(maxsize=1024)(_output)


# The ops that compilers see. They have no derivatives, and a backward pass says so.

_BEHIND = "Tensor? {0}mean, Tensor? {0}variance, Tensor? {0}scale, Tensor? {0}shift, float {0}eps, bool {0}relu"
_library = torch.library.Library("involution", "FRAGMENT")
_library.define(
    f"pointwise(Tensor x, Tensor weight, Tensor? bias, int[] stride, {_BEHIND.format('')}, Tensor? beside) -> Tensor"
)
_library.define(
    f"layer(Tensor x, Tensor source, Tensor reduce, Tensor? reduce_bias, {_BEHIND.format('features_')}, Tensor span, "
    f"Tensor? span_bias, {_BEHIND.format('')}, int[] kernel_size, {WINDOW}) -> Tensor"
)
_pointwise = torch.ops.involution.pointwise.default
_layer = torch.ops.involution.layer.default


def _allocate_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, *rest: Any) -> Tensor:
    return x.new_empty_strided(*_output(x.shape, weight.shape[0], tuple(stride)))


def _allocate_layer(x: Tensor, source: Tensor, *rest: Any) -> Tensor:
    return allocate(x, (*x.shape[:2], *source.shape[2:]))


def _define_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, *rest: Any) -> Tensor:
    """The op by torch's own."""
    *behind, beside = rest
    last = x.movedim(1, -1)[(slice(None), *(slice(None, None, step) for step in stride))]
    y = _done(F.linear(last, weight.flatten(1), bias).movedim(-1, 1), Behind(*behind), beside)
    return _allocate_pointwise(x, weight, bias, stride).copy_(y)


def _define_layer(x: Tensor, source: Tensor, reduce: Tensor, reduce_bias: Tensor | None, *rest: Any) -> Tensor:
    """The op by torch's own and the definition of involution."""
    features, (span, bias), behind, window = Behind(*rest[:6]), rest[6:8], Behind(*rest[8:14]), rest[14:]
    made = F.linear(source.movedim(1, -1), reduce.flatten(1), reduce_bias).movedim(-1, 1)
    y = _allocate_layer(x, source)
    reference.generated(y, x, _done(made, features), span.flatten(1), bias, *window)
    return y.copy_(_done(y, behind))


def _done(y: Tensor, behind: Behind, beside: Tensor | None = None) -> Tensor:
    *norm, eps, relu = behind
    mean, variance, weight, bias = norm
    if mean is not None and variance is not None:
        y = F.batch_norm(y, mean, variance, weight, bias, eps=eps)
    y = y if beside is None else y + beside
    return F.relu(y) if relu else y


def _run_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, *rest: Any) -> Tensor:
    *given, beside = *map(_dense, rest[:-1]), rest[-1]
    innermost, beside = _innermost(x), None if beside is None else _innermost(beside)
    product, behind = Product(weight.contiguous(), _dense(bias)), Behind(*given)
    output = _output_of(innermost, product, stride, behind, beside)
    if output is None:
        return _define_pointwise(x, weight, bias, stride, *rest)
    y = x.new_empty_strided(*output)
    cpu.pointwise(y, innermost, *product, stride, behind[:4], behind.eps, beside, behind.relu)
    return y


def _run_layer(x: Tensor, source: Tensor, *rest: Any) -> Tensor:
    given = [*map(_dense, rest)]
    reduce, features, span, behind = (
        Product(*given[:2]),
        Behind(*given[2:8]),
        Product(*given[8:10]),
        Behind(*given[10:16]),
    )
    parameters, taps = (*reduce, *span, *features[:4], *behind[:4]), span.weight.shape[0]
    alike = source.dtype is x.dtype and source.shape[:2] == x.shape[:2] and source.dim() == x.dim()
    if span.bias is None or not alike or not _fit(x, parameters, _sizes_of_layer(x, reduce, taps)):
        return _define_layer(x, source, *rest)
    return layer(x, source, reduce, features, span, behind, *given[16:])


def _innermost(x: Tensor) -> Tensor:
    return x if _channels_innermost(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)


def _dense(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "involution::pointwise and involution::layer have no derivatives: they are for networks that only infer. "
        "Call the layers, which use them where no derivative is asked for."
    )


for _name, _allocate, _define, _run in (
    ("pointwise", _allocate_pointwise, _define_pointwise, _run_pointwise),
    ("layer", _allocate_layer, _define_layer, _run_layer),
):
    torch.library.register_fake(f"involution::{_name}", _allocate, lib=_library)
    torch.library.register_autograd(f"involution::{_name}", _refuse, lib=_library)
    _library.impl(_name, _define, "CompositeExplicitAutograd")
    if cpu.available():
        _library.impl(_name, _run, "CPU")
