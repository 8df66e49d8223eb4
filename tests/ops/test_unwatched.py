"""Calls that go around torch's dispatcher: only where nothing watches, with the same results, and still checked."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from involution.ops import cpu, functional, library
from involution.ops.functional import generated_involution, involution
from involution.ops.unwatched import unwatched

BOTH = "both gradients at once"
X, KERNEL = torch.randn(2, 4, 5, 5), torch.randn(2, 2, 3, 3, 5, 5)


def _call(x: Tensor = X, kernel: Tensor = KERNEL) -> Tensor:
    return involution(x, kernel, padding=1)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The ops that go around the dispatcher during the test, in order; nothing is known of earlier calls."""
    calls: list[object] = []
    original = library.call_on_cpu
    monkeypatch.setattr(functional, "_passed", {})
    monkeypatch.setattr(library, "call_on_cpu", lambda op, *args: calls.append(op) or original(op, *args))
    monkeypatch.setattr(library, "_gradients_of", lru_cache(library._gradients_of.__wrapped__))
    prepared = {"forward": library.forward, "generated": library.generated, "gradients": BOTH}
    for name, op in prepared.items():
        monkeypatch.setattr(cpu, f"prepared_{name}", _logged(getattr(cpu, f"prepared_{name}"), op, calls))
    return calls


def _logged(prepare: Callable[..., Callable[..., Tensor]], op: object, calls: list[object]) -> Callable[..., Any]:
    def logged(*args: Any) -> Callable[..., Tensor]:
        run = prepare(*args)
        return lambda *tensors: calls.append(op) or run(*tensors)

    return logged


def test_the_second_call_is_direct_and_equal(direct: list[object]) -> None:
    first = _call()
    assert not direct
    assert torch.equal(_call(), first)
    assert direct == [library.forward]


def test_the_second_call_of_a_layer_is_direct_and_equal(direct: list[object]) -> None:
    span = torch.randn(2, 3, 5, 5), nn.Parameter(torch.randn(18, 3)), nn.Parameter(torch.randn(18))
    first, second = (generated_involution(X, *(t.detach() for t in span), 3, padding=1) for _ in range(2))
    assert direct == [library.generated]
    with torch.no_grad():
        third = generated_involution(X, *span, 3, padding=1)
    assert direct == [library.generated] * 2
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_other_strides_are_not_mistaken_for_earlier_ones(dtype: torch.dtype, direct: list[object]) -> None:
    x, kernel, features = X.to(dtype), KERNEL.to(dtype), torch.randn(2, 3, 5, 5).to(dtype)
    weight, bias = torch.randn(18, 3).to(dtype), torch.randn(18).to(dtype)
    innermost = KERNEL.to(dtype).permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    wide = weight.repeat_interleave(2, 1)[:, ::2]
    given, generated = involution(x, kernel, padding=1), generated_involution(x, features, weight, bias, 3, 1, 1)
    for image in (x, x.to(memory_format=torch.channels_last), x.repeat_interleave(2, 3)[..., ::2]):
        for k, w in ((kernel, weight), (innermost, wide)):
            direct.clear()
            for _ in range(2):
                again, made = involution(image, k, padding=1), generated_involution(image, features, w, bias, 3, 1, 1)
                torch.testing.assert_close(again, given)
                torch.testing.assert_close(made, generated)
                assert again.stride() == made.stride() == library.forward(image, k, (1, 1), (1, 1), (1, 1)).stride()
            assert {library.forward, library.generated} <= set(direct)


def _leaves() -> tuple[Tensor, Tensor]:
    return X.double().requires_grad_(), KERNEL.double().requires_grad_()


def test_a_second_step_of_training_is_direct_and_equal(direct: list[object]) -> None:
    x, kernel = _leaves()
    first = _call(x, kernel)
    expected = torch.autograd.grad(library.forward(x, kernel, (1, 1), (1, 1), (1, 1)).sum(), (x, kernel))
    direct.clear()
    second = _call(x, kernel)
    found = torch.autograd.grad(second.sum(), (x, kernel))
    assert direct == [library.forward, *([BOTH] if cpu.available() else [library.grad_x, library.grad_kernel])]
    assert torch.equal(first, second)
    assert all(map(torch.equal, found, expected))


def test_only_wanted_gradients_are_taken(direct: list[object]) -> None:
    x, kernel = _leaves()
    for leaves, op in (((x, kernel.detach()), library.grad_x), ((x.detach(), kernel), library.grad_kernel)):
        _call(*leaves)
        y = _call(*leaves)
        direct.clear()
        y.sum().backward()
        assert direct == [op]


def test_derivatives_of_derivatives_are_direct_and_right(direct: list[object]) -> None:
    x, kernel = _leaves()
    _call(x, kernel)
    assert torch.autograd.gradgradcheck(_call, (x, kernel), fast_mode=True)
    assert {library.forward, library.grad_x, library.grad_kernel} <= set(direct)
    span = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5, 5), (18, 3), (18,))]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *args: generated_involution(*args, 3, padding=1), (x, *span), fast_mode=True)
    assert {library.generated, library.generated_grad_x, library.grad_span} <= set(direct)


