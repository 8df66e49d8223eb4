"""What a layer does with the norm and the activation behind it, for inference: by one call of the C++ code.

On small images most of a layer's time passes between its parts: in Python, in torch's dispatcher, in starting threads.
On large ones norms and activations wait for memory, which here they need not.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from involution.generators import POINTWISE, BottleneckGenerator, pool
from involution.ops import cpu
from involution.ops.library import allocate
from involution.ops.unwatched import recorded, unwatched
from involution.pointwise import NORMS, PointwiseConv2d, is_watched

if TYPE_CHECKING:
    from involution.nn import _Involution

NOTHING = nn.Identity()
_DTYPES = (torch.float32, torch.float64)
_CONVS = (nn.Conv2d, PointwiseConv2d)


def at_once(layer: _Involution, x: Tensor, norm: nn.Module = NOTHING, act: nn.Module = NOTHING) -> Tensor | None:
    """act(norm(layer(x))) by one call, or None where it takes more than that.

    One call serves float32 and float64 on a CPU, the standard generator, batch norms in evaluation mode and ReLU, or
    none of these two; and only where no derivative is asked for and nothing watches one of the parts. Compilers see the
    parts: they do norms and activations along with others, and gain nothing from this (decision 021).

    Raises:
        ValueError: if `x` is too small for the window.
    """
    if torch.compiler.is_compiling() or layer.training or type(x) is not Tensor or not x.is_cpu:
        return None
    # What lies in a module is taken from its dictionaries: to ask for an attribute takes ten times as long.
    parts: dict[str, Any] = layer._modules
    generator, dtype, shape = parts.get("generator"), x.dtype, x.shape
    if type(generator) is not BottleneckGenerator or dtype not in _DTYPES or not layer.fused or not cpu.available():
        return None
    inner: dict[str, Any] = generator._modules
    reduce, span = _product(inner.get("reduce")), _product(inner.get("span"))
    if reduce is None or span is None or recorded((x, span[0])) or not generator.is_plain():
        return None
    replaced = "features" in generator.__dict__ or "_involve" in layer.__dict__ or "centres" in layer.__dict__
    project = parts.get("project")
    if replaced or type(project) is not nn.Identity or is_watched(project) or is_watched(layer):
        return None
    of_features = _norm(inner.get("norm"), inner.get("act"), layer.rank)
    behind = _norm(norm, act, layer.rank)
    if of_features is None or behind is None or len(shape) != layer.rank + 2 or shape[1] != layer.channels:
        return None
    channels, reduced, taps = layer.channels, reduce[0].shape[0], layer.groups * prod(layer.window.kernel_size)
    sizes = (reduced * channels, reduced, taps * reduced, taps, *(reduced,) * 4, *(channels,) * 4)
    parameters = (*reduce, *span, *of_features.tensors, *behind.tensors)
    given = [(t, size) for t, size in zip(parameters, sizes, strict=True) if t is not None]
    if not all(t.numel() == size and t.dtype is dtype and t.is_contiguous() for t, size in given):
        return None  # where sizes do not fit, the parts say so
    tensors = [x, *(t for t, _ in given)]
    if not unwatched(tensors) or recorded(tensors):
        return None
    window = layer.window
    size = window.output_size(shape[2:])
    source = pool(layer.centres(x), window.stride)
    if source.shape[2:] != size or x.numel() == 0:
        return None
    y = allocate(x, (*shape[:2], *size))
    eps, relu = (of_features.eps, behind.eps), (of_features.relu, behind.relu)
    settings = (window.kernel_size, window.stride, window.padding, window.dilation)
    cpu.layer(y, x, source, parameters, eps, relu, *settings)
    return y


def is_unseen(conv: nn.Module) -> bool:
    """Whether what `conv` gives is seen by nobody but its caller: others might keep it."""
    own = type(conv) not in _CONVS or "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__
    return not (own or conv._forward_hooks or _has_any_global_hook())


def follow(y: Tensor, norm: nn.Module, act: nn.Module, beside: Tensor | None = None) -> bool:
    """Make of `y` act(norm(y) + beside) by one pass over memory; False where that is not done.

    It is done for images in float32 and float64 on a CPU, with channels innermost, batch norms in evaluation mode and
    ReLU, or one of these two; and only where no derivative is asked for and nothing watches. Nobody else may hold `y`.
    """
    if torch.compiler.is_compiling() or type(y) is not Tensor or not y.is_cpu or y.dtype not in _DTYPES:
        return False
    if not cpu.available() or (behind := _norm(norm, act, 2)) is None:
        return False
    if behind.tensors[0] is None and beside is None:
        return False  # nothing but ReLU, if that: one pass already
    parameters = [t for t in behind.tensors if t is not None]
    tensors = [y, *parameters] if beside is None else [y, *parameters, beside]
    if not unwatched(tensors) or recorded(tensors):
        return False
    shape, dtype = y.shape, y.dtype
    if len(shape) != 4 or not y.is_contiguous(memory_format=torch.channels_last) or y.numel() == 0:
        return False
    if not all(t.numel() == shape[1] and t.dtype is dtype and t.is_contiguous() for t in parameters):
        return False  # where sizes do not fit, the norm says so
    if beside is not None and (beside.shape != shape or beside.dtype is not dtype or beside.stride() != y.stride()):
        return False
    cpu.follow(y, behind.tensors, behind.eps, beside, behind.relu)
    return True


def _product(conv: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a 1x1 convolution of ours that nobody watches; None if it is something else."""
    if type(conv) not in POINTWISE or is_watched(conv) or max(conv.stride) > 1:
        return None
    entries = conv._parameters  # from which tools may take what they put elsewhere
    weight = entries.get("weight")
    return None if weight is None or "bias" not in entries else (weight, entries["bias"])


class _Norm(NamedTuple):
    """Mean, variance, weight and bias, or None for each; what is added to the variance; whether ReLU follows."""

    tensors: tuple[Tensor | None, ...]
    eps: float
    relu: bool


def _norm(norm: Any, act: Any, rank: int) -> _Norm | None:
    """What a norm and an activation do in evaluation mode; None if it is something else."""
    relu = type(act) is nn.ReLU
    if not (relu or type(act) is nn.Identity) or is_watched(act):
        return None
    if type(norm) is nn.Identity:
        return None if is_watched(norm) else _Norm((None,) * 4, 0.0, relu)
    if type(norm) not in (NORMS[rank - 1], nn.SyncBatchNorm) or norm.training or is_watched(norm):
        return None
    entries = norm._buffers | norm._parameters
    mean, variance = entries.get("running_mean"), entries.get("running_var")
    if mean is None or variance is None or not entries.keys() >= {"weight", "bias"}:
        return None
    return _Norm((mean, variance, entries["weight"], entries["bias"]), norm.eps, relu)
