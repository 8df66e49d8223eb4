"""The ops as torch sees them: schemas, fakes, derivatives, and which implementation serves which device.

Involution is a trilinear form in (gradient g, kernel k, input x). Each op is the form's derivative in one of the three,
so the derivative of every op is again one of the ops, and double backward needs nothing new:
<g, forward(x, k)> = <x, grad_x(g, k)> = <k, grad_kernel(g, x)>.

A fourth op, `generated`, is `forward` with the kernel span(features), which it need not store. Nor need its first
derivatives, `generated_grad_x` and `grad_span`; those of higher order are taken of the same written in the other three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from involution.ops import cpu, reference
from involution.ops.transformed import transformable, transformed
from involution.ops.unwatched import recorded, unwatched

Ints = Sequence[int]

WINDOW = "int[] stride, int[] padding, int[] dilation"
_library = torch.library.Library("involution", "DEF")
_library.define(f"forward(Tensor x, Tensor kernel, {WINDOW}) -> Tensor")
_library.define(
    f"generated(Tensor x, Tensor features, Tensor weight, Tensor bias, int[] kernel_size, {WINDOW}) -> Tensor"
)
_library.define(
    "generated_grad_x(Tensor grad, Tensor features, Tensor weight, Tensor bias, SymInt[] size, int[] kernel_size, "
    f"{WINDOW}) -> Tensor"
)
_library.define(
    "grad_span(Tensor grad, Tensor x, Tensor features, Tensor weight, int[] kernel_size, "
    f"{WINDOW}) -> (Tensor, Tensor, Tensor)"
)
_library.define(f"grad_x(Tensor grad, Tensor kernel, SymInt[] size, {WINDOW}) -> Tensor")
_library.define(f"grad_kernel(Tensor grad, Tensor x, SymInt groups, SymInt[] kernel_size, {WINDOW}) -> Tensor")

forward = torch.ops.involution.forward.default
generated = torch.ops.involution.generated.default
generated_grad_x = torch.ops.involution.generated_grad_x.default
grad_span = torch.ops.involution.grad_span.default
grad_x = torch.ops.involution.grad_x.default
grad_kernel = torch.ops.involution.grad_kernel.default


def call(op: OpOverload, tensors: tuple[Tensor, ...], *settings: Any) -> Any:
    """op(*tensors, *settings), around torch's dispatcher where nothing would notice, or within a transform."""
    if unwatched(tensors):
        return call_on_cpu(op, tensors, *settings)
    return (_transformable[op] if transformed() else op)(*tensors, *settings)


def call_on_cpu(op: OpOverload, tensors: tuple[Tensor, ...], *settings: Any) -> Any:
    """op(*tensors, *settings) without torch's dispatcher, but with derivatives, for tensors that are `unwatched`."""
    return (_recorded if recorded(tensors) else _on_cpu)[op](*tensors, *settings)


def remembering(op: OpOverload, settings: tuple[Any, ...]) -> Callable[..., Any]:
    """`call_on_cpu` for tensors that differ in nothing but what they hold: types, sizes and strides are looked at once.

    For `forward` and `generated`.
    """
    prepare: Any = cpu.prepared_forward if op is forward else cpu.prepared_generated
    direct: Callable[..., Any] | None = None

    def run(*tensors: Tensor) -> Any:
        nonlocal direct
        derived = recorded(tensors)
        if direct is not None and not derived:
            return direct(*tensors)
        out = call_on_cpu(op, tensors, *settings)
        if not derived and cpu.available() and out.numel():
            direct = prepare(out, *tensors, *settings)
        return out

    return run


def implementations() -> dict[str, str]:
    """Which code serves which device type.

    Example:
        >>> implementations()["any other"]
        'reference'
    """
    gpu = "Triton" if _Triton.available() else "reference (Triton is missing: it comes with torch for CUDA and ROCm)"
    return {"cpu": cpu.description(), "cuda": gpu, "any other": "reference"}


# Allocation: real and fake tensors come from the same functions, so they cannot disagree.


def allocate(like: Tensor, shape: Ints) -> Tensor:
    """An empty tensor (B, *channels, *spatial) in the memory format of `like`, which has as many spatial axes.

    That is with all of the channels innermost if they are so in `like`, else contiguous.
    """
    if like.stride(1) != 1 or like.is_contiguous():
        return like.new_empty(shape)
    strides, step, first = [0] * len(shape), 1, len(shape) - like.dim() + 2
    for axis in (*range(first - 1, 0, -1), *range(len(shape) - 1, first - 1, -1), 0):
        strides[axis] = step
        step *= shape[axis]
    return like.new_empty_strided(shape, strides)


