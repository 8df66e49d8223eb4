"""The layers: their shapes in every geometry, what their parts compute, and a sentence for every mistake."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from involution import BottleneckGenerator, Involution1d, Involution2d, Involution3d, involution
from involution.pointwise import PointwiseConv1d, PointwiseConv2d, PointwiseConv3d

LAYERS = (Involution1d, Involution2d, Involution3d)
_each_rank = pytest.mark.parametrize("rank", [1, 2, 3])


def _settled(layer: nn.Module) -> nn.Module:
    """`layer` in float64 and in evaluation, its batch norm with statistics of its own."""
    layer = layer.double().eval()
    for module in layer.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return layer


# Shapes


@pytest.mark.parametrize(
    "size", [(1,), (2,), (7,), (13,), (1, 2), (7, 7), (13, 7), (14, 9), (1, 1, 1), (7, 3, 2), (13, 3, 6)], ids=str
)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_default_padding_divides_the_size_by_the_stride(size: tuple[int, ...], stride: int, kernel_size: int) -> None:
    layer = LAYERS[len(size) - 1](4, kernel_size, stride, groups=2)
    y = layer(torch.randn(2, 4, *size))
    assert y.shape == (2, 4, *(-(-s // stride) for s in size))


@_each_rank
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [2, 3, 5])
def test_the_generators_grid_is_the_operators(
    rank: int, kernel_size: int, stride: int, padding: int, dilation: int
) -> None:
    layer = LAYERS[rank - 1](2, kernel_size, stride, padding, dilation, groups=1, reduction=1).eval()
    for size in ((11, 12, 13), (14, 11, 12)):
        x = torch.randn(1, 2, *size[:rank])
        assert layer(x).shape[2:] == layer.window.output_size(size[:rank])


def test_settings_per_axis() -> None:
    layer = Involution2d(8, (3, 6), stride=(1, 3), padding=(4, 0), dilation=(2, 1), groups=2)
    assert layer(torch.randn(2, 8, 5, 14)).shape == (2, 8, 9, 3)


def test_even_kernels_keep_the_size_where_dilation_allows() -> None:
    assert Involution1d(4, 4, dilation=2, groups=2)(torch.randn(2, 4, 9)).shape == (2, 4, 9)


@_each_rank
def test_out_channels_projects(rank: int) -> None:
    layer = LAYERS[rank - 1](8, 3, groups=2, out_channels=5)
    x = torch.randn(2, 8, *(5, 4, 3)[:rank])
    assert layer(x).shape == (2, 5, *x.shape[2:])
    assert isinstance(LAYERS[rank - 1](8, 3, groups=2, out_channels=8).project, nn.Identity)


def test_empty_batch() -> None:
    assert Involution2d(16)(torch.randn(0, 16, 9, 9)).shape == (0, 16, 9, 9)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_groups_or_group_channels(groups: int) -> None:
    layers = Involution2d(8, 3, groups=groups), Involution2d(8, 3, group_channels=8 // groups)
    for layer in layers:
        assert layer.groups == groups
        assert layer.generator(torch.randn(2, 8, 5, 4)).shape == (2, groups, 3, 3, 5, 4)
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 8, 5, 4)
    assert torch.equal(layers[0](x), layers[1](x))


def test_sixteen_channels_a_group_by_default() -> None:
    assert Involution2d(64).groups == 4


# What the layer computes


@pytest.mark.parametrize("stride", [1, 2])
def test_equals_the_official_formula(stride: int) -> None:
    """Unfold, multiply, sum over the taps: the authors' module, on sizes its stride divides."""
    layer = _settled(Involution2d(32, 5, stride))
    x = torch.randn(2, 32, 8, 6, dtype=torch.float64)
    g = layer.generator
    pooled = F.avg_pool2d(x, stride) if stride > 1 else x
    kernel = g.span(F.relu(g.norm(g.reduce(pooled))))
    out = kernel.shape[2:]
    columns = F.unfold(x, 5, padding=2, stride=stride).view(2, 2, 16, 25, *out)
    expected = (kernel.view(2, 2, 1, 25, *out) * columns).sum(3).view(2, 32, *out)
    torch.testing.assert_close(layer(x), expected)


