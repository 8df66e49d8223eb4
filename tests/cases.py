"""Windows that implementations get wrong, tensors for them, and the one tolerance every implementation is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod, sqrt

import torch
from hypothesis import strategies as st
from torch import Tensor

from involution.ops import reference
from involution.ops.window import IntOrInts, Window

OPS = ("forward", "grad_x", "grad_kernel")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Run = Callable[[str, Tensor, Tensor, Tensor, Window], Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of one call: B batch, G groups of D channels, the input size and the window."""

    size: tuple[int, ...]
    window: Window
    batch: int
    groups: int
    group_channels: int

    def __str__(self) -> str:
        def join(numbers: tuple[int, ...]) -> str:
            return "x".join(map(str, numbers))

        w = self.window
        return (
            f"S{join(self.size)}-K{join(w.kernel_size)}-s{join(w.stride)}-p{join(w.padding)}-d{join(w.dilation)}"
            f"-B{self.batch}-G{self.groups}-D{self.group_channels}"
        )

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x, kernel and the gradient of the output: normal deviates, the same in every run."""
        draw = torch.Generator().manual_seed(0)
        channels, out = self.groups * self.group_channels, self.window.output_size(self.size)
        shapes = (
            (self.batch, channels, *self.size),
            (self.batch, self.groups, *self.window.kernel_size, *out),
            (self.batch, channels, *out),
        )
        x, kernel, grad = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes)
        return x, kernel, grad


def case(
    size: tuple[int, ...],
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    dilation: IntOrInts = 1,
    batch: int = 2,
    groups: int = 2,
    group_channels: int = 4,
) -> Case:
    """A case, its window spelled out."""
    return Case(
        size, Window.normalise(len(size), kernel_size, stride, padding, dilation), batch, groups, group_channels
    )


CASES = (
    # The paper's own: 7x7, keeping the size, 16 channels a group.
    case((7, 7), 7, padding=3, group_channels=16),
    case((13, 9), 7, padding=3, group_channels=16),
    case((13, 9), 7, stride=2, padding=3, group_channels=16),
    # Channels per group, below, at and between the widths of vector registers.
    *(case((5, 9), 3, padding=1, group_channels=d) for d in (1, 3, 4, 8, 16, 24, 32, 64)),
    case((5, 9), 3, padding=1, groups=1, group_channels=12),
    case((5, 9), 3, padding=1, groups=12, group_channels=1),
    # Groups of four channels, of which two or four share a vector where their number allows it.
    *(case((5, 14), k, padding=k // 2, groups=4) for k in (3, 5, 7, 9)),
    case((5, 9), 7, padding=3, groups=6),
    case((13, 9), 7, stride=2, padding=3, groups=8),
    case((9, 13), 5, padding=4, dilation=2, groups=4),
    # No batch, one image.
    case((5, 9), 3, padding=1, batch=0),
    case((5, 9), 3, padding=1, batch=1),
    # Two or four images that share vectors, and rows cut into parts as there are none; fewer outputs than parts.
    *(case((5, 9), 7, padding=3, batch=b, group_channels=16) for b in (1, 3, 4)),
    *(case((4, 13), 3, stride=2, padding=1, batch=b, groups=3, group_channels=d) for b, d in ((6, 4), (8, 6), (8, 8))),
    case((3, 35), 5, padding=2, batch=3, groups=1, group_channels=8),
    case((5, 2), 3, padding=1, batch=3, group_channels=16),
    # Tiny inputs, kernels larger than the input, windows that see nothing but zeros, an axis without entries.
    case((1, 1), 1),
    case((1, 1), 7, padding=3),
    case((3, 2), 7, padding=3),
    case((3, 4), 2, padding=5),
    case((3, 4), 7, padding=8),
    case((3, 4), 3, stride=2, padding=6, dilation=2),
    case((0, 4), 3, padding=(2, 1)),
    # Strides that do and do not divide the size, wider than the window too.
    case((7, 7), 3, stride=2, padding=1),
    case((8, 8), 3, stride=2, padding=1),
    case((13, 9), 5, stride=3, padding=2),
    case((13, 9), 2, stride=3),
    case((9, 13), 3, stride=(1, 3), padding=(1, 0)),
    # Dilation, even and non-square kernels.
    case((13, 9), 3, padding=2, dilation=2),
    case((13, 9), 3, stride=2, padding=2, dilation=(2, 3)),
    case((7, 6), 4, padding=2),
    case((7, 6), 2),
    case((7, 6), (1, 5), padding=(0, 2)),
    case((6, 7), (5, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    # Rows in tiles of seven outputs, of which those at the ends read half a window outside, or less.
    case((5, 14), 7, padding=3, group_channels=16),
    case((5, 21), 7, padding=3, group_channels=16),
    case((5, 9), 7, padding=(3, 2), group_channels=16),
    # Rows wider than one vector of outputs, or many.
    case((2, 70), 3, padding=1, group_channels=16),
    case((2, 131), 3, padding=1),
    case((2, 131), 7, stride=2, padding=3, group_channels=3),
    # Many rows, of which few are kept at a time; rows that no output reads.
    case((70, 5), 3, padding=1, group_channels=16),
    case((41, 4), 2, stride=(3, 1), padding=1, dilation=(2, 1), group_channels=3),
    case((23, 4), 1, stride=(2, 1), padding=(1, 0)),
    case((3, 31, 4), (2, 3, 2), padding=(1, 2, 0), dilation=(1, 2, 1)),
    # One and three axes.
    case((1333,), 7, stride=2, padding=3, group_channels=16),
    case((9,), 3, padding=1),
    case((9,), 4, stride=3, padding=5, dilation=2, group_channels=3),
    case((4, 5, 6), 3, padding=1),
    case((5, 4, 7), (1, 2, 3), stride=(2, 1, 3), padding=(1, 2, 0), dilation=(2, 1, 2), group_channels=3),
    case((3, 1, 2), 3, padding=(1, 1, 3), group_channels=16),
)


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    """Any window in one to three axes, and an input that it fits."""
    rank = draw(st.integers(1, 3))

    def per_axis(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(rank))

    kernel_size, stride, dilation = per_axis(1, 4), per_axis(1, 3), per_axis(1, 3)
    padding = per_axis(0, 4)
    needed = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel_size, dilation, padding, strict=True)]
    size = tuple(max(1, n) + draw(st.integers(0, 20 // rank**2)) for n in needed)
    # Fours of channels share vectors where there are enough of them; so do two and four images.
    batch = draw(st.integers(0, 3) | st.sampled_from((4, 6, 8)))
    groups, group_channels = draw(st.integers(1, 3) | st.sampled_from((4, 8))), draw(st.just(4) | st.integers(1, 20))
    return case(size, kernel_size, stride, padding, dilation, batch, groups, group_channels)


class Problem:
    """Inputs of the three ops, what each must give, and by how much an element may miss it.

    The oracle is the reference in float64. With u the unit roundoff of the dtype (half its eps), an element that sums n
    products may miss the oracle's value v by

        u(dtype) * |v| + eps(accumulator) * (sqrt(n) + 2) * (sum of the absolute products)

    - one rounding to the dtype, and a random walk of n roundings in the accumulator, which is float32 for half types.
    The sum of the absolute products is the same op on absolute values. A v below the normal numbers of the dtype is
    rounded as the smallest of them.
    """

    def __init__(self, x: Tensor, kernel: Tensor, grad: Tensor, window: Window) -> None:
        self.x, self.kernel, self.grad, self.window = x, kernel, grad, window
        exact = [t.double() for t in (x, kernel, grad)]
        self._values = {op: run_reference(op, *exact, window) for op in OPS}
        self._absolutes = {op: run_reference(op, *(t.abs() for t in exact), window) for op in OPS}

    def check(self, run: Run, layouts: Layouts | None = None) -> None:
        """Fail unless `run` gives all three ops within the tolerance, for inputs laid out in memory as told."""
        tensors = [self.x, self.kernel, self.grad]
        if layouts is not None:
            tensors = [lay(t, self.x.dim() - 2) for lay, t in zip(layouts, tensors, strict=True)]
        for op in OPS:
            self.check_op(op, run(op, *tensors, self.window))

    def check_op(self, op: str, got: Tensor) -> None:
        """Fail unless `got` is within the tolerance of the oracle of `op`."""
        value, dtype = self._values[op], self.x.dtype
        assert got.shape == value.shape, f"{op}: shape {tuple(got.shape)}, expected {tuple(value.shape)}"
        assert got.dtype == dtype, f"{op}: dtype {got.dtype}, expected {dtype}"
        rounding, steps = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
        summed = self.x.shape[1] // self.kernel.shape[1] if op == "grad_kernel" else prod(self.window.kernel_size)
        budget = rounding.eps / 2 * value.abs().clamp(min=rounding.tiny)
        budget += steps.eps * (sqrt(summed) + 2) * self._absolutes[op]
        error = (got.double() - value).abs()
        bad = ~(error <= budget)  # so written, NaN is bad
        if bad.any():
            at = tuple(bad.nonzero()[0].tolist())
            raise AssertionError(
                f"{op}: {int(bad.sum())} of {bad.numel()} elements exceed the tolerance; the first, at {at}, is "
                f"{got[at].item():.9g}, expected {value[at].item():.9g} within {budget[at].item():.3g}"
            )


@cache
def problem(case: Case, dtype: torch.dtype) -> Problem:
    """The problem of a case, computed once for all tests that share it."""
    return Problem(*case.tensors(dtype), case.window)


def arguments(op: str, x: Tensor, kernel: Tensor, grad: Tensor, window: Window) -> tuple:
    """The arguments of the registered op of that name."""
    settings = (window.stride, window.padding, window.dilation)
    if op == "forward":
        return (x, kernel, *settings)
    if op == "grad_x":
        return (grad, kernel, x.shape[2:], *settings)
    return (grad, x, kernel.shape[1], window.kernel_size, *settings)


def run_served(op: str, x: Tensor, kernel: Tensor, grad: Tensor, window: Window) -> Tensor:
    """The registered op: whatever implementation serves the device of the tensors."""
    return getattr(torch.ops.involution, op)(*arguments(op, x, kernel, grad, window))


def run_reference(op: str, x: Tensor, kernel: Tensor, grad: Tensor, window: Window) -> Tensor:
    """The reference, whatever else serves the device."""
    inputs = {"forward": (x, kernel), "grad_x": (grad, kernel), "grad_kernel": (grad, x)}[op]
    shape = {"forward": grad, "grad_x": x, "grad_kernel": kernel}[op].shape
    out = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    getattr(reference, op)(out, *inputs, window.stride, window.padding, window.dilation)
    return out


# Layouts: the same values in other places of memory. Each takes a tensor and its number of (trailing) spatial axes.

Layout = Callable[[Tensor, int], Tensor]
Layouts = tuple[Layout, Layout, Layout]


def contiguous(t: Tensor, rank: int) -> Tensor:
    return t.contiguous()


def channels_last(t: Tensor, rank: int) -> Tensor:
    """Spatial axes outermost after the batch: (B, *S, C), and (B, *O, G, *K) for a kernel."""
    inner = t.dim() - rank
    return _in_memory_order(t, [0, *range(inner, t.dim()), *range(1, inner)])


def reversed_axes(t: Tensor, rank: int) -> Tensor:
    return _in_memory_order(t, list(range(t.dim()))[::-1])


def every_second(t: Tensor, rank: int) -> Tensor:
    """Every second entry of two axes, NaN between them."""
    shape = list(t.shape)
    shape[1], shape[-1] = 2 * shape[1] + 1, 2 * shape[-1] + 1
    view = t.new_full(shape, torch.nan)[:, 1::2, ..., 1::2]
    return view.copy_(t)


def off_alignment(t: Tensor, rank: int) -> Tensor:
    """In the memory order it has, an odd number of entries into a buffer of NaN that ends odd entries later."""
    margin = 67
    dense = t.clone()
    buffer = t.new_full((dense.numel() + 2 * margin,), torch.nan)
    return buffer.as_strided(dense.shape, dense.stride(), margin).copy_(t)


def channels_last_off_alignment(t: Tensor, rank: int) -> Tensor:
    return off_alignment(channels_last(t, rank), rank)


def _in_memory_order(t: Tensor, order: list[int]) -> Tensor:
    back = [order.index(axis) for axis in range(t.dim())]
    return t.permute(order).contiguous().permute(back)


LAYOUTS: dict[str, Layouts] = {
    "contiguous": (contiguous, contiguous, contiguous),
    "channels_last": (channels_last, channels_last, channels_last),
    "x_channels_last": (channels_last, contiguous, contiguous),
    "kernel_channels_last": (contiguous, channels_last, reversed_axes),
    "reversed_axes": (reversed_axes, reversed_axes, reversed_axes),
    "every_second": (every_second, every_second, every_second),
    "off_alignment": (off_alignment, off_alignment, off_alignment),
    "channels_last_off_alignment": (channels_last_off_alignment,) * 3,
}
