"""The ops whose kernel is generated where it is used: right on every window, dtype, layout and compiled variant."""

from math import prod, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from involution import Involution2d
from involution.ops import functional, reference
from involution.ops.functional import generated_involution

from ..cases import CASES, DTYPES, LAYOUTS, Case, case, drawn_cases, run_reference

_SMALL = (
    case((5,), 3, stride=2, padding=1, batch=2, group_channels=2),
    case((4, 3), (2, 3), stride=(1, 2), padding=1, dilation=(2, 1), batch=1, group_channels=2),
    case((3, 2, 3), (2, 1, 2), stride=(1, 1, 2), padding=(1, 0, 1), batch=1, groups=1, group_channels=2),
)


def _tensors(case: Case, dtype: torch.dtype, reduced: int = 5) -> list[Tensor]:
    """x, features, weight and bias: normal deviates, the same in every run."""
    draw = torch.Generator().manual_seed(0)
    x, kernel, _ = case.tensors(dtype)
    outputs = case.groups * prod(case.window.kernel_size)
    shapes = ((case.batch, reduced, *kernel.shape[x.dim() :]), (outputs, reduced), (outputs,))
    return [x, *(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes)]


def _call(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, case: Case) -> Tensor:
    w = case.window
    return torch.ops.involution.generated(x, features, weight, bias, w.kernel_size, w.stride, w.padding, w.dilation)


