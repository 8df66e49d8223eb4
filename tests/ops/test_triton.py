"""The Triton programs: on a GPU where there is one, else in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import prod, sqrt
from pathlib import Path
from types import FunctionType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from involution import Involution2d, implementations, involution
from involution.ops import cpu, library, reference
from involution.ops.functional import generated_involution

from ..cases import (
    CASES,
    DTYPES,
    LAYOUTS,
    OPS,
    Case,
    Problem,
    arguments,
    case,
    drawn_cases,
    problem,
    run_reference,
    run_served,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

on_the_programs = pytest.mark.gpu
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the interpreter runs no CUDA stream and no compiled code")


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    """Let the programs serve CPU tensors, if this process interprets them."""
    if not INTERPRETED:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    from involution.ops import triton as programs

    multiply, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def float32(t: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if t.dtype.scalar != tl.bfloat16:
            return t
        return interpreter.TensorHandle(convert(t.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)

    def convert_to_nearest(data: np.ndarray, source: tl.dtype, goal: tl.dtype, mode: object) -> np.ndarray:
        if source == tl.float32 and goal == tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, goal, mode)

    patched, patch_lang = set(), interpreter._patch_lang

    def patch_once(function: FunctionType) -> interpreter._LangPatchScope:
        """What turns Triton's language into numpy's: at every call of a function it takes a quarter of the time."""
        module = function.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            patch_lang(function)
        return interpreter._LangPatchScope()  # with nothing to restore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        # Two faults of the interpreter's own, in 3.6 and 3.8: it keeps bfloat16 as integers, and multiplies these; and
        # it cuts float32 off to bfloat16, which every GPU rounds to the nearest.
        patch.setattr(interpreter, "_convert_float", convert_to_nearest)
        patch.setattr(
            interpreter.InterpreterBuilder,
            "create_dot",
            lambda self, a, b, *rest: multiply(self, float32(a), float32(b), *rest),
        )
        for name in (*OPS, "generated", "generated_grad_x", "grad_span"):
            patch.setattr(cpu, name, getattr(programs, name))
        yield


def _run(op: str, x: Tensor, kernel: Tensor, grad: Tensor, window: object) -> Tensor:
    """The op on the device, for inputs laid out as given."""
    tensors = []
    for t in (x, kernel, grad):
        if DEVICE == "cpu":
            tensors.append(t)
            continue
        base = t if t._base is None else t._base
        # Moved with everything around it, so that what lies between its elements comes along.
        there = torch.empty(base.untyped_storage().nbytes() // base.element_size(), dtype=t.dtype, device=DEVICE)
        there.copy_(torch.as_strided(base, (there.numel(),), (1,), 0))
        tensors.append(there.as_strided(t.shape, t.stride(), t.storage_offset()))
    return run_served(op, *tensors, window).cpu()  # type: ignore[arg-type]


def _few(cases: tuple[Case, ...], step: int) -> list[object]:
    """The cases as parameters; of which all but every `step`-th are left to `make test-slow`, or to a GPU."""
    return [pytest.param(c, id=str(c), marks=[pytest.mark.slow] if i % step else []) for i, c in enumerate(cases)]


def _small(each: Case) -> Case:
    return replace(each, batch=min(each.batch, 1)) if INTERPRETED else each


@on_the_programs
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "every_second"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", _few(CASES, 4))
def test_every_window_dtype_and_layout(case: Case, dtype: torch.dtype, layout: str) -> None:
    problem(_small(case), dtype).check(_run, LAYOUTS[layout])


@on_the_programs
@pytest.mark.slow
@settings(max_examples=30)
@given(case=drawn_cases(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(sorted(LAYOUTS)))
def test_drawn_windows(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Each window is compiled on a GPU, which takes seconds."""
    Problem(*case.tensors(dtype), case.window).check(_run, LAYOUTS[layout])


_WIDE = (
    # More than one tile, with a remainder; a block of channels that is one of several.
    case((15, 17), 7, padding=3, batch=1, groups=1, group_channels=16),
    case((17, 9), 5, padding=4, dilation=2, batch=1, groups=2, group_channels=12),
    case((9, 33), (3, 9), padding=(1, 4), batch=1, groups=1, group_channels=16),
    case((19, 23), 7, stride=2, padding=3, batch=1, groups=5, group_channels=16),
    case((9, 20), 3, padding=1, batch=1, groups=2, group_channels=80),
    case((40,), 24, padding=3, dilation=1, batch=1, groups=2, group_channels=5),
)