@_each_rank
@pytest.mark.parametrize(("kernel_size", "dilation", "more"), [(3, 1, 2), (5, 1, 1), (3, 2, 3)])
def test_padding_cuts_or_widens_the_result(rank: int, kernel_size: int, dilation: int, more: int) -> None:
    """The same outputs at the same places, whatever the padding: fewer of them without, more of them with much."""
    same = dilation * (kernel_size - 1) // 2
    layers = [
        _settled(LAYERS[rank - 1](4, kernel_size, padding=padding, dilation=dilation, groups=2))
        for padding in (None, 0, same + more)
    ]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 4, *(11, 10, 9)[:rank], dtype=torch.float64)
    y, fewer, wider = (layer(x) for layer in layers)
    torch.testing.assert_close(fewer, y[(..., *(slice(same, -same),) * rank)])
    torch.testing.assert_close(wider[(..., *(slice(more, -more),) * rank)], y)


def test_even_kernels_are_generated_from_the_window_centres() -> None:
    """With K = 4 the second tap is the centre: output o is generated from x at o - padding + 1."""
    layer = Involution1d(2, 4, padding=1, groups=1, generator=lambda x: x[:, :1].unsqueeze(2).expand(-1, -1, 4, -1))
    x = torch.randn(1, 2, 9)
    expected = involution(x, x[:, :1, :-1].unsqueeze(2).expand(-1, -1, 4, -1), padding=1)
    assert torch.equal(layer(x), expected)


