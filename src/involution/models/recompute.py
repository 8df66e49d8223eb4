"""Less memory for the backward pass: layers that are run again instead of keeping what is inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputes(x: Tensor) -> bool:
    """Whether a backward pass may come to save memory for. Compilers decide for themselves what to run again."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and type(x) is Tensor


def recomputed(layers: nn.Module | Callable[[Tensor], Tensor], x: Tensor, norms: list[_BatchNorm]) -> Tensor:
    """layers(x), of which only `x` is kept; the backward pass runs the layers again.

    The same numbers to the last bit. Batch norms among the layers take account of a batch once, as without; torch's and
    timm's checkpointing lets them do so twice.

    Args:
        layers: what to run; nothing in it draws random numbers.
        x: its input.
        norms: the batch norms among the layers.
    """
    y: Tensor = checkpoint(
        layers,
        x,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _without_running_statistics(norms)),
    )
    return y


@contextmanager
def _without_running_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    """Leave the running statistics of norms in training as they are; still hand them over, since torch keeps them."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
