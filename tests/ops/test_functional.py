"""The operator as users call it: what it equals, and a sentence for every mistake."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from involution import involution
from involution.ops.window import Window

_WINDOWS = (
    (1, 3, {"padding": 1}),
    (1, 4, {"stride": 3, "padding": 2, "dilation": 2}),
    (2, 3, {"padding": 1}),
    (2, (2, 5), {"stride": (2, 1), "padding": (0, 3), "dilation": (3, 1)}),
    (3, 3, {"padding": 1}),
    (3, (1, 2, 3), {"stride": (2, 1, 3), "padding": (1, 0, 2), "dilation": (1, 2, 1)}),
)


def _problem(rank: int, kernel_size: Any, settings: dict[str, Any], groups: int = 2) -> tuple[Tensor, Tensor]:
    """x with 6 channels and a kernel for it."""
    size = (11, 7, 6)[:rank]
    options = {"stride": 1, "padding": 0, "dilation": 1} | settings
    window = Window.normalise(rank, kernel_size, **options)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    kernel = torch.randn(2, groups, *window.kernel_size, *window.output_size(size), dtype=torch.float64)
    return x, kernel


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("rank", "kernel_size", "settings"), _WINDOWS)
def test_constant_kernel_is_depthwise_convolution(
    rank: int, kernel_size: Any, settings: dict[str, Any], groups: int
) -> None:
    x, kernel = _problem(rank, kernel_size, settings, groups)
    kernel = kernel[(slice(1), ..., *(slice(1),) * rank)].expand_as(kernel)
    weight = kernel[(0, ..., *(0,) * rank)].repeat_interleave(6 // groups, dim=0).unsqueeze(1)
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    torch.testing.assert_close(involution(x, kernel, **settings), conv(x, weight, groups=6, **settings))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_centre_delta_is_the_identity(rank: int) -> None:
    x, kernel = _problem(rank, 5, {"padding": 4, "dilation": 2})
    kernel.zero_()
    kernel[(slice(None), slice(None), *(2,) * rank)] = 1
    assert torch.equal(involution(x, kernel, padding=4, dilation=2), x)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_delta_at_another_tap_shifts(rank: int) -> None:
    x, kernel = _problem(rank, 3, {"padding": 1})
    kernel.zero_()
    kernel[(slice(None), slice(None), 0, *(1,) * (rank - 1))] = 1  # the tap before the centre of the first axis
    y = involution(x, kernel, padding=1)
    assert torch.equal(y[:, :, 1:], x[:, :, :-1])
    assert not y[:, :, 0].any()


@pytest.mark.parametrize(("rank", "kernel_size", "settings"), [w for w in _WINDOWS if w[0] < 3])
def test_a_leading_axis_of_size_one_changes_nothing(rank: int, kernel_size: Any, settings: dict[str, Any]) -> None:
    """1-D is 2-D of height 1, 2-D is 3-D of depth 1."""
    x, kernel = _problem(rank, kernel_size, settings)
    window = Window.normalise(rank, kernel_size, **({"stride": 1, "padding": 0, "dilation": 1} | settings))
    y = involution(
        x.unsqueeze(2),
        kernel.unsqueeze(2 + rank).unsqueeze(2),
        stride=(1, *window.stride),
        padding=(0, *window.padding),
        dilation=(1, *window.dilation),
    )
    torch.testing.assert_close(y.squeeze(2), involution(x, kernel, **settings))


@pytest.mark.parametrize(("rank", "kernel_size", "settings"), _WINDOWS)
def test_is_linear_in_both_tensors(rank: int, kernel_size: Any, settings: dict[str, Any]) -> None:
    x, kernel = _problem(rank, kernel_size, settings)
    u, v = torch.randn_like(x), torch.randn_like(kernel)
    y = involution(x, kernel, **settings)
    torch.testing.assert_close(involution(2 * x - u, kernel, **settings), 2 * y - involution(u, kernel, **settings))
    torch.testing.assert_close(involution(x, 3 * kernel + v, **settings), 3 * y + involution(x, v, **settings))


def test_settings_may_be_ints_or_one_per_axis() -> None:
    x, kernel = _problem(2, 3, {"stride": 2, "padding": 1})
    expected = involution(x, kernel, stride=2, padding=1)
    assert torch.equal(involution(x, kernel, stride=(2, 2), padding=[1, 1], dilation=torch.Size([1, 1])), expected)
    assert torch.equal(involution(x, kernel, 2, 1, 1), expected)


def test_empty_batch_has_empty_gradients() -> None:
    x = torch.zeros(0, 4, 5, 5, requires_grad=True)
    kernel = torch.zeros(0, 2, 3, 3, 5, 5, requires_grad=True)
    y = involution(x, kernel, padding=1)
    y.sum().backward()
    assert (y.shape, x.grad.shape, kernel.grad.shape) == (x.shape, x.shape, kernel.shape)


def test_runs_on_the_meta_device() -> None:
    x, kernel = (t.to("meta") for t in _problem(2, 3, {"padding": 1}))
    y = involution(x, kernel, padding=1)
    assert (y.shape, y.device.type) == (x.shape, "meta")


_X, _KERNEL = torch.zeros(2, 32, 14, 14), torch.zeros(2, 2, 3, 3, 14, 14)

_MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "x no tensor": (lambda: involution([1.0], _KERNEL), TypeError, "`x` must be a tensor; got list."),
    "kernel no tensor": (lambda: involution(_X, 3), TypeError, "`kernel` must be a tensor; got int."),
    "x unbatched": (
        lambda: involution(_X[0, 0], _KERNEL),
        ValueError,
        "`x` must have 3, 4 or 5 dimensions (B, C, 1 to 3 spatial); got shape (14, 14).",
    ),
    "x of rank 4": (
        lambda: involution(torch.zeros(1, 2, 3, 3, 3, 3), _KERNEL),
        ValueError,
        "`x` must have 3, 4 or 5 dimensions (B, C, 1 to 3 spatial); got shape (1, 2, 3, 3, 3, 3).",
    ),
    "kernel with taps in one axis": (
        lambda: involution(_X, torch.zeros(2, 2, 9, 14, 14), padding=1),
        ValueError,
        "`kernel` must have 6 dimensions (B, G, 2 kernel sizes, 2 output sizes) for `x` of shape (2, 32, 14, 14); "
        "got shape (2, 2, 9, 14, 14).",
    ),
    "kernel without taps": (
        lambda: involution(_X, _KERNEL[:, :, :0], padding=1),
        ValueError,
        "`kernel` must have at least one tap on every axis; got shape (2, 2, 0, 3, 14, 14).",
    ),
    "devices": (
        lambda: involution(_X.to("meta"), _KERNEL, padding=1),
        ValueError,
        "`x` and `kernel` must share a device; got meta and cpu.",
    ),
    "dtypes": (
        lambda: involution(_X.half(), _KERNEL, padding=1),
        TypeError,
        "`x` and `kernel` must share a dtype; got torch.float16 and torch.float32. "
        "Convert one of them; torch.autocast does so for all but float64.",
    ),
    "sparse x": (
        lambda: involution(_X.to_sparse(), _KERNEL, padding=1),
        TypeError,
        "`x` must be a dense tensor; got layout torch.sparse_coo. Use `to_dense()`.",
    ),
    "stride beyond all tensors": (
        lambda: involution(_X, _KERNEL, stride=2**63),
        ValueError,
        f"`stride` must be at most {2**31 - 1} on every axis; got {2**63}.",
    ),
    "integer x": (
        lambda: involution(_X.int(), _KERNEL.int(), padding=1),
        TypeError,
        "`x` must have one of the dtypes float64, float32, bfloat16, float16; got torch.int32.",
    ),
    "complex kernel": (
        lambda: involution(_X, _KERNEL.to(torch.complex64), padding=1),
        TypeError,
        "`kernel` must have one of the dtypes float64, float32, bfloat16, float16; got torch.complex64.",
    ),
    "batch": (
        lambda: involution(_X, _KERNEL[:1], padding=1),
        ValueError,
        "`kernel` has batch size 1, `x` has 2; they must be equal.",
    ),
    "groups": (
        lambda: involution(_X, torch.zeros(2, 6, 3, 3, 14, 14), padding=1),
        ValueError,
        "`kernel` has 6 groups, which does not divide the 32 channels of `x`.",
    ),
    "no groups": (
        lambda: involution(_X, _KERNEL[:, :0], padding=1),
        ValueError,
        "`kernel` has 0 groups, which does not divide the 32 channels of `x`.",
    ),
    "no channels": (
        lambda: involution(_X[:, :0], _KERNEL, padding=1),
        ValueError,
        "`kernel` has 2 groups, which does not divide the 0 channels of `x`.",
    ),
    "kernel of the input's resolution": (
        lambda: involution(_X, _KERNEL, stride=2, padding=1),
        ValueError,
        "`kernel` must end in the output size (7, 7) for `x` of spatial size (14, 14), kernel size (3, 3), "
        "stride (2, 2), padding (1, 1) and dilation (1, 1); got (14, 14). Was it generated at the input resolution?",
    ),
    "kernel of another size": (
        lambda: involution(_X, _KERNEL[..., :13], padding=1),
        ValueError,
        "`kernel` must end in the output size (14, 14) for `x` of spatial size (14, 14), kernel size (3, 3), "
        "stride (1, 1), padding (1, 1) and dilation (1, 1); got (14, 13).",
    ),
    "x too small": (
        lambda: involution(_X[..., :2], _KERNEL),
        ValueError,
        "`x` has spatial size (14, 2), too small for a window that spans (3, 3) with padding (0, 0). "
        "Use a smaller `kernel_size` or `dilation`, or more `padding`.",
    ),
    "stride 0": (
        lambda: involution(_X, _KERNEL, stride=0),
        ValueError,
        "`stride` must be at least 1 on every axis; got 0.",
    ),
    "negative dilation": (
        lambda: involution(_X, _KERNEL, dilation=(1, -1)),
        ValueError,
        "`dilation` must be at least 1 on every axis; got (1, -1).",
    ),
    "negative padding": (
        lambda: involution(_X, _KERNEL, padding=-1),
        ValueError,
        "`padding` must be at least 0 on every axis; got -1.",
    ),
    "padding in words": (
        lambda: involution(_X, _KERNEL, padding="same"),
        TypeError,
        "`padding` must be an int or one int per spatial axis, 2 here; got 'same'.",
    ),
    "a stride too many": (
        lambda: involution(_X, _KERNEL, stride=(1, 1, 1)),
        ValueError,
        "`stride` must be an int or one int per spatial axis, 2 here; got (1, 1, 1).",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), _MISTAKES.values(), ids=_MISTAKES)
def test_mistakes(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        call()


def test_autocast_does_not_hide_an_integer_input() -> None:
    with torch.autocast("cpu"), pytest.raises(TypeError, match="`x` must have one of the dtypes"):
        involution(_X.int(), _KERNEL, padding=1)
