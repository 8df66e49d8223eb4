"""Ops for forward-mode differentiation and the transforms of torch.func, which do not know those of torch.library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._ops import OpOverload
from torch.autograd import Function, forward_ad


def transformed() -> bool:
    """Whether a level of forward-mode differentiation or a transform of torch.func is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def transformable(
    op: OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Tensor]:
    """`op`, which is linear in each of its two tensors, in a form that may be transformed; settings follow the tensors.

    `backward` and `setup_context` are what the op has in torch.library. Transforms may be nested in any order, as long
    as `backward` calls ops of such a form, too; but torch 2.14 loses tangents of functions where two levels of forward
    mode are, and makes them zero.
    """

    class Transformable(Function):
        @staticmethod
        def forward(a: Tensor, b: Tensor, *settings: Any) -> Any:
            return op(a, b, *settings)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            setup_context(ctx, inputs, output)
            a, b, *ctx.settings = inputs
            ctx.save_for_forward(a, b)

        @staticmethod
        def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, *_: None) -> Any:
            a, b = ctx.saved_tensors
            parts = [call(da, b, *ctx.settings)] if da is not None else []
            parts += [call(a, db, *ctx.settings)] if db is not None else []
            return sum(parts[1:], parts[0])

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], a: Tensor, b: Tensor, *settings: Any) -> tuple[Tensor, int]:
            size = info.batch_size
            a, b = (
                t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0)
                for t, axis in zip((a, b), in_dims[:2], strict=True)
            )
            out = call(a.flatten(0, 1), b.flatten(0, 1), *settings)  # another batch is more of the same
            return out.unflatten(0, (size, a.shape[1])), 0

    Transformable.backward = staticmethod(backward)  # type: ignore[method-assign]

    def call(a: Tensor, b: Tensor, *settings: Any) -> Tensor:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # compilers know no such functions, and leave the transform to Python then
        if [level.key() for level in get_interpreter_stack() or ()].count(TransformType.Jvp) > 1:
            raise NotImplementedError(
                "forward-mode derivatives of forward-mode derivatives of involution are not served. Take one of them "
                "in reverse mode: torch.func.hessian, or jacrev or grad in place of one jacfwd or jvp."
            )
        out: Tensor = Transformable.apply(a, b, *settings)
        return out

    return call
