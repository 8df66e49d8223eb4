"""A layer and what follows it by one call: the numbers of its parts, and only where nobody would notice."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.profiler import profile

from involution import Involution1d, Involution2d, Involution3d, inference
from involution.nn import followed
from involution.ops import cpu, reference
from involution.pointwise import PointwiseConv2d

from ..cases import CASES, LAYOUTS, Case

_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _drawn(module: nn.Module) -> nn.Module:
    """`module` in evaluation, its norms and biases neither zeros nor ones."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
        for name, parameter in part.named_parameters(recurse=False):
            if name == "bias" or isinstance(part, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(parameter)
    return module.eval()


def _layer(case: Case, **settings: Any) -> Any:
    w, channels = case.window, case.groups * case.group_channels
    rank = len(case.size)
    kinds = (Involution1d, Involution2d, Involution3d)
    given = {"groups": case.groups, "reduction": 2 if channels % 2 == 0 else 1} | settings
    return kinds[rank - 1](channels, w.kernel_size, w.stride, w.padding, w.dilation, **given)


def _expected(layer: Any, x: Tensor, *behind: nn.Module) -> Tensor:
    """The layer by the definition of the operator, and then what is behind it."""
    kernel = layer.generator(layer.centres(x))
    window = layer.window
    y = x.new_empty((*x.shape[:2], *window.output_size(x.shape[2:])))
    reference.forward(y, x, kernel, window.stride, window.padding, window.dilation)
    for module in behind:
        y = module(y)
    return y


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the outputs that one call filled during the test."""
    shapes: list[torch.Size] = []
    original = cpu.layer

    def layer(out: Tensor, *rest: Any) -> None:
        shapes.append(out.shape)
        original(out, *rest)

    monkeypatch.setattr(cpu, "layer", layer)
    return shapes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.usefixtures("variant")
@torch.no_grad()
def test_one_call_is_the_parts_in_turn(dtype: torch.dtype, layout: str, calls: list[torch.Size]) -> None:
    torch.manual_seed(0)
    for number, case in enumerate(CASES):
        norm: Any = (None, lambda _: nn.Identity())[number % 5 == 4]
        act = (nn.ReLU, nn.Identity)[number % 3 == 2]
        layer = _drawn(_layer(case, norm=norm, act=act)).double()
        if number % 3 == 0:
            layer.generator.fuse()  # a bias in place of the norm
        rank, channels = len(case.size), layer.channels
        affine, plain = _drawn(_NORMS[rank - 1](channels)), _drawn(_NORMS[rank - 1](channels, affine=False))
        behind = [(affine, plain, nn.Identity())[number % 3].double(), (nn.ReLU, nn.Identity)[number // 3 % 2]()]
        x = LAYOUTS[layout][0](case.tensors(torch.float64)[0], rank)
        alone, with_both = _expected(layer, x), _expected(layer, x, *behind)
        layer, x = layer.to(dtype), LAYOUTS[layout][0](x.to(dtype), rank)
        behind = [module.to(dtype) for module in behind]
        close = {"rtol": 1e-10, "atol": 1e-10} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
        before = len(calls)
        torch.testing.assert_close(layer(x).double(), alone, **close, msg=lambda text, c=case: f"{c}: {text}")
        got = followed(layer, x, *behind)
        torch.testing.assert_close(got.double(), with_both, **close, msg=lambda text, c=case: f"{c}: {text}")
        assert got.stride() == layer._involve(x).stride(), case
        assert len(calls) - before == (2 if x.numel() else 0), case


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows apart"])
@torch.no_grad()
def test_features_of_many_blocks(layout: str, calls: list[torch.Size]) -> None:
    """Blocks of all pixels, of those of an image, and of those of a row."""
    layer, wide = _drawn(Involution2d(32, 3)).double(), torch.randn(2, 32, 9, 300, dtype=torch.float64)
    x = {"contiguous": wide[..., :150].contiguous(), "rows apart": wide[..., :150]}.get(layout)
    x = wide[..., :150].contiguous(memory_format=torch.channels_last) if x is None else x
    torch.testing.assert_close(layer(x), _expected(layer, x), rtol=1e-10, atol=1e-10)
    assert len(calls) == 1


@pytest.mark.parametrize("size", [1, 2, 7, 14, 56])
@torch.no_grad()
def test_bits_do_not_depend_on_threads(size: int, calls: list[torch.Size]) -> None:
    layer, norm = _drawn(Involution2d(64)), _drawn(nn.BatchNorm2d(64))
    layer.generator.fuse()
    x, before, found = torch.randn(1, 64, size, size), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(followed(layer, x, norm, nn.ReLU()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], y) for y in found[1:])
    torch.testing.assert_close(found[0], nn.ReLU()(norm(_expected(layer, x))), rtol=1e-4, atol=1e-4)
    assert len(calls) == 3


@torch.no_grad()
def test_what_is_no_number_stays_so(calls: list[torch.Size]) -> None:
    """ReLU of NaN is NaN, behind the layer and within its generator; one in x spoils its window and its own kernel."""
    layer, norm = _drawn(Involution2d(32, 3)), _drawn(nn.BatchNorm2d(32))
    x = torch.randn(1, 32, 9, 9)
    x[0, 5, 4, 4] = torch.nan
    y = followed(layer, x, norm, nn.ReLU())
    assert y[0, :, 4, 4].isnan().all()
    assert y[0, :16, 3:6, 3:6].isnan().sum() == 16 + 8
    assert y.isnan().sum() == 32 + 8
    assert calls


class _Mine(torch.Tensor):
    pass


def _hooked(path: str) -> Callable[[nn.Module], object]:
    return lambda net: net.get_submodule(path).register_forward_hook(lambda *_: None)


def _replaced(path: str, module: nn.Module) -> Callable[[nn.Module], object]:
    parent, _, name = path.rpartition(".")
    return lambda net: setattr(net.get_submodule(parent), name, module)


class _Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


class _Net(nn.Module):
    """A layer with a norm and an activation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.act = Involution2d(32, 3, norm=nn.BatchNorm2d), nn.BatchNorm2d(32), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return followed(self.layer, x, self.norm, self.act)


_PARTS = ("project", "generator", "generator.reduce", "generator.norm", "generator.act", "generator.span")
_NOTICED: dict[str, Callable[[Any], object]] = {
    **{f"a hook on {path}": _hooked(f"layer.{path}") for path in _PARTS},
    "a forward of its own": lambda net: setattr(
        net.layer.generator.reduce, "forward", net.layer.generator.reduce.forward
    ),
    "a parametrization": lambda net: parametrize.register_parametrization(
        net.layer.generator.reduce, "weight", _Same()
    ),
    "kernels stored": lambda net: setattr(net.layer, "fused", False),
    "another norm": _replaced("layer.generator.norm", nn.GroupNorm(2, 8)),
    "a norm without statistics": _replaced("layer.generator.norm", nn.BatchNorm2d(8, track_running_stats=False).eval()),
    "a norm in training": lambda net: net.layer.generator.norm.train(),
    "another activation": _replaced("layer.generator.act", nn.GELU()),
    "a generator of one product": lambda net: setattr(
        net, "layer", Involution2d(32, 3, generator="linear").to(net.norm.weight).eval()
    ),
    "another width": lambda net: setattr(net.layer, "project", nn.Conv2d(32, 32, 1)),
    "a half of it in float64": lambda net: net.layer.generator.norm.double(),
}
_NOTICED_BEHIND: dict[str, Callable[[Any], object]] = {
    "a hook on the layer": _hooked("layer"),
    "a hook on the norm": _hooked("norm"),
    "a hook on the activation": _hooked("act"),
    "the norm in training": lambda net: net.norm.train(),
    "another activation behind": _replaced("act", nn.GELU()),
    "another norm behind": _replaced("norm", nn.GroupNorm(4, 32)),
}


class _Twice(Involution2d):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 2 * super().forward(x)
        return y


def _as_twice(net: _Net) -> None:
    net.layer.__class__ = _Twice


def _weight_put_elsewhere(net: _Net) -> None:
    span = net.layer.generator.span
    weight = span.weight.detach().clone()
    del span.weight
    span.weight = weight


_UNUSUAL: dict[str, Callable[[Any], object]] = {
    "a subclass": _as_twice,
    "a method of its own": lambda net: setattr(net.layer, "_involve", lambda x: 3 * x),
    "features of its own": lambda net: setattr(net.layer.generator, "features", lambda x: x[:, :8] ** 2),
    "a weight that is no parameter": _weight_put_elsewhere,
    "a function for an activation": lambda net: (
        delattr(net.layer.generator, "act"),
        setattr(net.layer.generator, "act", torch.relu),
    ),
    "a function behind it": lambda net: (delattr(net, "act"), setattr(net, "act", torch.relu)),
}
_MISFITS: dict[str, Callable[[Any], object]] = {
    "a norm of one channel behind": _replaced("norm", nn.BatchNorm2d(1).eval()),
    "a norm of fewer channels behind": _replaced("norm", nn.BatchNorm2d(8).eval()),
    "a norm of fewer channels": _replaced("layer.generator.norm", nn.BatchNorm2d(4).eval()),
    "a norm of another rank": _replaced("layer.generator.norm", nn.BatchNorm1d(8).eval()),
    "a reduce from more channels": _replaced("layer.generator.reduce", PointwiseConv2d(64, 8)),
    "a reduce from fewer channels": _replaced("layer.generator.reduce", PointwiseConv2d(16, 8)),
    "a reduce that strides": _replaced("layer.generator.reduce", PointwiseConv2d(32, 8, stride=2)),
    "a span from fewer features": _replaced("layer.generator.span", PointwiseConv2d(4, 18)),
    "a span to more groups": _replaced("layer.generator.span", PointwiseConv2d(8, 45)),
    "a span to part of a group": _replaced("layer.generator.span", PointwiseConv2d(8, 20)),
    "a span to part of a window": _replaced("layer.generator.span", PointwiseConv2d(8, 5)),
    "a short bias": lambda net: setattr(net.layer.generator.span, "bias", nn.Parameter(torch.zeros(1))),
}


@pytest.mark.parametrize("change", _UNUSUAL.values(), ids=_UNUSUAL)
@torch.no_grad()
def test_the_unusual_is_what_it_is_part_by_part(change: Callable[[Any], object]) -> None:
    net, x = _net(), torch.randn(2, 32, 7, 6)
    change(net)
    parts = Involution2d._involve(net.layer, x) if "_involve" not in net.layer.__dict__ else net.layer._involve(x)
    expected = net.act(net.norm(2 * parts if type(net.layer) is _Twice else parts))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", _MISFITS.values(), ids=_MISFITS)
@torch.no_grad()
def test_sizes_that_do_not_fit_are_refused_by_the_parts(
    change: Callable[[Any], object], calls: list[torch.Size]
) -> None:
    net, x = _net(), torch.randn(2, 32, 7, 6)
    change(net)
    with pytest.raises((RuntimeError, ValueError)):
        net(x)
    behind = net.norm.num_features != 32
    assert len(calls) == behind  # the layer alone is as it should be


def _net() -> _Net:
    torch.manual_seed(0)
    return _drawn(_Net())  # type: ignore[return-value]


@pytest.mark.parametrize("change", _NOTICED.values(), ids=_NOTICED)
@torch.no_grad()
def test_parts_that_are_noticed_run_one_by_one(change: Callable[[Any], object], calls: list[torch.Size]) -> None:
    net, x = _net(), torch.randn(2, 32, 7, 6)
    change(net)
    if net.layer.generator.state_dict().get("norm.weight", x).dtype is torch.float64:
        with pytest.raises(RuntimeError):  # torch's own norm does not mix them either
            net(x)
    else:
        net(x)
    assert not calls


@pytest.mark.parametrize("change", _NOTICED_BEHIND.values(), ids=_NOTICED_BEHIND)
@torch.no_grad()
def test_what_is_noticed_behind_a_layer_runs_alone(change: Callable[[Any], object], calls: list[torch.Size]) -> None:
    net, x = _net(), torch.randn(2, 32, 7, 6)
    change(net)
    watched_layer = bool(net.layer._forward_hooks)
    expected = net.act(net.norm(net.layer._involve(x)))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == (0 if watched_layer else 1)  # the layer alone


@torch.no_grad()
def test_hooks_see_what_they_always_saw() -> None:
    net, seen, x = _net(), [], torch.randn(1, 32, 5, 5)
    for module in net.modules():
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    net(x)
    names = ["PointwiseConv2d", "BatchNorm2d", "ReLU", "PointwiseConv2d", "BottleneckGenerator", "Identity"]
    assert seen == [*names, "Involution2d", "BatchNorm2d", "ReLU", "_Net"]


_SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu"),
    "profiler": profile,
    "a hook on all modules": lambda: _GlobalHook(),
    "derivatives": nullcontext,
}


