"""A convolution and what follows it: the numbers of the parts, and at once only where nobody would notice.

A 1x1 convolution of ours is done with what follows it by one call, and what follows another by one pass over memory.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.profiler import profile

from involution.nn import followed
from involution.ops import cpu
from involution.pointwise import PointwiseConv2d

_Kind = Callable[[int, int], nn.Module]
_KINDS: dict[str, _Kind] = {
    "of ours": partial(PointwiseConv2d, bias=False),
    "another": partial(nn.Conv2d, kernel_size=1, bias=False),
}
each_kind = pytest.mark.parametrize("kind", _KINDS.values(), ids=_KINDS)


class _Block(nn.Module):
    """A convolution with what follows it, and a shortcut."""

    def __init__(self, kind: _Kind, channels: int = 24) -> None:
        super().__init__()
        self.conv, self.norm, self.act = kind(8, channels), nn.BatchNorm2d(channels), nn.ReLU()
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.eval()

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        return followed(self.conv, x, self.norm, self.act, beside)

    def parts(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        y = self.norm(self.conv(x))
        if beside is not None:
            y += beside
        return self.act(y)


def _images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what was done at once during the test: a convolution alone does not count."""
    shapes: list[torch.Size] = []
    follow, pointwise = cpu.follow, cpu.pointwise

    def call(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, *behind: Any) -> None:
        norm, _, beside, relu = behind
        if norm[0] is not None or beside is not None or relu:
            shapes.append(y.shape)
        pointwise(y, x, weight, bias, stride, *behind)

    monkeypatch.setattr(cpu, "follow", lambda y, *rest: shapes.append(y.shape) or follow(y, *rest))
    monkeypatch.setattr(cpu, "pointwise", call)
    return shapes


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.usefixtures("variant")
@each_kind
@torch.no_grad()
def test_at_once_is_the_parts_in_turn(kind: _Kind, dtype: torch.dtype, beside: bool, calls: list[torch.Size]) -> None:
    torch.manual_seed(0)
    sizes = [(2, 5, 7), (1, 1, 1), (3, 1, 9), (1, 56, 56), (2, 90, 40)]
    changes: list[Callable[[_Block], object]] = [
        lambda block: None,
        lambda block: setattr(block, "act", nn.Identity()),
        lambda block: setattr(block.conv, "bias", nn.Parameter(torch.randn(block.norm.num_features))),
        lambda block: setattr(block, "norm", nn.BatchNorm2d(block.norm.num_features, affine=False).eval()),
        lambda block: setattr(block, "norm", nn.Identity()) if beside else None,
    ]
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for number, channels in enumerate((1, 3, 4, 8, 13, 16, 24, 35, 64, 130)):
        batch, *size = sizes[number % len(sizes)]
        for change in changes:
            block = _Block(kind, channels)
            change(block)
            block.to(dtype)
            x, other = _images(batch, 8, *size, dtype=dtype), _images(batch, channels, *size, dtype=dtype)
            given, kept = (other,) if beside else (), other.clone()
            expected = block.parts(x, *given)
            before = len(calls)
            if block.conv(x).stride() != other.stride():  # of an axis of size one, where torch tells them differently
                other = torch.empty_like(block.conv(x)).copy_(other)
                given = (other,) if beside else ()
            torch.testing.assert_close(block(x, *given), expected, **close)
            assert torch.equal(other, kept)
            assert calls[before:] == [expected.shape]


@each_kind
@torch.no_grad()
def test_bits_do_not_depend_on_threads(kind: _Kind, calls: list[torch.Size]) -> None:
    block, x, beside = _Block(kind), _images(2, 8, 80, 70), _images(2, 24, 80, 70)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(block(x, beside))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], again) for again in found[1:])
    torch.testing.assert_close(found[0], block.parts(x, beside), rtol=1e-5, atol=1e-5)
    assert len(calls) == 3