@on_the_programs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", _few(_WIDE, 2))
def test_more_than_one_tile(case: Case, dtype: torch.dtype) -> None:
    problem(case, dtype).check(_run, LAYOUTS["channels_last"])


def _generated_inputs(each: Case, dtype: torch.dtype, reduced: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, kernel, _ = each.tensors(dtype)
    outputs = each.groups * prod(each.window.kernel_size)
    shapes = ((each.batch, reduced, *kernel.shape[x.dim() :]), (outputs, reduced), (outputs,))
    return [x, *(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes)]


_GENERATED = (
    case((7, 7), 7, padding=3, batch=1, group_channels=16),
    case((13, 9), 7, padding=3, batch=1, group_channels=16),
    case((13, 17), 3, padding=1, batch=1, groups=3, group_channels=16),
    case((6, 20), (5, 3), padding=(4, 0), dilation=(2, 1), batch=2, group_channels=9),
    case((9,), 3, padding=1, batch=1),
    case((13, 9), 7, stride=2, padding=3, batch=1, group_channels=16),
    case((12, 19), (2, 5), stride=2, padding=(0, 3), batch=1, groups=3, group_channels=3),
    case((9, 8), 1, stride=2, batch=1, group_channels=16),  # some positions are read by no output
    case((30, 5), 3, padding=1, batch=1, group_channels=16),  # two strips of fifteen rows
)
_BY_WAY_OF_MEMORY = (
    case((9, 11), 3, stride=(2, 1), padding=1, batch=1, group_channels=4),
    case((9, 11), 9, padding=4, batch=1, group_channels=4),
    case((4, 5, 6), 3, padding=1, batch=1),
)


@on_the_programs
@pytest.mark.parametrize("reduced", [5, 32, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*_GENERATED, *_few(_BY_WAY_OF_MEMORY, 3)], ids=str)
def test_generated(case: Case, dtype: torch.dtype, reduced: int) -> None:
    _check_generated(case, dtype, reduced, "channels_last")


@on_the_programs
@pytest.mark.parametrize("layout", ["contiguous", "every_second"])
@pytest.mark.parametrize("case", [_GENERATED[1], _GENERATED[5]], ids=str)
def test_generated_in_other_layouts(case: Case, layout: str) -> None:
    """Of the two strides that are served on the chip: a kernel in memory is torch's product, to whatever rounding."""
    _check_generated(case, torch.bfloat16, 5, layout)


def _check_generated(case: Case, dtype: torch.dtype, reduced: int, layout: str) -> None:
    """Like the unfused layer it rounds the kernel, or its gradient, to the dtype: half an eps of every product."""
    tensors, grad = _generated_inputs(case, dtype, reduced), case.tensors(dtype)[2]
    exact, sizes = [[f(t.double()) for t in (grad, *tensors)] for f in (torch.Tensor.clone, torch.abs)]
    kernel, largest = (reference.span(*each[2:], case.window.kernel_size) for each in (exact, sizes))

    def forward_and_grad_x(grad: Tensor, x: Tensor, *_: Tensor, kernel: Tensor) -> list[Tensor]:
        return [run_reference(op, x, kernel, grad, case.window) for op in ("forward", "grad_x")]

    from_kernel, absolute_kernel = (
        run_reference("grad_kernel", t[1], kernel, t[0], case.window) for t in (exact, sizes)
    )
    values = [*forward_and_grad_x(*exact, kernel=kernel), *reference.through_span(from_kernel, *exact[2:4])]
    rounded = [
        *forward_and_grad_x(*sizes, kernel=kernel.abs()),
        *reference.through_span(from_kernel.abs(), *sizes[2:4]),
    ]
    absolutes = [*forward_and_grad_x(*sizes, kernel=largest), *reference.through_span(absolute_kernel, *sizes[2:4])]
    taps, places = prod(case.window.kernel_size), case.batch * prod(grad.shape[2:])
    first = (reduced + 1, reduced + 1, *(case.group_channels,) * 3)
    then = (taps, taps, case.groups * taps, places, places)
    rounding, step = torch.finfo(dtype), torch.finfo(torch.float32).eps
    lay = LAYOUTS[layout][0]
    got = _generated_and_gradients(
        *(lay(t, grad.dim() - 2) if t.dim() == grad.dim() else t for t in (grad, *tensors)), case
    )
    for name, found, value, size, absolute, *terms in zip(
        "yxfwb", got, values, rounded, absolutes, first, then, strict=True
    ):
        budget = rounding.eps / 2 * (value.abs().clamp(min=rounding.tiny) + size)
        budget += step * (sum(map(sqrt, terms)) + 2) * absolute
        assert (found.shape, found.dtype) == (value.shape, dtype), name
        assert bool(((found.cpu().double() - value).abs() <= budget).all()), name


def _generated_and_gradients(
    grad: Tensor, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, case: Case
) -> list[Tensor]:
    """The output, and gradients of x, features, weight and bias, computed on the device."""
    grad, x, features, weight, bias = (t.to(DEVICE) for t in (grad, x, features, weight, bias))
    ops, w = torch.ops.involution, case.window
    settings = (w.kernel_size, w.stride, w.padding, w.dilation)
    return [
        ops.generated(x, features, weight, bias, *settings),
        ops.generated_grad_x(grad, features, weight, bias, x.shape[2:], *settings),
        *ops.grad_span(grad, x, features, weight, *settings),
    ]


@on_the_programs
def test_nan_stays_in_its_tile() -> None:
    """A NaN in x reaches what reads it, and at most the rest of the strips that read its neighbourhood."""
    each = case((30, 40), 7, padding=3, batch=1, groups=1, group_channels=16)
    x, kernel, _ = each.tensors(torch.bfloat16)
    x[0, 3, 15, 20] = torch.nan
    y = involution(x.to(DEVICE), kernel.to(DEVICE), padding=3).cpu()[0]
    assert bool(y[3, 12:19, 17:24].isnan().all())
    elsewhere = y.clone()
    elsewhere[3, 12:19, 17 - 9 : 24 + 9] = 0
    assert not elsewhere.isnan().any()


@on_the_programs
def test_nan_reaches_the_features_of_what_reads_it() -> None:
    """And no others, though rows of taps have an eighth place, and all are multiplied."""
    each = case((9, 20), 7, padding=3, batch=1, groups=1, group_channels=16)
    tensors, grad = _generated_inputs(each, torch.bfloat16, 5), each.tensors(torch.bfloat16)[2]
    tensors[0][0, 3, 4, 10] = torch.nan
    features = _generated_and_gradients(grad, *tensors, each)[2].cpu()[0]
    assert bool(features[:, 1:8, 7:14].isnan().all())
    features[:, 1:8, 7:14] = 0
    assert not features.isnan().any()


@on_the_programs
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_change(dtype: torch.dtype) -> None:
    each = case((15, 15), 7, padding=3, batch=1, groups=2, group_channels=16)
    tensors = [t.to(DEVICE) for t in each.tensors(dtype)]
    for op in OPS:
        first, second = (run_served(op, *tensors, each.window) for _ in range(2))
        assert torch.equal(first, second)


@on_the_programs
@not_interpreted
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    each = case((5, 6), 3, stride=(1, 2), padding=1, batch=1, group_channels=2)
    args = arguments(op, *(t.to(DEVICE).requires_grad_() for t in each.tensors(torch.float32)), each.window)
    torch.library.opcheck(getattr(torch.ops.involution, op), args)


@on_the_programs
@not_interpreted
def test_gradients_of_gradients() -> None:
    each = case((5, 4), 3, padding=1, batch=1, groups=1, group_channels=2)
    x, kernel, _ = (t.to(DEVICE).requires_grad_() for t in each.tensors(torch.float64))
    torch.autograd.gradcheck(lambda x, k: involution(x, k, padding=1), (x, kernel))
    torch.autograd.gradgradcheck(lambda x, k: involution(x, k, padding=1), (x, kernel))
    tensors = [t.to(DEVICE).requires_grad_() for t in _generated_inputs(each, torch.float64, 2)]
    torch.autograd.gradcheck(lambda *t: generated_involution(*t, 3, padding=1), tensors)
    torch.autograd.gradgradcheck(lambda *t: generated_involution(*t, 3, padding=1), tensors)


def _layer_results(layer: Involution2d, x: Tensor, run: object = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = (layer if run is None else run)(x)  # type: ignore[operator]
    y.float().square().sum().backward()
    results = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return [t.cpu() for t in results if t is not None]


@on_the_programs
@not_interpreted
@pytest.mark.parametrize("channels", [32, 256])
@pytest.mark.parametrize("stride", [1, 2])
def test_layer_is_that_of_the_cpu(channels: int, stride: int) -> None:
    torch.manual_seed(0)
    layer = Involution2d(channels, stride=stride)
    x = torch.randn(2, channels, 15, 13).to(memory_format=torch.channels_last)
    expected = _layer_results(layer, x)
    with torch.backends.cudnn.flags(allow_tf32=False):  # in which torch's convolutions are by default
        got = _layer_results(layer.to(DEVICE), x.to(DEVICE))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


@on_the_programs
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_compiled(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Involution2d(64).to(DEVICE)
    x = torch.randn(2, 64, 14, 14, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.autocast(DEVICE, dtype):
        expected = _layer_results(layer, x)
        got = _layer_results(layer, x, torch.compile(layer, fullgraph=True))
    assert expected[0].dtype == dtype
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=5e-2, atol=5e-2 * float(a.float().abs().max()))


@on_the_programs
@not_interpreted
def test_in_distributed_data_parallel() -> None:
    """Of one process, which is what a machine with one GPU has; its hooks see every gradient all the same."""
    torch.manual_seed(0)
    layer = Involution2d(64).to(DEVICE, torch.bfloat16)
    x = torch.randn(2, 64, 14, 14, device=DEVICE, dtype=torch.bfloat16)
    expected = _layer_results(layer, x)
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        got = _layer_results(layer, x, torch.nn.parallel.DistributedDataParallel(layer))
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)


@on_the_programs
@not_interpreted
def test_in_a_cuda_graph() -> None:
    layer = Involution2d(64).to(DEVICE, torch.bfloat16).eval()
    x = torch.randn(2, 64, 14, 14, device=DEVICE, dtype=torch.bfloat16)
    other = torch.randn_like(x)
    with torch.no_grad():
        expected = layer(other)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(other)
        graph.replay()
    assert torch.equal(y, expected)


@on_the_programs
@not_interpreted
@pytest.mark.parametrize("op", OPS)
def test_strides_beyond_int32(op: str) -> None:
    """Channels more than 2^31 / 16 elements apart, so that offsets within an image need 64 bits."""
    each = case((9, 9), 7, padding=3, batch=2, groups=1, group_channels=16)
    tensors = each.tensors(torch.bfloat16)
    far = []
    for t in tensors:
        stride = 2**31 // 12
        buffer = torch.empty(stride * t.shape[1] * 2, dtype=t.dtype, device=DEVICE)
        far.append(buffer.as_strided(t.shape, (stride * t.shape[1], stride, *t.stride()[2:])).copy_(t))
    Problem(*tensors, each.window).check_op(op, run_served(op, *far, each.window).cpu())


@on_the_programs
@pytest.mark.parametrize("op", OPS)
def test_a_planted_fault_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding off by one in the last axis."""
    from involution.ops import triton as programs

    plan = programs._plan

    def wrong(*args: object) -> programs._Plan:
        right = plan(*args)
        *sizes, padding = right.sizes[:9]
        return right._replace(sizes=(*sizes, padding + 1, *right.sizes[9:]))

    monkeypatch.setattr(programs, "_plan", wrong)
    each = case((7, 7), 3, padding=1, batch=1, groups=1, group_channels=16)
    tensors = each.tensors(torch.float32)
    with pytest.raises(AssertionError, match=f"{op}: .* exceed the tolerance"):
        Problem(*tensors, each.window).check_op(op, _run(op, *tensors, each.window))


@on_the_programs
def test_a_planted_fault_of_generated_kernels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise; each of the five results is wrong by itself."""
    from involution.ops import triton as programs

    strips = programs._strips

    def wrong(read: Tensor, written: Tensor, padding: tuple[int, int], *rest: int) -> object:
        return strips(read, written, (padding[0], padding[1] + 1), *rest)

    each = case((7, 7), 3, padding=1, batch=1, groups=1, group_channels=16)
    tensors, grad = _generated_inputs(each, torch.bfloat16, 5), each.tensors(torch.bfloat16)[2]
    right = _generated_and_gradients(grad, *tensors, each)
    monkeypatch.setattr(programs, "_strips", wrong)
    for a, b in zip(right, _generated_and_gradients(grad, *tensors, each), strict=True):
        assert not torch.allclose(a, b, rtol=0.1)


def test_who_serves_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert implementations()["cuda"] == "Triton"
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    assert implementations()["cuda"].startswith("reference (Triton is missing")


@pytest.mark.skipif(INTERPRETED, reason="it is the interpreter")
@pytest.mark.parametrize(
    "some",
    ["(bfloat16 and channels_last) or (more_than_one_tile and float32) or nan or fault", "generated and bfloat16-32"],
)
def test_in_the_interpreter(some: str) -> None:
    """Some of all, in two parts that take equally long and share the cores; `make test-slow` interprets everything."""
    _interpret("gpu and not slow", "-k", some)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="it is the interpreter")
def test_all_in_the_interpreter() -> None:
    _interpret("gpu")


def _interpret(marked: str, *options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", marked, "-p", "no:cacheprovider", *options, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