def test_batches_of_gradients_are_watched(direct: list[object]) -> None:
    x, kernel = _leaves()
    _call(x, kernel)
    y = _call(x, kernel)
    direct.clear()
    grads = torch.randn(3, *y.shape, dtype=torch.float64)
    batched = torch.autograd.grad(y, (x, kernel), grads, is_grads_batched=True, retain_graph=True)
    assert not direct
    for i, grad in enumerate(grads):
        single = torch.autograd.grad(y, (x, kernel), grad, retain_graph=True)
        for found, expected in zip(batched, single, strict=True):
            torch.testing.assert_close(found[i], expected)


def test_modes_see_the_backward_pass_of_a_direct_call(direct: list[object]) -> None:
    x, kernel = _leaves()
    _call(x, kernel)
    y = _call(x, kernel)
    direct.clear()
    with _Log() as log:
        y.sum().backward()
    assert {library.grad_x, library.grad_kernel} <= set(log.seen)
    assert not direct


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **kwargs or {})


def test_modes_see_every_call(direct: list[object]) -> None:
    _call()
    with _Log() as log:
        _call()
    assert library.forward in log.seen
    assert not direct


class _Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **kwargs or {})


def test_modes_of_functions_see_every_call(direct: list[object]) -> None:
    _call()
    with _Functions() as functions:
        _call()
    assert library.forward in functions.seen
    assert not direct


def test_profilers_see_every_call(direct: list[object]) -> None:
    _call()
    with torch.autograd.profiler.profile() as profile:
        _call()
    assert "involution::forward" in {event.name for event in profile.function_events}
    assert not direct


def test_traces_hold_every_call(direct: list[object]) -> None:
    _call()
    traced = make_fx(lambda x, kernel: _call(x, kernel))(X, KERNEL)
    assert library.forward in {node.target for node in traced.graph.nodes}
    assert not direct


def _dual() -> Tensor:
    return forward_ad.make_dual(X, X)


_WATCHED: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], Tensor]]] = {
    "tangent": (forward_ad.dual_level, _dual),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), lambda: X),
    "lazy negation": (nullcontext, lambda: torch.complex(X, X).conj().imag),
    "other device": (nullcontext, lambda: X.to("meta")),
    "sparse": (nullcontext, lambda: X.to_sparse()),
    "subclass": (nullcontext, lambda: X.as_subclass(type("Mine", (Tensor,), {}))),
    "no tensor": (nullcontext, lambda: X.numpy()),
}


# torch scripts its own forward-mode formulas, with its own deprecated compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(("context", "make"), _WATCHED.values(), ids=_WATCHED)
def test_what_is_watched(
    context: Callable[[], AbstractContextManager[Any]], make: Callable[[], Tensor], direct: list[object]
) -> None:
    _call()
    with context():
        x = make()
        assert not unwatched((x,))
        if isinstance(x, Tensor) and x.device.type == "cpu" and x.layout is torch.strided:
            expected = library.forward(x.detach() + 0, KERNEL, (1, 1), (1, 1), (1, 1))
            torch.testing.assert_close(_call(x).float(), expected, rtol=0.02, atol=0.2)
        else:
            with pytest.raises((TypeError, ValueError), match="`x`"):
                _call(x)
    assert not direct


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_what_is_not_watched(context: Callable[[], AbstractContextManager[Any]]) -> None:
    with context():
        assert unwatched((torch.zeros(2), torch.ones(1, 2).T, nn.Parameter(X).detach()))


def test_inference_mode_records_nothing_whatever_is_enabled(direct: list[object]) -> None:
    x, kernel = _leaves()
    for _ in range(2):
        with torch.inference_mode(), torch.enable_grad():
            for image in (x, x * 1):
                assert not _call(image, kernel).requires_grad
    assert direct == [library.forward] * 3  # all but the first


def test_vmap_is_watched() -> None:
    seen: list[bool] = []
    torch.func.vmap(lambda x: seen.append(unwatched((x,))) or x)(X)
    assert seen == [False]


@pytest.mark.parametrize("bad", [1.0, (1.0, 1.0), ([1], 1), "1", True])
def test_settings_equal_to_good_ones_are_checked(bad: Any) -> None:
    involution(X, KERNEL, 1, 1)
    involution(X, KERNEL, (1, 1), 1)
    if bad is True:  # an int to Python, and to us
        assert torch.equal(involution(X, KERNEL, bad, 1), involution(X, KERNEL, 1, 1))
        return
    with pytest.raises(TypeError, match="`stride` must be"):
        involution(X, KERNEL, bad, 1)


def test_other_tensors_are_checked_after_good_ones() -> None:
    _call()
    with pytest.raises(ValueError, match="`kernel` must end in the output size"):
        _call(X, KERNEL[..., :4])
    with pytest.raises(TypeError, match="must share a dtype"):
        _call(X.double())


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: dict[object, Any] = {}
    monkeypatch.setattr(functional, "_passed", passed)
    monkeypatch.setattr(functional, "_MOST_PASSED", 3)
    for side in range(3, 10):
        _call(torch.zeros(1, 2, side, 3), torch.zeros(1, 1, 3, 3, side, 3))
        assert 1 <= len(passed) <= 3
