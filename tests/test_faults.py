"""A test of the tests: the comparison that judges every implementation turns red for each planted fault."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from involution.ops import cpu, reference

from .cases import OPS, arguments, case, problem, run_reference, run_served

_taps, _pad, _grouped = reference._taps, reference._pad, reference._grouped
_Taps = Iterator[tuple[tuple[Any, ...], tuple[slice, ...]]]


def _mirrored(*shapes: Any) -> _Taps:
    """Convolution instead of correlation: the sign of the tap is wrong."""
    taps = list(_taps(*shapes))
    return zip([tap for tap, _ in taps], [place for _, place in reversed(taps)], strict=True)


def _one_short(*shapes: Any) -> _Taps:
    """The last tap is dropped."""
    return iter(list(_taps(*shapes))[:-1])


def _axes_swapped(kernel_shape: Any, output_shape: Any, stride: Any, dilation: Any) -> _Taps:
    """The kernel's height is read as its width."""
    for tap, place in _taps(kernel_shape, output_shape, stride, dilation):
        yield (*tap[:2], *tap[:1:-1]), place


def _undilated(kernel_shape: Any, output_shape: Any, stride: Any, dilation: Any) -> _Taps:
    """Dilation is ignored."""
    return _taps(kernel_shape, output_shape, stride, [1] * len(dilation))


def _stride_ignored(kernel_shape: Any, output_shape: Any, stride: Any, dilation: Any) -> _Taps:
    """Neighbouring outputs read neighbouring inputs, whatever the stride."""
    return _taps(kernel_shape, output_shape, [1] * len(stride), dilation)


def _one_early(*shapes: Any) -> _Taps:
    """Every tap reads where the one before it should."""
    taps = list(_taps(*shapes))
    places = [place for _, place in taps]
    return zip([tap for tap, _ in taps], places[-1:] + places[:-1], strict=True)


def _shifted(x: Tensor, padding: Any) -> Tensor:
    """One zero too many before, one too few after, on every axis."""
    return F.pad(x, [side for p in reversed(padding) for side in (p + 1, p - 1)])


def _wrapped(x: Tensor, padding: Any) -> Tensor:
    """The mask is forgotten: beyond the edge lies the nearest value, not zero."""
    return F.pad(x, [side for p in reversed(padding) for side in (p, p)], mode="replicate")


def _unscaled_group(x: Tensor, groups: int) -> Tensor:
    """Channel c belongs to group c mod G instead of c div D."""
    return x.unflatten(1, (-1, groups)).transpose(1, 2)


def _in_storage_dtype(x: Tensor) -> Tensor:
    """Half types accumulate in themselves."""
    return x


# The gradient of x pads nothing but zeros, so how they are padded cannot be wrong there.
_PADDING_OPS = ("forward", "grad_kernel")
_FAULTS = {
    "sign": ("_taps", _mirrored, OPS),
    "dropped tap": ("_taps", _one_short, OPS),
    "tap off by one": ("_taps", _one_early, OPS),
    "swapped kernel axes": ("_taps", _axes_swapped, OPS),
    "dilation": ("_taps", _undilated, OPS),
    "stride": ("_taps", _stride_ignored, OPS),
    "padding off by one": ("_pad", _shifted, _PADDING_OPS),
    "mask": ("_pad", _wrapped, _PADDING_OPS),
    "group index": ("_grouped", _unscaled_group, OPS),
    "accumulator": ("_accurate", _in_storage_dtype, OPS),
}

# Square, so that no fault is found by its shape.
_CASE = case((9, 9), 3, stride=(2, 1), padding=(2, 2), dilation=(1, 2), groups=3, group_channels=4)


@pytest.mark.parametrize("op", OPS)
def test_the_sound_reference_passes(op: str) -> None:
    sound = problem(_CASE, torch.bfloat16)
    sound.check_op(op, run_reference(op, sound.x, sound.kernel, sound.grad, sound.window))


@pytest.mark.parametrize(("name", "fault", "ops"), _FAULTS.values(), ids=_FAULTS)
def test_a_planted_fault_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[..., Any], ops: tuple[str, ...]
) -> None:
    sound = problem(_CASE, torch.bfloat16)  # its oracle is computed before the fault is planted
    monkeypatch.setattr(reference, name, fault)
    for op in ops:
        with pytest.raises(AssertionError, match=f"{op}: [0-9]+ of [0-9]+ elements exceed the tolerance"):
            sound.check_op(op, run_reference(op, sound.x, sound.kernel, sound.grad, sound.window))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_one_wrong_element_is_found(dtype: torch.dtype, op: str) -> None:
    sound = problem(_CASE, dtype)
    out = run_reference(op, sound.x, sound.kernel, sound.grad, sound.window)
    out.flatten()[-1] += 0.1
    with pytest.raises(AssertionError, match=f"{op}: 1 of"):
        sound.check_op(op, out)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_implementation_that_writes_nothing_gives_nan(
    monkeypatch: pytest.MonkeyPatch, channels_last: bool, op: str
) -> None:
    """The poison reaches the outputs of the registered ops."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    sound = {dtype: problem(_CASE, dtype) for dtype in dtypes}  # oracles that other tests share: not by what follows
    for module in (reference, cpu):
        monkeypatch.setattr(module, op, lambda *_: None, raising=False)
    for dtype in dtypes:
        tensors = _CASE.tensors(dtype)
        if channels_last:
            tensors = tuple(t.movedim(1, -1).contiguous().movedim(-1, 1) for t in tensors)
        out = run_served(op, *tensors, _CASE.window)
        assert out.isnan().all()
        with pytest.raises(AssertionError, match=f"{op}: {out.numel()} of {out.numel()} elements exceed"):
            sound[dtype].check_op(op, out)


def test_arguments_cover_the_three_ops() -> None:
    """The comparison calls each registered op with all its arguments."""
    x, kernel, grad = _CASE.tensors(torch.float32)
    for op in OPS:
        schema = getattr(torch.ops.involution, op).default._schema
        assert len(arguments(op, x, kernel, grad, _CASE.window)) == len(schema.arguments)