class _GlobalHook:
    def __enter__(self) -> None:
        self.handle = nn.modules.module.register_module_forward_hook(lambda *_: None)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("surroundings", _SURROUNDINGS.values(), ids=_SURROUNDINGS)
def test_surroundings_that_notice(surroundings: Callable[[], Any], calls: list[torch.Size]) -> None:
    net, x = _net(), torch.randn(2, 32, 7, 6)
    derivatives = surroundings is nullcontext
    with surroundings(), torch.enable_grad() if derivatives else torch.no_grad():
        y = net(x)
    assert not calls
    assert y.requires_grad == derivatives


@pytest.mark.parametrize("change", [lambda x: x.bfloat16(), lambda x: x.as_subclass(_Mine), lambda x: x[:0]])
@torch.no_grad()
def test_images_of_other_kinds(change: Callable[[Tensor], Tensor], calls: list[torch.Size]) -> None:
    x = change(torch.randn(2, 32, 7, 6))
    assert _net().to(x.dtype)(x).shape == x.shape
    assert not calls


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_transforms_see_the_parts_and_compilers_an_op(calls: list[torch.Size]) -> None:
    net, x = _net(), torch.randn(3, 2, 32, 5, 5)
    torch.testing.assert_close(torch.func.vmap(net)(x), net(x.flatten(0, 1)).unflatten(0, (3, 2)), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[0]), net(x[0]), rtol=1e-4, atol=1e-5)
    assert len(calls) == 3
    targets = {str(node.target) for node in torch.export.export(net, (x[0],)).graph.nodes}
    assert "involution.generated.default" in targets
    assert "involution.layer.default" not in targets
    with torch.enable_grad():
        assert compiled(x[0]).requires_grad
    with torch.autocast("cpu"):
        compiled(x[0])
    assert len(calls) == 3


