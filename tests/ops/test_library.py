"""What torch knows of the three ops: schemas, fakes, derivatives, memory formats, autocast, compile, export, FLOPs."""

import io
import random
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from involution import Involution2d, implementations, involution
from involution.ops import library

from ..cases import LAYOUTS, OPS, Case, arguments, case, run_served

_SMALL = (
    case((5,), 3, stride=2, padding=1, batch=2, group_channels=2),
    case((4, 3), (2, 3), stride=(1, 2), padding=1, dilation=(2, 1), batch=1, group_channels=2),
    case((3, 2, 3), (2, 1, 2), stride=(1, 1, 2), padding=(1, 0, 1), batch=1, groups=1, group_channels=2),
)
_each_rank = pytest.mark.parametrize("case", _SMALL, ids=str)
_each_op = pytest.mark.parametrize("op", OPS)


def _arguments(op: str, case: Case, dtype: torch.dtype = torch.float64) -> tuple:
    """Arguments of the registered op, its two tensors wanting gradients."""
    tensors = [t.requires_grad_() for t in case.tensors(dtype)]
    return arguments(op, *tensors, case.window)


# opcheck itself reads .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@_each_op
@_each_rank
def test_opcheck(case: Case, op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.involution, op), _arguments(op, case))


@_each_op
@_each_rank
def test_first_and_second_derivatives(case: Case, op: str) -> None:
    first, second, *rest = _arguments(op, case)

    def run(first: Tensor, second: Tensor) -> Tensor:
        return getattr(torch.ops.involution, op)(first, second, *rest)

    assert torch.autograd.gradcheck(run, (first, second))
    assert torch.autograd.gradgradcheck(run, (first, second))


# torch scripts its own forward-mode formulas, with its own deprecated compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@_each_rank
def test_forward_mode_derivatives(case: Case) -> None:
    x, kernel, *window = _arguments("forward", case)

    def run(x: Tensor, kernel: Tensor) -> Tensor:
        return involution(x, kernel, *window)

    assert torch.autograd.gradcheck(run, (x, kernel), check_forward_ad=True, check_backward_ad=False)
    tangents = torch.randn_like(x), torch.randn_like(kernel)
    _, tangent = torch.func.jvp(run, (x, kernel), tangents)
    torch.testing.assert_close(tangent, run(tangents[0], kernel) + run(x, tangents[1]))
    _, tangent = torch.func.jvp(lambda x: run(x, kernel), (x,), tangents[:1])
    torch.testing.assert_close(tangent, run(tangents[0], kernel))


def test_a_frozen_input_keeps_nothing_alive_but_the_other() -> None:
    saved: list[Tensor] = []
    x, kernel = torch.randn(1, 4, 5, 5), torch.randn(1, 2, 3, 3, 5, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        involution(x, kernel, padding=1)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_tensors_of_several_dtypes_are_refused() -> None:
    if implementations()["cpu"].startswith("reference"):
        pytest.skip("the reference serves them")
    x, kernel, window = torch.randn(1, 4, 5, 5), torch.randn(1, 2, 3, 3, 5, 5), ((1, 1), (1, 1), (1, 1))
    features, weight, bias = torch.randn(1, 3, 5, 5), torch.randn(18, 3), torch.randn(18)
    ops, told = torch.ops.involution, r"must share a dtype; got torch\.\w+, torch\.\w+ and torch\.\w+\."
    with pytest.raises(TypeError, match=told):
        ops.forward(x, kernel.bfloat16(), *window)
    with pytest.raises(TypeError, match=told):
        ops.grad_x(x.half(), kernel, (5, 5), *window)
    with pytest.raises(TypeError, match=told):
        ops.grad_kernel(x.double(), x, 2, (3, 3), *window)
    with pytest.raises(TypeError, match=told):
        ops.generated(x, features.half(), weight, bias, (3, 3), *window)


def test_no_memory_for_an_absurd_window() -> None:
    if implementations()["cpu"].startswith("reference"):
        pytest.skip("the reference asks torch for the memory")
    stride, x = 2**30 - 1, torch.ones(1).expand(1, 2**20, 1, 1)  # one row of it is more than any address space
    with pytest.raises(MemoryError, match=r"no memory for the scratch .* stride \(1073741823, 1073741823\)"):
        involution(x, torch.ones(1, 1, 1, 1, 2, 2), stride=stride, padding=2**29)
    window = ((1, 1), (2**29, 2**29), (2**30, 2**30))
    with pytest.raises(MemoryError, match=r"scratch of involution_gradients .* dilation \(1073741824"):
        library._at_once(x, x, torch.ones(1, 1, 2, 2, 1, 1), window)


def test_adjoint_identity_on_random_windows() -> None:
    """<g, F(x, k)> = <x, Gx(g, k)> = <k, Gk(g, x)>."""
    draw = random.Random(0)
    for _ in range(200):
        rank = draw.randint(1, 3)

        def per_axis(least: int, most: int, rank: int = rank) -> tuple[int, ...]:
            return tuple(draw.randint(least, most) for _ in range(rank))

        kernel_size, dilation, padding = per_axis(1, 5), per_axis(1, 3), per_axis(0, 4)
        stride, more = per_axis(1, 3), per_axis(0, 6)
        axes = zip(kernel_size, dilation, padding, more, strict=True)
        size = tuple(max(1, d * (k - 1) + 1 - 2 * p) + m for k, d, p, m in axes)
        batch, groups, group_channels = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 9)
        chosen = case(size, kernel_size, stride, padding, dilation, batch, groups, group_channels)
        x, kernel, grad = chosen.tensors(torch.float64)
        y, x_grad, kernel_grad = (run_served(op, x, kernel, grad, chosen.window) for op in OPS)
        expected = (grad * y).sum()
        scale = (grad * y).abs().sum().item()
        for got in ((x * x_grad).sum(), (kernel * kernel_grad).sum()):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * scale, msg=lambda m, c=chosen: f"{c}: {m}")


