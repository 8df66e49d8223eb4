"""An involution layer for inference, with the norm and the activation behind it, by one call of the C++ code.

On small images most of a layer's time passes between its parts: in Python, in torch's dispatcher, in starting threads.
On large ones norms and activations wait for memory, which here they need not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    none of these two; and only where no derivative is asked for and nothing watches one of the parts.

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
    if not plain or is_watched(layer) or is_watched(reduce):
        return None
    features_norm, norm_behind = _norm(inner["norm"], inner["act"]), _norm(norm, act)
    if features_norm is None or norm_behind is None:
        return None
    products: Any = [(part._parameters["weight"], part._parameters["bias"]) for part in (reduce, span)]
    parameters = [*products[0], *products[1], *features_norm[:4], *norm_behind[:4]]
    tensors = (x, *(p for p in parameters if p is not None))
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
    out = allocate(x, (*shape[:2], *size))
    settings = (window.kernel_size, window.stride, window.padding, window.dilation)
    cpu.layer(out, x, source, products[0], (features_norm, norm_behind), products[1], *settings)
    return out


def _norm(norm: Any, act: Any) -> cpu.Norm | None:
    """What a norm and an activation do in evaluation mode; None if it is something else."""
    relu = type(act) is nn.ReLU
    if is_watched(norm) or is_watched(act) or not (relu or type(act) is nn.Identity):
        return None
    if type(norm) is nn.Identity:
        return cpu.Norm(relu=relu)
    if type(norm) not in NORMS or norm.training:
        return None
    statistics, affine = norm._buffers, norm._parameters
    mean, variance = statistics["running_mean"], statistics["running_var"]
    return None if mean is None else cpu.Norm(mean, variance, affine["weight"], affine["bias"], norm.eps, relu)
