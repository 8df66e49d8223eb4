"""Window geometry: sizes counted position by position, and a sentence for every setting that makes no sense."""

import re
from dataclasses import FrozenInstanceError
from itertools import product

import pytest
import torch

from involution.ops.window import Window, per_axis


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 7])
def test_output_size_counts_where_a_window_fits(kernel_size: int, stride: int, padding: int, dilation: int) -> None:
    window = Window.normalise(1, kernel_size, stride, padding, dilation)
    for size in range(15):
        padded = size + 2 * padding
        starts = [s for s in range(0, padded, stride) if s + dilation * (kernel_size - 1) < padded]
        if starts:
            assert window.output_size((size,)) == (len(starts),)
        else:
            with pytest.raises(ValueError, match="too small"):
                window.output_size((size,))


def test_output_size_equals_convolution() -> None:
    for stride, padding, dilation in product([1, (2, 3)], [0, (1, 4)], [1, (3, 2)]):
        window = Window.normalise(2, (3, 2), stride, padding, dilation)
        expected = torch.nn.functional.conv2d(
            torch.zeros(1, 1, 11, 8), torch.zeros(1, 1, 3, 2), None, stride, padding, dilation
        ).shape[2:]
        assert window.output_size((11, 8)) == tuple(expected)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (2, 1), (3, 1), (3, 4), (4, 3), (7, 2)])
def test_same_padding_keeps_the_size(kernel_size: int, dilation: int) -> None:
    window = Window.normalise(1, kernel_size, 1, 0, dilation)
    ((before, after),) = window.same_padding()
    assert 0 <= after - before <= 1
    assert window.output_size((20 + before + after,)) == (20,)


def test_span_reaches_from_the_first_tap_to_the_last() -> None:
    assert Window.normalise(3, (1, 3, 4), 1, 0, (5, 1, 2)).span() == (1, 3, 7)


def test_normalise_spells_every_setting_out() -> None:
    assert Window.normalise(2, 3, (1, 2), [0, 4], torch.Size([1, 5])) == Window((3, 3), (1, 2), (0, 4), (1, 5))


def test_a_window_does_not_change() -> None:
    window = Window.normalise(1, 3, 1, 1, 1)
    with pytest.raises(FrozenInstanceError):
        window.stride = (2,)
    assert hash(window) == hash(Window.normalise(1, [3], (1,), 1, 1))


def test_whatever_is_an_int_to_python_is_one_here() -> None:
    entries = per_axis("stride", [torch.tensor(2), 3], 2, least=1)
    assert entries == (2, 3)
    assert [type(entry) for entry in entries] == [int, int]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ((1, 2, 3), ValueError, "`stride` must be an int or one int per spatial axis, 2 here; got (1, 2, 3)."),
        ((), ValueError, "`stride` must be an int or one int per spatial axis, 2 here; got ()."),
        (0, ValueError, "`stride` must be at least 1 on every axis; got 0."),
        ((2, -1), ValueError, "`stride` must be at least 1 on every axis; got (2, -1)."),
        (1.5, TypeError, "`stride` must be an int or one int per spatial axis, 2 here; got 1.5."),
        (2.0, TypeError, "`stride` must be an int or one int per spatial axis, 2 here; got 2.0."),
        (float("nan"), TypeError, "`stride` must be an int or one int per spatial axis, 2 here; got nan."),
        ((1, 2.5), TypeError, "`stride` must be an int or one int per spatial axis, 2 here; got (1, 2.5)."),
        (None, TypeError, "`stride` must be an int or one int per spatial axis, 2 here; got None."),
        ("same", TypeError, "`stride` must be an int or one int per spatial axis, 2 here; got 'same'."),
    ],
)
def test_a_setting_that_makes_no_sense(value: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        per_axis("stride", value, 2, least=1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ((0, 1, 0, 1), "`kernel_size` must be at least 1 on every axis; got 0."),
        ((3, 0, 0, 1), "`stride` must be at least 1 on every axis; got 0."),
        ((3, 1, (0, -1), 1), "`padding` must be at least 0 on every axis; got (0, -1)."),
        ((3, 1, 0, -2), "`dilation` must be at least 1 on every axis; got -2."),
    ],
)
def test_errors_name_the_setting(settings: tuple, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Window.normalise(2, *settings)


def test_an_input_smaller_than_the_window() -> None:
    text = (
        "`x` has spatial size (9, 2), too small for a window that spans (5, 5) with padding (0, 1). "
        "Use a smaller `kernel_size` or `dilation`, or more `padding`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Window.normalise(2, 3, 1, (0, 1), 2).output_size((9, 2))