@pytest.mark.parametrize("follow", [False, True])
@torch.no_grad()
def test_mistakes_are_told_as_elsewhere(follow: bool, calls: list[torch.Size]) -> None:
    net = _net()
    layer = net.layer = _drawn(Involution2d(32, 5, padding=0))
    run = net if follow else layer
    for x, error, says in (
        (torch.randn(2, 16, 7, 7), ValueError, r"`x` must have shape \(B, 32"),
        (torch.randn(2, 32, 7), ValueError, r"`x` must have shape \(B, 32"),
        (torch.randn(2, 32, 7, 7).double(), TypeError, "must share a dtype"),
        (torch.randn(2, 32, 7, 7, device="meta"), ValueError, "must share a device"),
        (torch.randn(2, 32, 3, 3), ValueError, "too small for a window"),
        (None, TypeError, "`x` must be a tensor; got NoneType"),
    ):
        with pytest.raises(error, match=says):
            run(x)
    assert not calls


@torch.no_grad()
def test_weights_may_change_between_calls(calls: list[torch.Size]) -> None:
    net, x = _net(), torch.randn(1, 32, 5, 5)
    first = net(x)
    net.layer.generator.span.bias.add_(1)
    net.norm.running_mean.sub_(1)
    expected = net.act(net.norm(_expected(net.layer, x)))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, expected)
    net.double()
    torch.testing.assert_close(net(x.double()), expected.double(), rtol=1e-4, atol=1e-5)
    assert len(calls) == 3


def test_no_call_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_library", None)
    with torch.no_grad():
        assert inference.at_once(_net().layer, torch.randn(1, 32, 5, 5)) is None
