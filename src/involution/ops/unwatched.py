"""What torch is about to do with an op, and whether that may go around its dispatcher, whose turns take their time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn
from torch._C import _dispatch_keys as _tensor_keys
from torch._C import _dispatch_tls_is_dispatch_key_excluded as _excluded
from torch._C import _dispatch_tls_local_include_set as _mode_keys
from torch._C import _len_torch_function_stack as _function_modes
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad

_PLAIN = frozenset((Tensor, nn.Parameter))  # subclasses may have a dispatch of their own


# Asked once, as compiled code cannot ask in torch 2.11; of the other types of devices torch may refuse to answer.
_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")))


def _bits(*keys: str) -> int:
    sets = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in keys)
    return int(reduce(or_, sets).raw_repr())


# The keys of a dense CPU tensor without lazy negation, batching, functionalisation or other wrapping; the second of
# each pair is what `torch.inference_mode` makes of it.
_DENSE = frozenset((_bits("CPU", "AutogradCPU", "ADInplaceOrView", "AutocastCPU"), _bits("CPU", "AutocastCPU")))
# What torch adds to them where no mode (of counting, faking, tracing) and no transform of torch.func is active.
_ALONE = frozenset((_bits("BackendSelect", "ADInplaceOrView"), _bits("BackendSelect")))


def unwatched(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing would notice how an op on `tensors` is called.

    They are dense and on a CPU, and no mode, transform, autocast, compiler or profiler is on.
    """
    if torch.compiler.is_compiling() or _profiler_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if _mode_keys().raw_repr() not in _ALONE or _function_modes() or forward_ad._current_level >= 0:
        return False
    return _PLAIN.issuperset(map(type, tensors)) and _DENSE.issuperset([_tensor_keys(t).raw_repr() for t in tensors])


def autocast_enabled(device: str) -> bool:
    """Whether tensors on this type of device are cast by `torch.autocast` now; never on one that it does not know."""
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def recorded(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd would record an op on `tensors`: not within `torch.inference_mode`, whatever else is enabled.

    Compilers cannot ask for that mode; for them it disables derivatives.
    """
    if not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling() and _excluded(torch._C.DispatchKey.AutogradFunctionality):
        return False
    return any(t.requires_grad for t in tensors)