@each_kind
@torch.no_grad()
def test_what_is_no_number_stays_so(kind: _Kind, calls: list[torch.Size]) -> None:
    block, x, beside = _Block(kind), _images(1, 8, 6, 6), _images(1, 24, 6, 6)
    x[0, :, 1, 2], beside[0, 3, 4, 5], beside[0, 4, 4, 4] = torch.nan, torch.nan, torch.inf
    torch.testing.assert_close(block(x, beside), block.parts(x, beside), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert block(x, beside).isnan().sum() == 25
    assert calls


class _Mine(Tensor):
    pass


class _Conv(nn.Conv2d):
    pass


class _Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


def _replace_convolution(conv: nn.Conv2d) -> None:
    own = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)
    own.load_state_dict(conv.state_dict())
    if isinstance(conv, PointwiseConv2d):  # which does not come to the other
        conv.forward = own.forward  # type: ignore[method-assign]
    else:
        conv._conv_forward = own._conv_forward  # type: ignore[method-assign]


_NOTICED: dict[str, Callable[[_Block], object]] = {
    "a convolution of its own": lambda block: _replace_convolution(block.conv),
    "a forward of its own": lambda block: setattr(block.conv, "forward", block.conv.forward),
    "a subclass": lambda block: setattr(block.conv, "__class__", _Conv),
    "a parametrization": lambda block: parametrize.register_parametrization(block.norm, "weight", _Same()),
    "another norm": lambda block: setattr(block, "norm", nn.GroupNorm(2, 24)),
    "a norm without statistics": lambda block: setattr(block, "norm", nn.BatchNorm2d(24, track_running_stats=False)),
    "a norm in training": lambda block: block.norm.train(),
    "another activation": lambda block: setattr(block, "act", nn.GELU()),
    "a function for an activation": lambda block: (delattr(block, "act"), setattr(block, "act", torch.relu)),
    "a hook on the norm": lambda block: block.norm.register_forward_hook(lambda *_: None),
    "a hook on the activation": lambda block: block.act.register_forward_pre_hook(lambda *_: None),
}


@each_kind
@pytest.mark.parametrize("change", _NOTICED.values(), ids=_NOTICED)
@torch.no_grad()
def test_what_is_noticed_runs_part_by_part(
    kind: _Kind, change: Callable[[_Block], object], calls: list[torch.Size]
) -> None:
    block, x, beside = _Block(kind), _images(2, 8, 5, 4), _images(2, 24, 5, 4)
    change(block)
    torch.testing.assert_close(block(x, beside), block.parts(x, beside))
    assert not calls


@each_kind
@torch.no_grad()
def test_what_a_hook_on_the_convolution_keeps_stays_as_it_was(kind: _Kind, calls: list[torch.Size]) -> None:
    block, x, kept = _Block(kind), _images(2, 8, 5, 4), []
    expected = block.conv(x)
    block.conv.register_forward_hook(lambda *args: kept.append(args[-1]))
    block(x)
    with _GlobalHook():
        _Block(kind)(x)
    assert torch.equal(kept[0], expected)
    assert not calls


@each_kind
@pytest.mark.parametrize("register", [nn.Module.register_forward_hook, lambda _, hook: _global(hook)])
@torch.no_grad()
def test_what_a_hook_keeps_that_takes_itself_away_stays_as_it_was(
    kind: _Kind, register: Callable[..., Any], calls: list[torch.Size]
) -> None:
    block, x, kept = _Block(kind), _images(2, 8, 5, 4), []
    expected = block.conv(x)

    def once(module: nn.Module, given: object, y: Tensor) -> None:
        kept.append(y)
        handle.remove()

    handle = register(block.conv, once)
    torch.testing.assert_close(block(x), block.parts(x))
    assert torch.equal(kept[0], expected)
    assert not calls


_global = nn.modules.module.register_module_forward_hook


class _GlobalHook:
    def __enter__(self) -> None:
        self.handle = _global(lambda *_: None)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@each_kind
