"""The reference is the definition: it equals the plain loops, in every dtype it is as exact as it promises."""

from itertools import product

import pytest
import torch
from torch import Tensor

from involution.ops import reference
from involution.ops.window import Window

from ..cases import CASES, DTYPES, OPS, Case, case, problem, run_reference

_TINY = (
    case((5,), 3, padding=1, group_channels=2),
    case((7,), 4, stride=3, padding=2, dilation=2, groups=1, group_channels=3),
    case((4, 3), 3, padding=1, group_channels=2),
    case((5, 4), (2, 3), stride=(2, 1), padding=(0, 2), dilation=(3, 2), batch=1, group_channels=2),
    case((2, 3), 2, padding=3, batch=1, groups=3, group_channels=1),
    case((3, 2, 3), 2, padding=1, batch=1, groups=2, group_channels=2),
    case((4, 3, 3), (1, 2, 3), stride=(2, 1, 3), padding=(1, 0, 2), dilation=(1, 2, 1), batch=1, groups=1),
)


def _loops(x: Tensor, kernel: Tensor, grad: Tensor, window: Window) -> dict[str, Tensor]:
    """The trilinear form, product by product: image, channel, output position, tap."""
    batch, channels, *size = x.shape
    group_channels = channels // kernel.shape[1]
    results = {
        "forward": torch.zeros_like(grad),
        "grad_x": torch.zeros_like(x),
        "grad_kernel": torch.zeros_like(kernel),
    }
    for b, c in product(range(batch), range(channels)):
        for o in product(*map(range, grad.shape[2:])):
            for t in product(*map(range, window.kernel_size)):
                axes = zip(o, t, window.stride, window.padding, window.dilation, strict=True)
                i = tuple(o_ * s - p + t_ * d for o_, t_, s, p, d in axes)
                if all(0 <= at < n for at, n in zip(i, size, strict=True)):
                    x_at, kernel_at, out_at = (b, c, *i), (b, c // group_channels, *t, *o), (b, c, *o)
                    results["forward"][out_at] += kernel[kernel_at] * x[x_at]
                    results["grad_x"][x_at] += kernel[kernel_at] * grad[out_at]
                    results["grad_kernel"][kernel_at] += grad[out_at] * x[x_at]
    return results


@pytest.mark.parametrize("case", _TINY, ids=str)
def test_equals_the_loops(case: Case) -> None:
    x, kernel, grad = case.tensors(torch.float64)
    for op, expected in _loops(x, kernel, grad, case.window).items():
        torch.testing.assert_close(run_reference(op, x, kernel, grad, case.window), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", _TINY, ids=str)
def test_gradients_are_those_of_the_forward(case: Case) -> None:
    """Torch differentiates the forward; the other two functions must say the same."""
    x, kernel, grad = case.tensors(torch.float64)
    x.requires_grad_()
    kernel.requires_grad_()

    y = run_reference("forward", x, kernel, grad, case.window)
    expected = torch.autograd.grad(y, (x, kernel), grad)
    x, kernel = x.detach(), kernel.detach()
    for op, value in zip(("grad_x", "grad_kernel"), expected, strict=True):
        torch.testing.assert_close(run_reference(op, x, kernel, grad, case.window), value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_within_the_tolerance_of_implementations(case: Case, dtype: torch.dtype) -> None:
    problem(case, dtype).check(run_reference)


@pytest.mark.parametrize("op", OPS)
def test_leaves_its_inputs_alone(op: str) -> None:
    chosen = case((5, 4), 3, padding=0, stride=2)  # no padding: `F.pad` may hand back its argument
    tensors = chosen.tensors(torch.float64)
    before = [t.clone() for t in tensors]
    run_reference(op, *tensors, chosen.window)
    assert all(torch.equal(t, kept) for t, kept in zip(tensors, before, strict=True))


def test_accumulates_half_types_in_float32() -> None:
    assert reference._accurate(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert reference._accurate(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