def _check(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Compare with float64: a tap sums R + 1 terms, an output T of them; both walk at random in the accumulator."""
    tensors = _tensors(case, dtype)
    x, features, weight, bias = (t.double() for t in tensors)
    window, rank = case.window, x.dim() - 2
    kernel = reference.span(features, weight, bias, window.kernel_size)
    sizes = reference.span(features.abs(), weight.abs(), bias.abs(), window.kernel_size)
    grad = x.new_empty((*x.shape[:2], *features.shape[2:]))
    value = run_reference("forward", x, kernel, grad, window)
    absolute = run_reference("forward", x.abs(), sizes, grad, window)
    rounding, steps = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    terms = sqrt(features.shape[1] + 1) + sqrt(prod(window.kernel_size)) + 2
    budget = rounding.eps / 2 * value.abs().clamp(min=rounding.tiny) + steps.eps * terms * absolute
    lay = LAYOUTS[layout][0]
    got = _call(lay(tensors[0], rank), lay(tensors[1], rank), *tensors[2:], case)
    assert got.shape == value.shape
    assert got.dtype == dtype
    assert bool(((got.double() - value).abs() <= budget).all())


def _gradients(grad: Tensor, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, case: Case) -> list[Tensor]:
    """Of x, features, weight and bias."""
    ops, w = torch.ops.involution, case.window
    window = (w.stride, w.padding, w.dilation)
    from_x = ops.generated_grad_x(grad, features, weight, bias, x.shape[2:], w.kernel_size, *window)
    return [from_x, *ops.grad_span(grad, x, features, weight, w.kernel_size, *window)]


def _check_gradients(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Compare with float64, as `_check` does. The sums are nested: their terms walk at random, each in its turn."""
    tensors, grad = _tensors(case, dtype), case.tensors(dtype)[2]
    exact, window, rank = [t.double() for t in tensors], case.window, grad.dim() - 2
    places, taps = case.batch * prod(grad.shape[2:]), prod(window.kernel_size)

    def by_reference(grad: Tensor, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        span = reference.span(features, weight, bias, window.kernel_size)
        from_kernel = run_reference("grad_kernel", x, span, grad, window)
        return [run_reference("grad_x", x, span, grad, window), *reference.through_span(from_kernel, features, weight)]

    values = by_reference(grad.double(), *exact)
    absolutes = by_reference(grad.double().abs(), *(t.abs() for t in exact))
    lay = LAYOUTS[layout][0]
    got = _gradients(lay(grad, rank), lay(tensors[0], rank), lay(tensors[1], rank), *tensors[2:], case)
    rounding, steps = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    # Every gradient passes through a kernel, or the gradient of one: R + 1 or D terms; then come its own.
    first = max(sqrt(exact[1].shape[1] + 1), sqrt(case.group_channels))
    terms = (taps, case.groups * taps, places, places)
    for name, own, found, value, absolute in zip("xfwb", terms, got, values, absolutes, strict=True):
        budget = (
            rounding.eps / 2 * value.abs().clamp(min=rounding.tiny) + steps.eps * (first + sqrt(own) + 2) * absolute
        )
        assert (found.shape, found.dtype) == (value.shape, dtype), name
        assert bool(((found.double() - value).abs() <= budget).all()), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # one as computed in, one converted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_window_and_layout(case: Case, dtype: torch.dtype, layout: str) -> None:
    _check(case, dtype, layout)
    _check_gradients(case, dtype, layout)


@given(case=drawn_cases(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(sorted(LAYOUTS)))
def test_drawn_windows(case: Case, dtype: torch.dtype, layout: str) -> None:
    _check(case, dtype, layout)
    _check_gradients(case, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("variant")
def test_every_variant_of_the_library(dtype: torch.dtype) -> None:
    for each in CASES:
        _check(each, dtype, "channels_last")
        _check_gradients(each, dtype, "channels_last")


@pytest.mark.parametrize("reduced", [1, 16, 128])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (30, 56), (3, 600)], ids=str)
def test_sizes_that_are_cut_into_tasks(size: tuple[int, int], reduced: int) -> None:
    """Several tasks, of rows, columns and groups, agree with one convolution and one involution."""
    each = case(size, 7, padding=3, batch=1, groups=3, group_channels=16)
    x, features, weight, bias = _tensors(each, torch.float64, reduced)
    expected = functional.involution(x, reference.span(features, weight, bias, (7, 7)), 1, 3)
    torch.testing.assert_close(_call(x, features, weight, bias, each), expected, rtol=1e-12, atol=1e-11)
    _check_gradients(each, torch.float64, "channels_last")


@pytest.mark.usefixtures("variant")
def test_nan_of_an_accurate_weight_stays_in_bfloat16() -> None:
    """All its bits are set, so that rounding it as if it were a number would turn it to zero."""
    each = case((9, 20), 3, padding=1, batch=1, groups=2, group_channels=16)
    x, features, weight, bias = _tensors(each, torch.bfloat16)
    weight = weight.float()
    weight[0, 0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    for lay in (LAYOUTS["contiguous"][0], LAYOUTS["channels_last"][0]):
        got = _call(lay(x, 2), lay(features, 2), weight, bias.float(), each)
        assert bool(got[:, :16, 1:, 1:].isnan().all())
        assert not got[:, 16:].isnan().any()


def test_bits_do_not_depend_on_threads() -> None:
    each = case((28, 30), 7, padding=3, batch=3, groups=4, group_channels=16)
    tensors, grad = _tensors(each, torch.float32, 16), each.tensors(torch.float32)[2]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([_call(*tensors, each), *_gradients(grad, *tensors, each)])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_flops_of_both_directions() -> None:
    """Two for each multiply-add: one slide and one span forward, two slides and three spans backward."""
    tensors = [t.requires_grad_() for t in _tensors(_SMALL[1], torch.float64)]
    with FlopCounterMode(display=False) as counter:
        y = _call(*tensors, _SMALL[1])
        y.sum().backward()
    slides, spans = 2 * y.numel() * 6, 2 * tensors[1].numel() * len(tensors[2])
    ops = torch.ops.involution
    expected = {
        ops.generated: slides + spans,
        ops.generated_grad_x: slides + spans,
        ops.grad_span: slides + 2 * spans,
    }
    assert counter.get_flop_counts()["Global"] == expected


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("case", _SMALL, ids=str)
def test_opcheck(case: Case) -> None:
    w, tensors = case.window, [t.requires_grad_() for t in _tensors(case, torch.float64, 2)]
    window = (w.stride, w.padding, w.dilation)
    torch.library.opcheck(torch.ops.involution.generated, (*tensors, w.kernel_size, *window))
    x, features, weight, bias = (t.detach() for t in tensors)
    grad = case.tensors(torch.float64)[2]
    arguments = (grad, features, weight, bias, x.shape[2:], w.kernel_size, *window)
    torch.library.opcheck(torch.ops.involution.generated_grad_x, arguments)
    torch.library.opcheck(torch.ops.involution.grad_span, (grad, x, features, weight, w.kernel_size, *window))


@pytest.mark.parametrize("case", _SMALL, ids=str)
def test_gradients(case: Case) -> None:
    tensors = [t.requires_grad_() for t in _tensors(case, torch.float64, 2)]
    torch.autograd.gradcheck(lambda *t: _call(*t, case), tensors)
    torch.autograd.gradgradcheck(lambda *t: _call(*t, case), tensors)


@pytest.mark.parametrize("wanted", range(4))
def test_gradient_of_one_argument_alone(wanted: int) -> None:
    """What asks for no gradient gets none, and changes none."""
    tensors = _tensors(_SMALL[1], torch.float64)
    expected = [t.clone().requires_grad_() for t in tensors]
    _call(*expected, _SMALL[1]).square().sum().backward()
    tensors[wanted].requires_grad_()
    _call(*tensors, _SMALL[1]).square().sum().backward()
    torch.testing.assert_close(tensors[wanted].grad, expected[wanted].grad)
    assert all(t.grad is None for i, t in enumerate(tensors) if i != wanted)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_layer_is_the_same_fused_or_not(kernel_size: int, stride: int) -> None:
    torch.manual_seed(0)
    fused, stored = (Involution2d(32, kernel_size, stride, fused=flag).double() for flag in (True, False))
    stored.load_state_dict(fused.state_dict())
    results = []
    for layer in (fused, stored):
        x = torch.randn(2, 32, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_layer_keeps_no_kernel_for_the_backward_pass() -> None:
    """The kernel has 49 / 16 as many elements as x; the fused layer saves nothing of that size."""
    x = torch.randn(2, 32, 20, 20).requires_grad_()
    saved: dict[bool, list[int]] = {True: [], False: []}
    for fused, sizes in saved.items():
        layer = Involution2d(32, fused=fused)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            layer(x)
    assert max(saved[False]) == x.numel() * 49 // 16
    assert max(saved[True]) == x.numel()


@pytest.mark.parametrize("generator", ["bottleneck", "linear", "neighbourhood"])
def test_a_graph_of_derivatives_within_autocast(generator: str) -> None:
    """The forward pass was not within it, so nothing is to be cast."""
    layer, x = Involution2d(16, 3, generator=generator), torch.randn(2, 16, 9, 9, requires_grad=True)
    y, inputs = layer(x).sum(), [x, *layer.parameters()]
    expected = torch.autograd.grad(y, inputs, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, inputs, create_graph=True)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["generator", "generator.span"])
def test_another_forward_of_an_instance_is_called(name: str) -> None:
    """As tools put there that move weights from device to device."""
    layer, x = Involution2d(32, 3).eval(), torch.randn(1, 32, 5, 5)
    module = layer.get_submodule(name)
    own = module.forward
    module.forward = lambda x: own(x) * 0
    assert not layer(x).any()
    del module.forward
    assert layer(x).any()
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        layer(x)
    assert module in seen


def test_hooks_see_the_kernel() -> None:
    """Whoever watches the generator or its span gets the kernel, and may change it."""
    layer, x = Involution2d(32, 3), torch.randn(1, 32, 5, 5)
    expected = layer.eval()(x)
    seen: list[tuple[int, ...]] = []
    for module in (layer.generator, layer.generator.span):
        with module.register_forward_hook(lambda _, __, kernel: seen.append(tuple(kernel.shape))):
            torch.testing.assert_close(layer(x), expected)
    assert seen == [(1, 2, 3, 3, 5, 5), (1, 18, 5, 5)]
    with layer.generator.span.register_forward_hook(lambda _, __, kernel: kernel * 0):
        assert not layer(x).any()


# torch scripts its own forward-mode formulas, with its own deprecated compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_and_autocast() -> None:
    each = _SMALL[1]
    tensors = tuple(_tensors(each, torch.float64))
    directions = tuple(torch.randn_like(t) for t in tensors)
    w = each.window

    def run(*t: Tensor) -> Tensor:
        return generated_involution(*t, w.kernel_size, w.stride, w.padding, w.dilation)

    _, tangent = torch.func.jvp(run, tensors, directions)
    step = 1e-6
    ahead, behind = (run(*(t + s * d for t, d in zip(tensors, directions, strict=True))) for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(*(t.float() for t in tensors)).dtype == torch.bfloat16


_BAD = {
    "features": (
        {"features": torch.randn(2, 5, 8, 8)},
        r"`features` must end in the output size \(9, 9\) for `x` of spatial size \(9, 9\), kernel size \(3, 3\).*got",
    ),
    "batch": ({"features": torch.randn(3, 5, 9, 9)}, "`features` has batch size 3, `x` has 2; they must be equal"),
    "rank": ({"weight": torch.randn(18, 5, 1, 1)}, r"must have 4, 2 and 1 dimensions .*got shapes \(2, 5, 9, 9\)"),
    "no feature": (
        {"features": torch.randn(2, 0, 9, 9), "weight": torch.randn(18, 0)},
        r"`features` must have at least one channel; got shape \(2, 0, 9, 9\)",
    ),
    "reduced": ({"weight": torch.randn(18, 4)}, r"`weight` must have shape \(G \* 9, 5\).*got \(18, 4\) and \(18,\)"),
    "taps": (
        {"weight": torch.randn(17, 5), "bias": torch.randn(17)},
        r"`weight` must have shape \(G \* 9, 5\).*got \(17, 5\)",
    ),
    "groups": (
        {"weight": torch.randn(27, 5), "bias": torch.randn(27)},
        "`weight` has 3 groups, which does not divide the 32 channels of `x`",
    ),
}


@pytest.mark.parametrize(("change", "message"), _BAD.values(), ids=_BAD)
def test_shapes_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    good = {
        "x": torch.randn(2, 32, 9, 9),
        "features": torch.randn(2, 5, 9, 9),
        "weight": torch.randn(18, 5),
        "bias": torch.randn(18),
    }
    with pytest.raises(ValueError, match=message):
        generated_involution(**good | change, kernel_size=3, padding=1)


def test_dtypes_that_disagree() -> None:
    x, features, weight, bias = _tensors(_SMALL[0], torch.float32)
    with pytest.raises(TypeError, match=r"`x` and `weight` must share a dtype; got torch.float32 and torch.float64"):
        generated_involution(x, features, weight.double(), bias, 3, 2, 1)
    with pytest.raises(TypeError, match=r"`bias` must be a tensor; got NoneType\."):
        generated_involution(x, features, weight, None, 3, 2, 1)  # type: ignore[arg-type]