def _allocate_forward(x: Tensor, kernel: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
    return allocate(x, (*x.shape[:2], *kernel.shape[x.dim() :]))


def _allocate_generated(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, *window: Ints) -> Tensor:
    return allocate(x, (*x.shape[:2], *features.shape[2:]))


def _allocate_generated_grad_x(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor, size: Ints, *window: Ints
) -> Tensor:
    return allocate(grad, (*grad.shape[:2], *size))


def _allocate_grad_span(
    grad: Tensor, x: Tensor, features: Tensor, weight: Tensor, *window: Ints
) -> tuple[Tensor, Tensor, Tensor]:
    return allocate(features, features.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _allocate_grad_x(grad: Tensor, kernel: Tensor, size: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
    return allocate(grad, (*grad.shape[:2], *size))


def _allocate_grad_kernel(
    grad: Tensor, x: Tensor, groups: int, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> Tensor:
    return allocate(x, (x.shape[0], groups, *kernel_size, *grad.shape[2:]))


torch.library.register_fake("involution::forward", _allocate_forward, lib=_library)
torch.library.register_fake("involution::generated", _allocate_generated, lib=_library)
torch.library.register_fake("involution::generated_grad_x", _allocate_generated_grad_x, lib=_library)
torch.library.register_fake("involution::grad_span", _allocate_grad_span, lib=_library)
torch.library.register_fake("involution::grad_x", _allocate_grad_x, lib=_library)
torch.library.register_fake("involution::grad_kernel", _allocate_grad_kernel, lib=_library)


# Implementations: each fills a tensor allocated here.


def _register(key: str, implementation: Any) -> dict[OpOverload, Callable[..., Any]]:
    """Serve the dispatch key `key` with `implementation`: an object with the functions of `reference`.

    Returns what now serves each op.
    """

    def run_forward(x: Tensor, kernel: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
        out = _allocate_forward(x, kernel, stride, padding, dilation)
        if out.numel():
            implementation.forward(out, x, kernel, stride, padding, dilation)
        return out

    def run_generated(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, *window: Ints) -> Tensor:
        out = _allocate_generated(x, features, weight, bias)
        if out.numel():
            implementation.generated(out, x, features, weight, bias, *window)
        return out

    def run_grad_x(grad: Tensor, kernel: Tensor, size: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
        out = _allocate_grad_x(grad, kernel, size, stride, padding, dilation)
        if out.numel():
            implementation.grad_x(out, grad, kernel, stride, padding, dilation)
        return out

    def run_grad_kernel(
        grad: Tensor, x: Tensor, groups: int, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints
    ) -> Tensor:
        out = _allocate_grad_kernel(grad, x, groups, kernel_size, stride, padding, dilation)
        if out.numel():
            implementation.grad_kernel(out, grad, x, stride, padding, dilation)
        return out

    def run_generated_grad_x(
        grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor, size: Ints, *window: Ints
    ) -> Tensor:
        out = _allocate_generated_grad_x(grad, features, weight, bias, size)
        if out.numel():
            implementation.generated_grad_x(out, grad, features, weight, bias, *window)
        return out

    def run_grad_span(
        grad: Tensor, x: Tensor, features: Tensor, weight: Tensor, *window: Ints
    ) -> tuple[Tensor, Tensor, Tensor]:
        outs = _allocate_grad_span(grad, x, features, weight)
        implementation.grad_span(outs, grad, x, features, weight, *window)
        return outs

    served: dict[OpOverload, Callable[..., Any]] = {
        forward: run_forward,
        generated: run_generated,
        generated_grad_x: run_generated_grad_x,
        grad_span: run_grad_span,
        grad_x: run_grad_x,
        grad_kernel: run_grad_kernel,
    }
    for op, run in served.items():
        _library.impl(op, run, key)
    return served


class _Triton:
    """The module `involution.ops.triton`, imported when a first tensor needs it: Triton takes a second to import."""

    @staticmethod
    def available() -> bool:
        return find_spec("triton") is not None

    @cached_property
    def _module(self) -> ModuleType:
        return import_module("involution.ops.triton")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_on_cpu = _register("CompositeExplicitAutograd", reference)
if cpu.available():
    _on_cpu = _register("CPU", cpu)
if _Triton.available():
    _register("CUDA", _Triton())  # ROCm's too


# Derivatives: torch asks for those of the two tensors only, so the window arguments get None.


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, kernel, *ctx.window = inputs
    ctx.size, ctx.groups, ctx.kernel_size = x.shape[2:], kernel.shape[1], kernel.shape[2 : x.dim()]
    wants_x, wants_kernel = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if wants_kernel else None, kernel if wants_x else None)  # each for the other's gradient


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, kernel), (wants_x, wants_kernel) = ctx.saved_tensors, ctx.needs_input_grad[:2]
    if wants_x and wants_kernel and (both := _at_once(grad, x, kernel, ctx.window)):
        return *both, *(None,) * 3
    return (
        call(grad_x, (grad, kernel), ctx.size, *ctx.window) if wants_x else None,
        call(grad_kernel, (grad, x), ctx.groups, ctx.kernel_size, *ctx.window) if wants_kernel else None,
        *(None,) * 3,
    )


def _at_once(grad: Tensor, x: Tensor, kernel: Tensor, window: Sequence[Ints]) -> tuple[Tensor, Tensor] | None:
    """The gradients of x and the kernel by one call of the C++ code.

    None where that would be noticed, where they are to be derived in turn, and where one of the tensors is empty.
    """
    tensors = (grad, x, kernel)
    if not (cpu.available() and unwatched(tensors)) or recorded(tensors) or 0 in [t.numel() for t in tensors]:
        return None
    return _gradients_of(tuple(map(tuple, window)), *((t.dtype, t.shape, t.stride()) for t in tensors))(*tensors)


@lru_cache(maxsize=1024)
def _gradients_of(window: tuple[Ints, ...], *described: tuple[torch.dtype, Ints, Ints]) -> Callable[..., Any]:
    """What computes both gradients of tensors of these types, sizes and strides: they are looked at once."""
    grad, x, kernel = (torch.empty_strided(*s, dtype=dtype, device="meta") for dtype, *s in described)
    outs = (
        _allocate_grad_x(grad, kernel, x.shape[2:], *window),
        _allocate_grad_kernel(grad, x, kernel.shape[1], kernel.shape[2 : x.dim()], *window),
    )
    return cpu.prepared_gradients(outs, grad, x, kernel, *window)


def _generated_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _generated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, features, weight, bias = ctx.saved_tensors
    window, (wants_x, *wants_span) = (ctx.stride, ctx.padding, ctx.dilation), ctx.needs_input_grad[:4]
    to_x: Callable[..., Tensor] = partial(call, generated_grad_x)
    to_span: Callable[..., tuple[Tensor, Tensor, Tensor]] = partial(call, grad_span)
    if torch.is_grad_enabled():  # the derivatives are to be derived in turn
        to_x, to_span = _generated_grad_x, _grad_span
    from_x = to_x((grad, features, weight, bias), x.shape[2:], ctx.kernel_size, *window) if wants_x else None
    if not any(wants_span):
        return from_x, *(None,) * 7
    from_span = to_span((grad, x, features, weight), ctx.kernel_size, *window)
    wanted = (g if wants else None for g, wants in zip(from_span, wants_span, strict=True))
    return from_x, *wanted, *(None,) * 4


def _generated_grad_x(tensors: tuple[Tensor, ...], size: Ints, kernel_size: Ints, *window: Ints) -> Tensor:
    grad, features, weight, bias = tensors
    return call(grad_x, (grad, reference.span(features, weight, bias, kernel_size)), size, *window)


def _grad_span(tensors: tuple[Tensor, ...], kernel_size: Ints, *window: Ints) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, features, weight = tensors
    kernel = call(grad_kernel, (grad, x), weight.shape[0] // prod(kernel_size), kernel_size, *window)
    return reference.through_span(kernel, features, weight)


def _grad_x_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, kernel, _, *ctx.window = inputs
    ctx.save_for_backward(grad, kernel)


def _grad_x_backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
    (grad, kernel), (wants_grad, wants_kernel) = ctx.saved_tensors, ctx.needs_input_grad[:2]
    groups, kernel_size = kernel.shape[1], kernel.shape[2 : x.dim()]
    return (
        call(forward, (x, kernel), *ctx.window) if wants_grad else None,
        call(grad_kernel, (grad, x), groups, kernel_size, *ctx.window) if wants_kernel else None,
        *(None,) * 4,
    )


def _grad_kernel_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, _, _, *ctx.window = inputs
    ctx.save_for_backward(grad, x)


def _grad_kernel_backward(ctx: Any, kernel: Tensor) -> tuple[Tensor | None, ...]:
    (grad, x), (wants_grad, wants_x) = ctx.saved_tensors, ctx.needs_input_grad[:2]
    return (
        call(forward, (x, kernel), *ctx.window) if wants_grad else None,
        call(grad_x, (grad, kernel), x.shape[2:], *ctx.window) if wants_x else None,
        *(None,) * 5,
    )


_recorded: dict[OpOverload, Callable[..., Any]] = {}  # what `call_on_cpu` calls where derivatives are asked for
_transformable: dict[OpOverload, Callable[..., Any]] = {}  # what serves the transforms of torch.func


def _differentiate(op: OpOverload, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give `op` its derivative, both within torch's dispatcher and around it."""
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_library)

    def run(ctx: Any, *args: Any) -> Any:
        out = _on_cpu[op](*args)
        setup_context(ctx, args, out)
        return out

    methods = {"forward": staticmethod(run), "backward": staticmethod(backward)}
    _recorded[op] = type(f"{op._opname}_on_cpu", (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]


_differentiate(generated, _generated_backward, _generated_context)
for _op, _backward, _context in (
    (forward, _forward_backward, _forward_context),
    (grad_x, _grad_x_backward, _grad_x_context),
    (grad_kernel, _grad_kernel_backward, _grad_kernel_context),
):
    _differentiate(_op, _backward, _context)
    _transformable[_op] = transformable(_op, _backward, _context)
