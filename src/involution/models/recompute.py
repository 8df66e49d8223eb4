"""Less memory for the backward pass: layers that are run again instead of keeping what is inside them."""

from __future__ import annotations

from contextlib import nullcontext
from threading import RLock

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint


def recomputes(x: Tensor) -> bool:
    """Whether a backward pass may come to save memory for, and torch's checkpointing works here.

    Compilers decide for themselves what to run again; traces and transforms of torch.func do without.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]  # missing in torch's stubs
        and _get_current_dispatch_mode() is None
    )


def recomputed(layers: nn.Module, x: Tensor) -> Tensor:
    """layers(x), of which only `x` is kept; the backward pass runs the layers again.

    The same numbers to the last bit, as long as weights stay what they are until the backward pass. Batch norms take
    account of a batch once, as without; torch's and timm's checkpointing lets them do so twice.
    """
    again = _Again(layers)
    y: Tensor = checkpoint(layers, x, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
    return y


class _Again:
    """Within it, layers train or not as they did before, and batch norms leave their running statistics alone.

    These hand their statistics over all the same: torch keeps them. It is entered as often as there are backward
    passes, by one thread at a time, as others may share the layers.
    """

    _one = RLock()

    def __init__(self, layers: nn.Module) -> None:
        self._modes = [(module, module.training) for module in layers.modules()]
        self._norms = [module for module, _ in self._modes if isinstance(module, _BatchNorm)]

    def __enter__(self) -> None:
        self._one.acquire()
        self._now = [module.training for module, _ in self._modes]
        self._before = [(norm.momentum, norm.num_batches_tracked) for norm in self._norms]
        for module, training in self._modes:
            module.training = training
        for norm in self._norms:
            count = norm.num_batches_tracked
            norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else count.clone()

    def __exit__(self, *exception: object) -> None:
        for (module, _), mode in zip(self._modes, self._now, strict=True):
            module.training = mode
        for norm, (momentum, count) in zip(self._norms, self._before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
        self._one.release()
