"""Whatever serves this device, against the reference in float64: one tolerance, every awkward window and layout."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from involution import implementations
from involution.ops import library

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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_window_dtype_and_layout(case: Case, dtype: torch.dtype, layout: str) -> None:
    problem(case, dtype).check(run_served, LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("variant")
def test_every_variant_of_the_library(dtype: torch.dtype, layout: str) -> None:
    for each in CASES:
        problem(each, dtype).check(run_served, LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("variant")
def test_every_variant_rounds_to_nearest_even(dtype: torch.dtype, layout: str) -> None:
    """Sums of whole numbers are exact in any order, so that rounding to half types is left, often of ties."""
    draw, ties = torch.Generator().manual_seed(0), 0
    for each in CASES[::2]:
        tensors = [torch.randint(-31, 32, t.shape, generator=draw).to(dtype) for t in each.tensors(dtype)]
        for op in OPS:
            exact = run_reference(op, *(t.double() for t in tensors), each.window)
            laid = (lay(t, len(each.size)) for lay, t in zip(LAYOUTS[layout], tensors, strict=True))
            got = run_served(op, *laid, each.window)
            assert torch.equal(got, exact.to(dtype)), (each, op)
            off = exact - got.double()
            other_side = exact + off  # as far away
            ties += int(((other_side.to(dtype) == other_side) & (off != 0)).sum())
    assert (ties > 1000) == (dtype.itemsize == 2)


@pytest.mark.parametrize("layouts", [*itertools.product(["contiguous", "channels_last"], repeat=3)], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("variant")
def test_both_gradients_at_once_to_the_bit(dtype: torch.dtype, layouts: tuple[str, ...]) -> None:
    for each in CASES[::2]:
        tensors = zip(layouts, range(3), each.tensors(dtype), strict=True)
        x, kernel, grad = (LAYOUTS[layout][i](t, len(each.size)) for layout, i, t in tensors)
        window = (each.window.stride, each.window.padding, each.window.dilation)
        both = library._at_once(grad, x, kernel, window)
        if both is None:
            assert 0 in (grad.numel(), x.numel())
            continue
        for op, got in zip(("grad_x", "grad_kernel"), both, strict=True):
            expected = run_served(op, x, kernel, grad, each.window)
            assert torch.equal(expected, got)
            assert expected.stride() == got.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.batch == 2 and 0 not in c.size][::3] + [c for c in CASES if c.batch > 3], ids=str
)
def test_expanded_inputs(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Stride 0: one image for the batch, one kernel for all positions, and the gradient that `sum` sends back."""
    x, kernel, grad = case.tensors(dtype)
    rank = x.dim() - 2
    kernel = kernel[(..., *(slice(1),) * rank)].expand_as(kernel)
    x = LAYOUTS[layout][0](x, rank)[:1].expand_as(x)
    Problem(x, kernel, grad.flatten()[0].expand_as(grad), case.window).check(run_served)