class _Calls(TorchDispatchMode):
    """Lists the ops of this library that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "involution":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("wants", "expected"), [("x", {"forward", "grad_x"}), ("kernel", {"forward", "grad_kernel"}), ("both", set(OPS))]
)
def test_only_wanted_gradients_are_computed(wants: str, expected: set[str]) -> None:
    x, kernel, _ = _SMALL[1].tensors(torch.float32)
    x.requires_grad_(wants != "kernel")
    kernel.requires_grad_(wants != "x")
    w = _SMALL[1].window
    with _Calls() as calls:
        involution(x, kernel, w.stride, w.padding, w.dilation).sum().backward()
    assert sorted(calls.names) == sorted(expected)


# Memory formats


def _innermost(t: Tensor) -> int:
    """The axis whose neighbours are neighbours in memory."""
    return t.stride().index(1)


@_each_op
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_keeps_the_memory_format(rank: int, layout: str, op: str) -> None:
    """Channels innermost in, channels innermost out."""
    chosen = case((6, 5, 4)[:rank], 3, stride=2, padding=1)
    tensors = [lay(t, rank) for lay, t in zip(LAYOUTS[layout], chosen.tensors(torch.float32), strict=True)]
    out = run_served(op, *tensors, chosen.window)
    if layout == "contiguous":
        assert out.is_contiguous()
    elif op == "grad_kernel":
        assert _innermost(out) == rank + 1  # the last tap axis: B, *O, G, *K in memory
        assert out.movedim(tuple(range(-rank, 0)), tuple(range(1, rank + 1))).is_contiguous()
    else:
        assert _innermost(out) == 1
        assert out.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize(
    ("size", "memory_format"), [((6, 5), torch.channels_last), ((4, 6, 5), torch.channels_last_3d)], ids=str
)
def test_output_keeps_torchs_own_channels_last(size: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x, kernel, _ = case(size, 3, padding=1).tensors(torch.float32)
    y = involution(x.to(memory_format=memory_format), kernel, padding=1)
    assert y.is_contiguous(memory_format=memory_format)
    assert involution(x, kernel, padding=1).is_contiguous()


def _significant_strides(t: Tensor) -> list[int]:
    """Strides of the axes one can step along; those of the others are as meaningless to torch as to us."""
    return [step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1] if t.numel() else []


@_each_op
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (5, 4), (5,), (3, 2, 4)], ids=str)
def test_fakes_agree_with_the_real_ops(size: tuple[int, ...], layout: str, op: str) -> None:
    for (dtype, channels), batch in product([(torch.float32, 1), (torch.bfloat16, 4)], [0, 1, 2]):
        chosen = case(size, 3, padding=1, batch=batch, groups=channels, group_channels=channels)
        tensors = [lay(t, len(size)) for lay, t in zip(LAYOUTS[layout], chosen.tensors(dtype), strict=True)]
        real = run_served(op, *tensors, chosen.window)
        with FakeTensorMode() as mode:
            fake = run_served(op, *map(mode.from_tensor, tensors), chosen.window)
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        assert _significant_strides(fake) == _significant_strides(real)


# Autocast


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_mixed_inputs(x_dtype: torch.dtype, kernel_dtype: torch.dtype, autocast: torch.dtype) -> None:
    x, kernel, _ = case((5, 4), 3, padding=1).tensors(torch.float32)
    x, kernel = x.to(x_dtype).requires_grad_(), kernel.to(kernel_dtype).requires_grad_()
    with torch.autocast("cpu", autocast):
        y = involution(x, kernel, padding=1)
    assert y.dtype == autocast
    assert torch.equal(y, involution(x.to(autocast), kernel.to(autocast), padding=1))
    y.float().sum().backward()
    assert (x.grad.dtype, kernel.grad.dtype) == (x_dtype, kernel_dtype)


def test_autocast_leaves_float64_alone_as_convolution_does() -> None:
    x, kernel, _ = case((5, 4), 3, padding=1).tensors(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert involution(x, kernel, padding=1).dtype == torch.float64
        assert torch.nn.functional.conv2d(x, x.new_zeros(1, 8, 1, 1)).dtype == torch.float64


# Compile and export


def _layer_and_gradients(layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_operator(backend: str) -> None:
    def run(x: Tensor, kernel: Tensor) -> Tensor:
        return involution(x, kernel, stride=2, padding=1)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for layout in (LAYOUTS["contiguous"], LAYOUTS["channels_last"]):
        tensors = case((7, 5), 3, stride=2, padding=1).tensors(torch.float64)
        x, kernel, grad = (lay(t, 2) for lay, t in zip(layout, tensors, strict=True))
        x.requires_grad_()
        kernel.requires_grad_()
        expected, got = run(x, kernel), compiled(x, kernel)
        assert got.stride() == expected.stride()
        assert torch.equal(got, expected)
        for left, right in zip(
            torch.autograd.grad(got, (x, kernel), grad), torch.autograd.grad(expected, (x, kernel), grad), strict=True
        ):
            torch.testing.assert_close(left, right)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],  # a minute of C++ compiler on two cores
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_layer(memory_format: torch.memory_format, backend: str) -> None:
    layer = Involution2d(32, kernel_size=3, stride=2).double().to(memory_format=memory_format)
    x = torch.randn(2, 32, 7, 5, dtype=torch.float64).to(memory_format=memory_format)
    expected = _layer_and_gradients(layer, x)
    got = _layer_and_gradients(torch.compile(layer, fullgraph=True, backend=backend), x)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_once_for_all_sizes() -> None:
    layer = Involution2d(32, kernel_size=3, stride=2).double()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    _layer_and_gradients(compiled, torch.randn(2, 32, 9, 8, dtype=torch.float64))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((13, 8), (7, 21), (32, 33)):
            x = torch.randn(3, 32, *size, dtype=torch.float64)
            for got, expected in zip(_layer_and_gradients(compiled, x), _layer_and_gradients(layer, x), strict=True):
                torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_under_autocast() -> None:
    layer = Involution2d(32, kernel_size=3)
    x = torch.randn(1, 32, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == torch.bfloat16


def test_export_round_trip() -> None:
    layer = Involution2d(32, kernel_size=3, stride=2).eval()
    sizes = dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(layer, (torch.randn(2, 32, 9, 8),), dynamic_shapes=(sizes,))
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    targets = {str(node.target) for node in program.graph.nodes}
    assert "involution.generated.default" in targets
    for size in ((9, 8), (4, 21), (17, 3)):
        x = torch.randn(2, 32, *size)
        torch.testing.assert_close(loaded(x), layer(x))


# FLOPs

_COUNT = """
from torch.utils.flop_counter import FlopCounterMode
"""
_SEARCH = """
import importlib.util
importlib.util.find_spec("torch.utils.flop_counter")
"""
_RUN = """
from involution import involution
"""
_PRINT = """
x = torch.randn(2, 6, 9, 7, requires_grad=True)
kernel = torch.randn(2, 3, 3, 5, 5, 4, requires_grad=True)
with FlopCounterMode(display=False) as counter:
    involution(x, kernel, stride=2, padding=(1, 2)).sum().backward()
counts = counter.get_flop_counts()["Global"]
print({str(op): count for op, count in counts.items()})
"""


# Counter first; involution first; counter looked for, then imported.
_ORDERS = (_COUNT + _RUN, _RUN + _COUNT, _RUN + _SEARCH + _COUNT)


# Each in a copy of a process that has imported torch, and nothing else yet.
_FORK = """
import os
import sys
import torch

for script in sys.argv[1:]:
    if not (child := os.fork()):
        exec(script)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, script
"""


def test_flop_counter_knows_the_ops() -> None:
    """Two FLOPs for every channel, tap and output, whichever is imported first."""
    scripts = [script + _PRINT for script in _ORDERS]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _FORK, *scripts], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    flops = 2 * (2 * 6 * 5 * 4) * (3 * 5)
    assert done.stdout.splitlines() == [str({f"involution.{op}": flops for op in OPS})] * len(scripts)
