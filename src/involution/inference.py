"""What a layer does with the norm and the activation behind it, for inference: which parts one call may do at once.

On small images most of a layer's time passes between its parts: in Python, in torch's dispatcher, in starting threads.
On large ones norms and activations wait for memory, which here they need not.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from involution.generators import POINTWISE, BottleneckGenerator, pool
from involution.ops import inferred
from involution.ops.unwatched import recorded
from involution.pointwise import NORMS, PointwiseConv2d, is_watched

if TYPE_CHECKING:
    from involution.nn import _Involution

NOTHING = nn.Identity()
_CONVS = (nn.Conv2d, PointwiseConv2d)


def at_once(layer: _Involution, x: Tensor, norm: nn.Module = NOTHING, act: nn.Module = NOTHING) -> Tensor | None:
    """act(norm(layer(x))) by one call or op, or None where it takes more than that.

    That serves the standard generator, batch norms in evaluation mode and ReLU, or none of these two, where nothing
    watches one of the parts, and what `involution.ops.inferred` serves.

    Raises:
        ValueError: if `x` is too small for the window.
    """
    if layer.training or type(x) is not Tensor or not x.is_cpu:
        return None
    # What lies in a module is taken from its dictionaries: to ask for an attribute takes ten times as long.
    parts: dict[str, Any] = layer._modules
    generator, shape = parts.get("generator"), x.shape
    if type(generator) is not BottleneckGenerator or not layer.fused:
        return None
    inner: dict[str, Any] = generator._modules
    reduce, span = _product(inner.get("reduce")), _product(inner.get("span"))
    if reduce is None or span is None or recorded((x, span.weight)) or not generator.is_plain():
        return None
    if max(*inner["reduce"].stride, *inner["span"].stride) > 1:
        return None
    replaced = "features" in generator.__dict__ or "_involve" in layer.__dict__ or "centres" in layer.__dict__
    project = parts.get("project")
    if replaced or type(project) is not nn.Identity or is_watched(project) or is_watched(layer):
        return None
    features, behind = _behind(inner.get("norm"), inner.get("act"), layer.rank), _behind(norm, act, layer.rank)
    if features is None or behind is None or len(shape) != layer.rank + 2 or shape[1] != layer.channels:
        return None
    window = layer.window
    taps = layer.groups * prod(window.kernel_size)
    if not inferred.fits_layer(x, reduce, features, span, behind, taps):
        return None
    size = window.output_size(shape[2:])
    source = pool(layer.centres(x), window.stride)
    if source.shape[2:] != size:
        return None
    settings = (window.kernel_size, window.stride, window.padding, window.dilation)
    return inferred.layer(x, source, reduce, features, span, behind, *settings)


def convolved(
    conv: nn.Module, x: Tensor, norm: nn.Module = NOTHING, act: nn.Module = NOTHING, beside: Tensor | None = None
) -> Tensor | None:
    """act(norm(conv(x)) + beside) by one call or op, or None where it takes more than that.

    That serves 1x1 convolutions of ours, with what follows them as in `at_once`.
    """
    product = _product(conv)
    if product is None or type(x) is not Tensor or _has_any_global_hook():
        return None
    stride: Any = conv.stride
    behind = _behind(norm, act, len(stride))
    return None if behind is None else inferred.pointwise(x, product, stride, behind, beside)


def is_unseen(conv: nn.Module) -> bool:
    """Whether what `conv` gives is seen by nobody but its caller: others might keep it."""
    own = type(conv) not in _CONVS or "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__
    return not (own or conv._forward_hooks or _has_any_global_hook())


def follow(y: Tensor, norm: nn.Module, act: nn.Module, beside: Tensor | None = None) -> bool:
    """Make of `y` act(norm(y) + beside) by one pass over memory; False where that is not done.

    It is done for batch norms in evaluation mode and ReLU, or one of these two, where nothing watches. Nobody else may
    hold `y`.
    """
    behind = None if type(y) is not Tensor else _behind(norm, act, 2)
    if behind is None or (behind.mean is None and beside is None):
        return False  # nothing but ReLU, if that: one pass already
    return inferred.follow(y, behind, beside)


def _product(conv: Any) -> inferred.Product | None:
    """A 1x1 convolution of ours that nobody watches; None if it is something else."""
    if type(conv) not in POINTWISE or is_watched(conv):
        return None
    entries = conv._parameters  # from which tools may take what they put elsewhere
    weight = entries.get("weight")
    return None if weight is None or "bias" not in entries else inferred.Product(weight, entries["bias"])


def _behind(norm: Any, act: Any, rank: int) -> inferred.Behind | None:
    """What a norm and an activation do in evaluation mode; None if it is something else."""
    relu = type(act) is nn.ReLU
    if not (relu or type(act) is nn.Identity) or is_watched(act):
        return None
    if type(norm) is nn.Identity:
        return None if is_watched(norm) else inferred.Behind(relu=relu)
    if type(norm) not in (NORMS[rank - 1], nn.SyncBatchNorm) or norm.training or is_watched(norm):
        return None
    entries = norm._buffers | norm._parameters
    mean, variance = entries.get("running_mean"), entries.get("running_var")
    if mean is None or variance is None or not entries.keys() >= {"weight", "bias"}:
        return None
    return inferred.Behind(mean, variance, entries["weight"], entries["bias"], norm.eps, relu)