@_each_rank
@pytest.mark.parametrize("stride", [2, 3])
def test_partial_pooling_windows_average_what_they_cover(rank: int, stride: int) -> None:
    generator = BottleneckGenerator(4, 2, (3,) * rank, (stride,) * rank)
    x = torch.full((1, 4, *(7, 5, 4)[:rank]), 3.0)
    pooled = generator._pool(x)
    assert pooled.shape[2:] == tuple(-(-s // stride) for s in x.shape[2:])
    torch.testing.assert_close(pooled, torch.full_like(pooled, 3.0))


def test_any_callable_generates() -> None:
    """A callable that gives every position the centre delta makes the layer the identity."""

    def delta(x: Tensor) -> Tensor:
        kernel = x.new_zeros(x.shape[0], 1, 3, 3, *x.shape[2:])
        kernel[:, :, 1, 1] = 1
        return kernel

    layer = Involution2d(4, 3, groups=1, generator=delta)
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(layer(x), x)
    assert not list(layer.parameters())


def test_a_module_that_generates_is_part_of_the_layer() -> None:
    generator = nn.Sequential(nn.Conv2d(8, 2 * 9, 1), nn.Unflatten(1, (2, 3, 3)))
    layer = Involution2d(8, 3, groups=2, generator=generator)
    assert layer(torch.randn(2, 8, 5, 4)).shape == (2, 8, 5, 4)
    assert set(layer.state_dict()) == {"generator.0.weight", "generator.0.bias"}


def test_an_empty_module_is_a_generator_too() -> None:
    """`nn.Sequential()` is false in Python, yet it was given."""
    generator = nn.Sequential()
    assert Involution2d(8, 3, groups=2, generator=generator).generator is generator


def test_norm_and_act_are_replaced() -> None:
    layer = Involution2d(16, 3, reduction=2, norm=lambda width: nn.GroupNorm(2, width), act=nn.GELU)
    assert isinstance(layer.generator.norm, nn.GroupNorm)
    assert layer.generator.norm.num_channels == 8
    assert isinstance(layer.generator.act, nn.GELU)
    assert layer(torch.randn(1, 16, 1, 1)).shape == (1, 16, 1, 1)


def test_state_dict_keys() -> None:
    expected = {
        "generator.reduce.weight": (8, 32, 1, 1),
        "generator.norm.weight": (8,),
        "generator.norm.bias": (8,),
        "generator.norm.running_mean": (8,),
        "generator.norm.running_var": (8,),
        "generator.norm.num_batches_tracked": (),
        "generator.span.weight": (18, 8, 1, 1),
        "generator.span.bias": (18,),
        "project.weight": (48, 32, 1, 1),
        "project.bias": (48,),
    }
    layer = Involution2d(32, 3, stride=2, out_channels=48)
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == expected
    assert not [key for key in Involution2d(32, 3).state_dict() if key.startswith("project")]


@_each_rank
def test_every_parameter_learns(rank: int) -> None:
    layer = LAYERS[rank - 1](8, 3, stride=2, groups=2, out_channels=6)
    x = torch.randn(2, 8, *(7, 5, 4)[:rank], requires_grad=True)
    layer(x).square().sum().backward()
    for name, tensor in (("x", x), *layer.named_parameters()):
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


def test_channels_last_goes_through() -> None:
    layer = Involution2d(32, 7, stride=2).to(memory_format=torch.channels_last)
    y = layer(torch.randn(2, 32, 14, 14).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = Involution2d(16, 3)(torch.randn(1, 16, 5, 5))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


def test_repr_says_the_settings() -> None:
    text = repr(Involution2d(64, 7, 2))
    settings = "64, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), dilation=(1, 1), groups=4"
    assert text.startswith(f"Involution2d(\n  {settings}\n")


# Mistakes

_layer = Involution2d(32, 3)

_MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "kernel_size is a float": (
        lambda: Involution2d(32, 3.0),
        TypeError,
        "`kernel_size` must be an int or one int per spatial axis, 2 here; got 3.0.",
    ),
    "kernel_size is NaN": (
        lambda: Involution2d(32, float("nan")),
        TypeError,
        "`kernel_size` must be an int or one int per spatial axis, 2 here; got nan.",
    ),
    "kernel_size has an entry too many": (
        lambda: Involution1d(32, (3, 3)),
        ValueError,
        "`kernel_size` must be an int or one int per spatial axis, 1 here; got (3, 3).",
    ),
    "kernel_size is 0": (
        lambda: Involution2d(32, 0),
        ValueError,
        "`kernel_size` must be at least 1 on every axis; got 0.",
    ),
    "kernel_size is even": (
        lambda: Involution2d(32, (3, 4)),
        ValueError,
        "no `padding` keeps the size with `kernel_size` (3, 4) and `dilation` 1; give `padding` yourself.",
    ),
    "stride is 0": (lambda: Involution2d(32, 3, 0), ValueError, "`stride` must be at least 1 on every axis; got 0."),
    "padding is negative": (
        lambda: Involution2d(32, 3, padding=-1),
        ValueError,
        "`padding` must be at least 0 on every axis; got -1.",
    ),
    "dilation is 0": (
        lambda: Involution2d(32, 3, dilation=(1, 0)),
        ValueError,
        "`dilation` must be at least 1 on every axis; got (1, 0).",
    ),
    "both groups and group_channels": (
        lambda: Involution2d(32, 3, groups=2, group_channels=16),
        ValueError,
        "give `groups` or `group_channels`, not both; got 2 and 16.",
    ),
    "groups do not divide": (
        lambda: Involution2d(32, 3, groups=6),
        ValueError,
        "`groups` must divide the channels; got groups 6 and 32 channels. Choose from 1, 2, 4, 8, 16, 32.",
    ),
    "group_channels do not divide": (
        lambda: Involution2d(24, 3),
        ValueError,
        "`group_channels` must divide the channels; got group_channels 16 and 24 channels. "
        "Choose from 1, 2, 3, 4, 6, 8, 12, 24.",
    ),
    "groups is 0": (lambda: Involution2d(32, 3, groups=0), ValueError, "`groups` must be at least 1; got 0."),
    "group_channels is 0": (
        lambda: Involution2d(32, 3, group_channels=0),
        ValueError,
        "`group_channels` must be at least 1; got 0.",
    ),
    "groups is a float": (lambda: Involution2d(32, 3, groups=2.0), TypeError, "`groups` must be an int; got 2.0."),
    "channels is a float": (lambda: Involution2d(32.0, 3), TypeError, "`channels` must be an int; got 32.0."),
    "channels is 0": (lambda: Involution2d(0, 3), ValueError, "`channels` must be at least 1; got 0."),
    "reduction does not divide": (
        lambda: Involution2d(32, 3, reduction=5),
        ValueError,
        "`reduction` must divide the channels; got reduction 5 and 32 channels.",
    ),
    "reduction is 0": (
        lambda: Involution2d(32, 3, reduction=0),
        ValueError,
        "`reduction` must be at least 1; got 0.",
    ),
    "out_channels is 0": (
        lambda: Involution2d(32, 3, out_channels=0),
        ValueError,
        "`out_channels` must be at least 1; got 0.",
    ),
    "the generator's kernel_size is an int": (
        lambda: BottleneckGenerator(32, 2, 3, 1),
        TypeError,
        "`kernel_size` must be a tuple of 1 to 3 ints, one per spatial axis; got 3.",
    ),
    "the generator's stride is of another rank": (
        lambda: BottleneckGenerator(32, 2, (3, 3), (1,)),
        ValueError,
        "`stride` must be an int or one int per spatial axis, 2 here; got (1,).",
    ),
    "x is no tensor": (lambda: _layer([1.0]), TypeError, "`x` must be a tensor; got list."),
    "x has no batch": (
        lambda: _layer(torch.zeros(32, 5, 5)),
        ValueError,
        "`x` must have shape (B, 32, 2 spatial sizes) for Involution2d with 32 channels; got (32, 5, 5).",
    ),
    "x has other channels": (
        lambda: _layer(torch.zeros(1, 16, 5, 5)),
        ValueError,
        "`x` must have shape (B, 32, 2 spatial sizes) for Involution2d with 32 channels; got (1, 16, 5, 5).",
    ),
    "x is smaller than the window": (
        lambda: Involution2d(32, 3, padding=0)(torch.zeros(1, 32, 5, 2)),
        ValueError,
        "`x` has spatial size (5, 2), too small for a window that spans (3, 3) with padding (0, 0). "
        "Use a smaller `kernel_size` or `dilation`, or more `padding`.",
    ),
    "act is a module": (
        lambda: Involution2d(32, 3, act=nn.Identity()),
        TypeError,
        "`act` must be what makes a module, such as nn.ReLU, not a module; got Identity().",
    ),
    "norm is a name": (
        lambda: Involution2d(32, 3, norm="bn"),
        TypeError,
        "`norm` must be what makes a module, such as nn.BatchNorm2d, not a module; got 'bn'.",
    ),
    "generator is a number": (
        lambda: Involution2d(32, 3, generator=3),
        TypeError,
        "`generator` must be callable, from x to the kernel; got 3.",
    ),
    "x has another dtype": (
        lambda: _layer(torch.zeros(1, 32, 5, 5, dtype=torch.float64)),
        TypeError,
        "`x` and the layer must share a dtype; got torch.float64 and torch.float32. "
        "Convert one with `.to()`, or work under torch.autocast.",
    ),
    "x is on another device": (
        lambda: _layer(torch.zeros(1, 32, 5, 5, device="meta")),
        ValueError,
        "`x` and the layer must share a device; got meta and cpu.",
    ),
    "the generator returns no tensor": (
        lambda: Involution2d(32, 3, generator=lambda x: None)(torch.zeros(1, 32, 5, 5)),
        TypeError,
        "`kernel` must be a tensor; got NoneType.",
    ),
    "the generator ignores the stride": (
        lambda: Involution2d(32, 3, 2, generator=lambda x: x.new_zeros(1, 2, 3, 3, 6, 6))(torch.zeros(1, 32, 6, 6)),
        ValueError,
        "`kernel` must end in the output size (3, 3) for `x` of spatial size (6, 6), kernel size (3, 3), "
        "stride (2, 2), padding (1, 1) and dilation (1, 1); got (6, 6). Was it generated at the input resolution?",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("face", [Involution1d, Involution2d, Involution3d])
def test_every_rank_and_dtype_with_stride(face: type[nn.Module], dtype: torch.dtype) -> None:
    layer = face(32, 3, 2).to(dtype).eval()
    x = torch.randn(2, 32, *(7, 4, 3)[: face.rank], dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = layer.double()(x.double()).detach()
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps * float(exact.abs().max()))


@pytest.mark.parametrize(("call", "error", "text"), _MISTAKES.values(), ids=_MISTAKES)
def test_mistakes(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        call()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("innermost", [True, False])
def test_pointwise_convolution_equals_the_convolution(rank: int, stride: int, innermost: bool) -> None:
    """The matrix product, taken where channels lie innermost, gives the convolution's numbers, gradients and layout."""
    torch.manual_seed(0)
    ours = (PointwiseConv1d, PointwiseConv2d, PointwiseConv3d)[rank - 1](6, 4, stride).double()
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](6, 4, 1, stride).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, *(7, 5, 3)[:rank], 6, dtype=torch.float64).movedim(-1, 1)
    x = x if innermost else x.contiguous()
    results = []
    for layer in (ours, plain):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert (results[0][0].stride(1) == 1) == innermost


def test_pointwise_convolution_takes_one_image_without_a_batch() -> None:
    layer = PointwiseConv2d(6, 4)
    x = torch.randn(6, 1, 3)
    torch.testing.assert_close(layer(x), layer(x[None])[0])
