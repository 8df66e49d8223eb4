"""The ops of networks that only infer, against torch's own and the definition of involution."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from involution.ops import cpu, inferred
from involution.ops.inferred import Behind, Product

from ..cases import CASES, LAYOUTS, Case

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.description())
_OPS = torch.ops.involution


def _innermost(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    batch, channels, *size = shape
    return torch.randn(batch, *size, channels, dtype=dtype).movedim(-1, 1)


def _behind(channels: int, number: int, dtype: torch.dtype = torch.float64) -> Behind:
    """A norm with a scale, one without, or none; ReLU or none."""
    mean, weight, bias = torch.randn(3, channels, dtype=dtype)
    variance = torch.rand(channels, dtype=dtype) + 0.5
    norm = ((mean, variance, weight, bias), (mean, variance, None, None), (None,) * 4)[number % 3]
    return Behind(*norm, 0.1 if norm[0] is not None else 0.0, number % 2 == 0)


def _by_torch(x: Tensor, product: Product, stride: tuple[int, ...], behind: Behind, beside: Tensor | None) -> Tensor:
    convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[x.dim() - 3]
    y = convolution(x, product.weight, product.bias, stride)
    if behind.mean is not None:
        y = torch.nn.functional.batch_norm(y, *behind[:4], eps=behind.eps)  # type: ignore[misc]
    y = y if beside is None else y + beside
    return torch.relu(y) if behind.relu else y


# (B, C, N, S, stride): vectors and tiles filled and not, more pixels than a task has, lines that end within tiles
_PLACES = [
    (1, 1, 1, (1,), (1,)),
    (2, 3, 5, (17,), (1,)),
    (1, 16, 33, (400,), (3,)),
    (2, 6, 16, (7, 9), (1, 1)),
    (1, 5, 24, (14, 15), (2, 2)),
    (3, 8, 8, (1, 1), (1, 1)),
    (1, 64, 130, (28, 28), (2, 1)),
    (1, 40, 48, (56, 57), (1, 1)),
    (2, 300, 20, (5, 5), (1, 3)),
    (1, 7, 70, (3, 4, 5), (1, 1, 1)),
    (2, 9, 12, (4, 5, 6), (2, 1, 3)),
    (7, 4, 3, (2, 3), (1, 1)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.usefixtures("variant")
@torch.no_grad()
def test_a_pointwise_convolution_is_that_of_torch(dtype: torch.dtype) -> None:
    for number, (batch, sources, channels, size, stride) in enumerate(_PLACES):
        x = _innermost(batch, sources, *size)
        product = Product(
            torch.randn(channels, sources, *(1,) * len(size), dtype=torch.float64),
            torch.randn(channels, dtype=torch.float64) if number % 2 else None,
        )
        for kind in range(6):
            behind = _behind(channels, kind)
            shape = _by_torch(x, product, stride, behind, None).shape
            beside = _innermost(*shape) if kind % 4 > 1 else None
            expected = _by_torch(x, product, stride, behind, beside)
            given = [t if not isinstance(t, Tensor) else t.to(dtype) for t in (x, *product, *behind, beside)]
            y = inferred.pointwise(given[0], Product(*given[1:3]), stride, Behind(*given[3:9]), given[9])
            assert y is not None
            assert y.movedim(1, -1).is_contiguous()
            close = 1e-12 if dtype is torch.float64 else 1e-4
            torch.testing.assert_close(y.double(), expected, rtol=close, atol=close)


@pytest.mark.usefixtures("variant")
@torch.no_grad()
def test_every_number_of_pixels_and_channels() -> None:
    """Tiles and vectors of all sizes, and memory behind the last of them that stays as it was."""
    for pixels in range(1, 30):
        for channels in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65):
            x, weight = _innermost(1, 3, pixels), torch.randn(channels, 3, 1, dtype=torch.float64)
            memory = torch.full((pixels * channels + 32,), 7.0, dtype=torch.float64)
            y = memory[16:-16].view(1, pixels, channels).movedim(-1, 1)
            cpu.pointwise(y, x, weight, None, (1,), (None,) * 4, 0.0, None, False)
            torch.testing.assert_close(y, torch.conv1d(x, weight), rtol=1e-12, atol=1e-12)
            assert (torch.cat([memory[:16], memory[-16:]]) == 7).all()


@pytest.mark.parametrize(("size", "channels"), [(3, 16), (14, 64), (60, 40)])
@torch.no_grad()
def test_bits_of_a_pointwise_convolution_do_not_depend_on_threads(size: int, channels: int) -> None:
    x, product = _innermost(2, 64, size, size, dtype=torch.float32), Product(torch.randn(channels, 64, 1, 1), None)
    behind, before, found = _behind(channels, 0, torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(inferred.pointwise(x, product, (1, 1), behind))
    finally:
        torch.set_num_threads(before)
    assert found[0] is not None
    assert all(torch.equal(found[0], again) for again in found)


@torch.no_grad()
def test_what_is_no_number_stays_where_it_is() -> None:
    x, product = _innermost(1, 8, 30), Product(torch.randn(20, 8, 1, dtype=torch.float64), None)
    x[0, 3, 17] = torch.nan
    y = inferred.pointwise(x, product, (1,), Behind(relu=True))
    assert y is not None
    assert y.isnan().sum() == y[..., 17].isnan().sum() == 20
    x[0, 3, 17] = torch.inf
    torch.testing.assert_close(inferred.pointwise(x, product, (1,)), torch.conv1d(x, product.weight))


_X, _WEIGHT = _innermost(2, 6, 5, 4), torch.randn(7, 6, 1, 1, dtype=torch.float64)
_REFUSED: dict[str, tuple[Any, ...]] = {
    "channels outermost": (_X.contiguous(), Product(_WEIGHT, None)),
    "columns apart": (_innermost(2, 6, 5, 8)[..., ::2], Product(_WEIGHT, None)),
    "no images": (_X[:0], Product(_WEIGHT, None)),
    "one image without a batch": (_X[0], Product(_WEIGHT, None)),
    "half types": (_X.bfloat16(), Product(_WEIGHT.bfloat16(), None)),
    "another dtype": (_X, Product(_WEIGHT.float(), None)),
    "weights of fewer channels": (_X, Product(_WEIGHT[:, :5], None)),
    "weights apart": (_X, Product(_WEIGHT.repeat(1, 2, 1, 1)[:, ::2], None)),
    "a bias of fewer channels": (_X, Product(_WEIGHT, torch.randn(6, dtype=torch.float64))),
    "weights that are learnt": (_X, Product(_WEIGHT.clone().requires_grad_(), None)),
    "images that are learnt": (_X.clone().requires_grad_(), Product(_WEIGHT, None)),
    "on no device": (_X.to("meta"), Product(_WEIGHT.to("meta"), None)),
    "a norm of fewer channels": (_X, Product(_WEIGHT, None), _behind(6, 0)),
    "a shortcut of other sizes": (_X, Product(_WEIGHT, None), Behind(), _innermost(2, 7, 4, 5)),
    "a shortcut of one image": (_X, Product(_WEIGHT, None), Behind(), _innermost(1, 7, 5, 4)),
    "a shortcut of another dtype": (_X, Product(_WEIGHT, None), Behind(), _innermost(2, 7, 5, 4).float()),
    "a shortcut in another layout": (_X, Product(_WEIGHT, None), Behind(), _innermost(2, 7, 5, 4).contiguous()),
    "a shortcut that is learnt": (_X, Product(_WEIGHT, None), Behind(), _innermost(2, 7, 5, 4).requires_grad_()),
}


@pytest.mark.parametrize("given", _REFUSED.values(), ids=_REFUSED)
def test_what_is_left_to_the_parts(given: tuple[Any, ...]) -> None:
    x, product, *rest = given
    assert inferred.pointwise(x, product, (1, 1), *rest) is None
    assert inferred.pointwise(_X, Product(_WEIGHT, None), (1, 1)) is not None


def _arguments_of_pointwise(number: int) -> tuple[Any, ...]:
    batch, sources, channels, size, stride = _PLACES[number]
    weight = torch.randn(channels, sources, *(1,) * len(size), dtype=torch.float64)
    outputs = [-(-length // step) for length, step in zip(size, stride, strict=True)]
    beside = _innermost(batch, channels, *outputs) if number % 2 else None
    return _innermost(batch, sources, *size), weight, None, list(stride), *_behind(channels, number), beside


def _arguments_of_layer(case: Case, number: int) -> tuple[Any, ...]:
    x, _, grad = case.tensors(torch.float64)
    w, channels = case.window, x.shape[1]
    taps = case.groups * torch.Size(w.kernel_size).numel()
    reduce, span = torch.randn(5, channels, dtype=torch.float64), torch.randn(taps, 5, dtype=torch.float64)
    bias = torch.randn(taps, dtype=torch.float64)
    window = [list(ints) for ints in (w.kernel_size, w.stride, w.padding, w.dilation)]
    return x, grad, reduce, None, *_behind(5, number), span, bias, *_behind(channels, number + 1), *window


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", range(len(_PLACES)))
def test_opcheck_of_pointwise(number: int, dtype: torch.dtype) -> None:
    given = [t.to(dtype) if isinstance(t, Tensor) else t for t in _arguments_of_pointwise(number)]
    torch.library.opcheck(_OPS.pointwise, tuple(given))


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_opcheck_of_layer(case: Case) -> None:
    torch.library.opcheck(_OPS.layer, _arguments_of_layer(case, 0))


@pytest.mark.parametrize("op", ["pointwise", "layer"])
def test_derivatives_of_the_ops_are_refused(op: str) -> None:
    x, *rest = _arguments_of_pointwise(3) if op == "pointwise" else _arguments_of_layer(CASES[0], 0)
    with pytest.raises(RuntimeError, match="no derivatives: they are for networks that only infer"):
        getattr(_OPS, op)(x.clone().requires_grad_(), *rest).sum().backward()


def _misfits() -> dict[str, tuple[Any, ...]]:
    x, weight, bias, other = _X, _WEIGHT, torch.randn(1, dtype=torch.float64), _innermost(2, 7, 1, 1)
    nothing = (None,) * 4
    return {
        "weights of another dtype": (x, weight.float(), None, [1, 1], *nothing, 0.0, False, None),
        "weights of fewer channels": (x, weight[:, :3], None, [1, 1], *nothing, 0.0, False, None),
        "a norm of fewer channels": (x, weight, None, [1, 1], bias, bias, None, None, 0.0, False, None),
        "a shortcut of another dtype": (x, weight, None, [1, 1], *nothing, 0.0, False, other.bool()),
        "a shortcut of other sizes": (x, weight, None, [1, 1], *nothing, 0.0, False, other[:, :3]),
    }


@pytest.mark.parametrize("given", _misfits().values(), ids=_misfits())
def test_the_op_computes_nothing_of_what_does_not_fit(given: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left to torch, which refuses it or does not."""
    monkeypatch.setattr(cpu, "pointwise", lambda *_: pytest.fail("reads what there is not"))
    try:
        found = _OPS.pointwise(*given)
    except RuntimeError:
        return
    torch.testing.assert_close(found, inferred._define_pointwise(*given))


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_ops_take_any_layout_and_dtype(layout: str) -> None:
    """Compilers may lay tensors out otherwise than they were."""
    for number in range(len(_PLACES)):
        x, *rest, beside = _arguments_of_pointwise(number)
        rank = x.dim() - 2
        expected = inferred._define_pointwise(x, *rest, beside)
        given = LAYOUTS[layout][0](x, rank)
        beside = None if beside is None else LAYOUTS[layout][0](beside, rank)
        torch.testing.assert_close(_OPS.pointwise(given, *rest, beside), expected, rtol=1e-12, atol=1e-12)
    for number, case in enumerate(CASES):
        x, source, *rest = _arguments_of_layer(case, number)
        expected = inferred._define_layer(x, source, *rest)
        given = [LAYOUTS[layout][0](t, x.dim() - 2) for t in (x, source)]
        torch.testing.assert_close(_OPS.layer(*given, *rest), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_ops_copy_nothing_that_lies_as_it_should() -> None:
    layer = _arguments_of_layer(CASES[0], 0)
    with profile() as profiled:
        for number in range(len(_PLACES)):
            _OPS.pointwise(*_arguments_of_pointwise(number))
        _OPS.layer(*layer)
    assert not {event.key for event in profiled.key_averages()} & {"aten::copy_", "aten::clone", "aten::contiguous"}


def test_flops() -> None:
    pointwise, layer = _arguments_of_pointwise(6), _arguments_of_layer(CASES[0], 0)
    with FlopCounterMode(display=False) as counter:
        y = _OPS.pointwise(*pointwise)
    assert counter.get_total_flops() == 2 * y.numel() * pointwise[0].shape[1]
    x, source, span = layer[0], layer[1], layer[10]
    with FlopCounterMode(display=False) as counter:
        y = _OPS.layer(*layer)
    places = source.shape[0] * source[0, 0].numel()
    taps = span.shape[0] // CASES[0].groups
    assert counter.get_total_flops() == 2 * (y.numel() * taps + places * 5 * (x.shape[1] + span.shape[0]))