@given(case=drawn_cases(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(sorted(LAYOUTS)))
def test_drawn_windows(case: Case, dtype: torch.dtype, layout: str) -> None:
    Problem(*case.tensors(dtype), case.window).check(run_served, LAYOUTS[layout])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_types_accumulate_in_float32(dtype: torch.dtype) -> None:
    """4096 ones: a bfloat16 sum stops at 256, a float16 sum at 2048."""
    n = 4096
    ones = torch.ones(1, n, n, dtype=dtype)
    x, tap, grad = ones[:, :1], ones[:, :1, :, None], ones[:, :1, :1]
    torch.testing.assert_close(torch.ops.involution.forward(x, tap, [1], [0], [1]), grad * n, rtol=0, atol=0)

    full = ones[:, :1, :1, None].expand(1, 1, n, n)  # a single x, seen by n outputs, each through another tap
    got = torch.ops.involution.grad_x(x, full, [1], [1], [n - 1], [1])
    torch.testing.assert_close(got, grad * n, rtol=0, atol=0)

    got = torch.ops.involution.grad_kernel(ones[..., :1], ones[..., :1], 1, [1], [1], [0], [1])
    torch.testing.assert_close(got, tap[..., :1, :] * n, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("variant")
def test_nan_and_infinity_stay_where_the_formula_puts_them(dtype: torch.dtype, layout: str) -> None:
    """NaN of all its bits, which rounding as if it were a number would turn to zero, in one element of each tensor."""
    each = case((12, 23), 7, batch=1, groups=2, group_channels=16)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    nan = torch.tensor([-1, torch.iinfo(words).max], dtype=words).view(dtype)
    for value in (*nan, torch.tensor(torch.inf, dtype=dtype)):
        for spoilt in range(3):
            tensors = each.tensors(dtype)
            tensors[spoilt].flatten()[tensors[spoilt].numel() // 2] = value
            x, kernel, grad = (lay(t, 2) for lay, t in zip(LAYOUTS[layout], tensors, strict=True))
            for op in OPS:
                got = run_served(op, x, kernel, grad, each.window)
                expected = run_reference(op, x.double(), kernel.double(), grad.double(), each.window)
                assert torch.equal(got.isnan(), expected.isnan()), (op, spoilt, value)
                assert torch.equal(got.isinf(), expected.isinf()), (op, spoilt, value)


_REPEATED = (
    case((28, 30), 7, padding=3, batch=3, group_channels=16),
    case((28, 30), 3, stride=2, padding=1, batch=3, groups=5, group_channels=3),
    case((3, 45, 8), 3, padding=1, batch=1, group_channels=16),
    case((90, 9), 3, stride=(3, 1), padding=2, dilation=(2, 1), batch=3, group_channels=4),
)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", _REPEATED, ids=str)
def test_bits_do_not_depend_on_threads(case: Case, dtype: torch.dtype, layout: str) -> None:
    tensors = [lay(t, len(case.size)) for lay, t in zip(LAYOUTS[layout], case.tensors(dtype), strict=True)]
    before = torch.get_num_threads()

    def run(_: int) -> list[torch.Tensor]:
        x, kernel, grad = tensors
        both = library._at_once(grad, x, kernel, (case.window.stride, case.window.padding, case.window.dilation))
        return [*(run_served(op, *tensors, case.window) for op in OPS), *(both or ())]

    try:
        torch.set_num_threads(1)
        first = run(0)
        torch.set_num_threads(2)
        again = [run(0), run(1)]
        with ThreadPoolExecutor(4) as pool:
            again += pool.map(run, range(8))
    finally:
        torch.set_num_threads(before)
    for others in again:
        for expected, got in zip(first, others, strict=True):
            assert torch.equal(expected, got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_without_channels(dtype: torch.dtype) -> None:
    each = case((5, 9), 3, padding=1, group_channels=0)
    results = [run_served(op, *each.tensors(dtype), each.window) for op in OPS]
    assert results[0].numel() == results[1].numel() == 0
    assert torch.equal(results[2], torch.zeros_like(results[2]))


def test_large_outputs_ask_for_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text() or implementations()["cpu"].startswith("reference"):
        pytest.skip("this system grants no large pages, or nothing asks for them")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x = torch.ones(1).expand(1, 8, 1 << 21)
    out = torch.ops.involution.forward(x, torch.ones(1).expand(1, 1, 1, 1 << 21), (1,), (0,), (1,))
    assert out.nbytes == 64 << 20
    assert torch.equal(out, x)
    assert "hg" in _flags(out.data_ptr() + out.nbytes // 2)  # whether they are granted is for the system to decide


def _flags(address: int) -> list[str]:
    """Of the mapping of this process that holds `address`, as Linux writes them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= address < last
        elif inside and name == "VmFlags:":
            return rest
    raise LookupError(hex(address))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_strides_beyond_int32(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Batch entries more than 2^31 elements apart; only the pages in use are touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    tensors = case((9, 9), 3, stride=2, padding=1, group_channels=16).tensors(torch.bfloat16)
    window = case((9, 9), 3, stride=2, padding=1).window
    far = []
    for t in tensors:
        stride = 2**31 + 64
        buffer = torch.empty(stride + t[0].numel(), dtype=t.dtype)
        far.append(buffer.as_strided(t.shape, (stride, *t.stride()[1:])).copy_(t))
    Problem(*tensors, window).check_op(op, run_served(op, *far, window))


@pytest.mark.slow
def test_more_than_int32_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """One output of more than 2^31 elements, checked on both sides of the limit and at its end."""
    if implementations()["cpu"] == "reference":
        pytest.skip("the reference would hold several float32 copies of the 4 GiB output")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    length = 2**15
    channels = 2**31 // length + 8
    row = torch.randn(length, dtype=torch.bfloat16)
    kernel = torch.full((1, 1, 1, 1), 2.0, dtype=torch.bfloat16).expand(1, 1, 1, length)
    x = row.expand(1, channels, length)
    for op in ("forward", "grad_x"):
        window = case((length,), 1).window
        out = getattr(torch.ops.involution, op)(*arguments(op, x, kernel, x, window))
        for channel in (0, 2**31 // length - 1, 2**31 // length, channels - 1):
            assert torch.equal(out[0, channel], 2 * row)
        del out
