"""An involution layer for inference, with the norm and the activation behind it, by one call of the C++ code.

On small images most of a layer's time passes between its parts: in Python, in torch's dispatcher, in starting threads.
On large ones norms and activations wait for memory, which here they need not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from involution.generators import POINTWISE, BottleneckGenerator, pool
from involution.ops import cpu
from involution.ops.library import allocate
from involution.ops.unwatched import recorded, unwatched
from involution.pointwise import NORMS, is_watched

if TYPE_CHECKING:
    from involution.nn import _Involution

_NOTHING = nn.Identity()
_DTYPES = (torch.float32, torch.float64)


def at_once(layer: _Involution, x: Tensor, norm: nn.Module = _NOTHING, act: nn.Module = _NOTHING) -> Tensor | None:
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
    generator = parts.get("generator")
    if type(generator) is not BottleneckGenerator or not layer.fused or not cpu.available():
        return None
    inner: dict[str, Any] = generator._modules
    reduce, span = inner["reduce"], inner["span"]
    plain = type(parts["project"]) is nn.Identity and type(reduce) in POINTWISE and generator.is_plain()
    if not plain or any(map(is_watched, (layer, reduce, parts["project"]))):
        return None
    of_features, behind = _norm(inner["norm"], inner["act"]), _norm(norm, act)
    if of_features is None or behind is None:
        return None
    products = [part._parameters[name] for part in (reduce, span) for name in ("weight", "bias")]
    parameters = [*products, *of_features.tensors, *behind.tensors]
    tensors = [x, *(p for p in parameters if p is not None)]
    if not unwatched(tensors) or recorded(tensors):
        return None
    shape, dtype, window = x.shape, x.dtype, layer.window
    if len(shape) != layer.rank + 2 or shape[1] != layer.channels or dtype not in _DTYPES:
        return None
    if not all(t.dtype is dtype and t.is_contiguous() for t in tensors[1:]):
        return None
    size = window.output_size(shape[2:])
    source = pool(layer.centres(x), window.stride)
    if source.shape[2:] != size or x.numel() == 0:
        return None
    y = allocate(x, (*shape[:2], *size))
    eps, relu = (of_features.eps, behind.eps), (of_features.relu, behind.relu)
    settings = (window.kernel_size, window.stride, window.padding, window.dilation)
    cpu.layer(y, x, source, parameters, eps, relu, *settings)
    return y


class _Norm(NamedTuple):
    """Mean, variance, weight and bias, or None for each; what is added to the variance; whether ReLU follows."""

    tensors: tuple[Tensor | None, ...]
    eps: float
    relu: bool


def _norm(norm: Any, act: Any) -> _Norm | None:
    """What a norm and an activation do in evaluation mode; None if it is something else."""
    relu = type(act) is nn.ReLU
    if is_watched(norm) or is_watched(act) or not (relu or type(act) is nn.Identity):
        return None
    if type(norm) is nn.Identity:
        return _Norm((None,) * 4, 0.0, relu)
    if type(norm) not in NORMS or norm.training or norm._buffers["running_mean"] is None:
        return None
    statistics, affine = norm._buffers, norm._parameters
    tensors = (statistics["running_mean"], statistics["running_var"], affine["weight"], affine["bias"])
    return _Norm(tensors, norm.eps, relu)