@pytest.mark.parametrize("around", [lambda: torch.autocast("cpu"), profile, nullcontext])
def test_surroundings_that_notice(
    kind: _Kind, around: Callable[[], AbstractContextManager[Any]], calls: list[torch.Size]
) -> None:
    block, x, beside = _Block(kind), _images(2, 8, 5, 4), _images(2, 24, 5, 4)
    derivatives = around is nullcontext
    with around(), torch.enable_grad() if derivatives else torch.no_grad():
        y = block(x, beside)
        torch.testing.assert_close(y, block.parts(x, beside))
    assert y.requires_grad == derivatives
    assert not calls


@pytest.mark.parametrize(
    "change",
    [
        lambda x, beside: (x.bfloat16(), beside.bfloat16()),
        lambda x, beside: (x.as_subclass(_Mine), beside),
        lambda x, beside: (x, beside.as_subclass(_Mine)),
        lambda x, beside: (x[:0], beside[:0]),
        lambda x, beside: (x.contiguous(), beside),
        lambda x, beside: (x.contiguous(), beside.contiguous()),
        lambda x, beside: (x, beside.contiguous()),
        lambda x, beside: (x, beside[:1]),
        lambda x, beside: (x, beside.double().requires_grad_().float()),
    ],
)
@each_kind
def test_tensors_of_other_kinds(
    kind: _Kind, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], calls: list[Any]
) -> None:
    x, beside = change(_images(2, 8, 5, 4), _images(2, 24, 5, 4))
    block = _Block(kind).requires_grad_(False).to(x.dtype)
    found, expected = block(x, beside), block.parts(x, beside)
    torch.testing.assert_close(found, expected)
    assert type(found) is type(expected)
    assert found.requires_grad == beside.requires_grad
    assert not calls


@each_kind
@torch.no_grad()
def test_a_norm_that_does_not_fit_is_refused_by_torch(kind: _Kind, calls: list[torch.Size]) -> None:
    block, x = _Block(kind), _images(2, 8, 5, 4)
    for norm in (nn.BatchNorm2d(1), nn.BatchNorm2d(48), nn.BatchNorm2d(24).double(), nn.BatchNorm1d(24)):
        block.norm = norm.eval()  # type: ignore[assignment]
        with pytest.raises((RuntimeError, ValueError)):
            block(x)
    block.norm = nn.BatchNorm2d(24).eval()
    block.norm.running_var = None
    with pytest.raises(RuntimeError):
        block(x)
    assert not calls


@each_kind
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_transforms_see_the_parts_and_compilers_an_op(kind: _Kind, calls: list[torch.Size]) -> None:
    block, x = _Block(kind), torch.randn(3, 2, 8, 5, 5)
    torch.testing.assert_close(torch.func.vmap(block)(x), torch.stack([block.parts(image) for image in x]))
    assert not calls
    compiled, images, beside = (
        torch.compile(block, backend="eager", fullgraph=True),
        _images(2, 8, 5, 5),
        _images(2, 24, 5, 5),
    )
    torch.testing.assert_close(compiled(images, beside), block.parts(images, beside), rtol=1e-5, atol=1e-5)
    assert len(calls) == (kind is _KINDS["of ours"])
    exported = torch.export.export(block, (images, beside))
    assert not any("involution" in str(node.target) for node in exported.graph.nodes)
    with torch.enable_grad():
        assert compiled(images, beside).requires_grad
    with torch.autocast("cpu"):
        assert compiled(images, beside).dtype is torch.bfloat16
    assert len(calls) == (kind is _KINDS["of ours"])


@each_kind
@torch.no_grad()
def test_weights_may_change_between_calls(kind: _Kind, calls: list[torch.Size]) -> None:
    block, x = _Block(kind), _images(1, 8, 5, 5)
    first = block(x)
    block.norm.running_mean.sub_(1)
    torch.testing.assert_close(block(x), block.parts(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first, block(x))
    assert len(calls) == 3


@each_kind
def test_nothing_is_changed_without_the_library(
    kind: _Kind, monkeypatch: pytest.MonkeyPatch, calls: list[torch.Size]
) -> None:
    monkeypatch.setattr(cpu, "_library", None)
    with torch.no_grad():
        block, x = _Block(kind), _images(1, 8, 5, 5)
        assert torch.equal(block(x), block.parts(x))
    assert not calls
