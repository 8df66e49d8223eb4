"""Kernel generators against their formulas, and what does not fit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from involution import Involution1d, Involution2d, Involution3d, involution
from involution.generators import AttentionGenerator, LinearGenerator, NeighbourhoodGenerator
from involution.ops.functional import local_products

LAYERS = (Involution1d, Involution2d, Involution3d)
NAMES = ("linear", "neighbourhood", "attention")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def neighbours(x: torch.Tensor, size: int, stride: int, dilation: int) -> torch.Tensor:
    """(B, C, K * K, *O): what a window around each position sees."""
    span = dilation * (size - 1)
    columns = F.unfold(x, size, dilation, span // 2, stride)
    out = [(side - 1) // stride + 1 for side in x.shape[2:]]
    return columns.view(x.shape[0], x.shape[1], size * size, *out)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 2)])
def test_local_products_are_products_with_neighbours(stride: int, dilation: int) -> None:
    x = torch.randn(2, 6, 7, 9, dtype=torch.double, requires_grad=True)
    seen = neighbours(x, 3, stride, dilation)
    query = torch.randn(2, 6, *seen.shape[3:], dtype=torch.double, requires_grad=True)
    expected = (query.unsqueeze(2) * seen).unflatten(1, (2, 3)).sum(2)
    got = local_products(query, x, 2, 3, stride, dilation, dilation)
    torch.testing.assert_close(got.flatten(2, 3), expected)
    grad = torch.randn_like(expected)
    for mine, right in zip(
        torch.autograd.grad(got.flatten(2, 3), (query, x), grad),
        torch.autograd.grad(expected, (query, x), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, right)


# torch scripts its own forward-mode formulas, with its own deprecated compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_local_products_carry_tangents() -> None:
    query, x = (torch.randn(1, 4, 4, 5, dtype=torch.double, requires_grad=True) for _ in range(2))

    def run(query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return local_products(query, x, 2, 3, padding=1)

    assert torch.autograd.gradcheck(run, (query, x), check_forward_ad=True, check_backward_ad=False)
    dx = torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda x: run(query, x), (x,), (dx,))
    torch.testing.assert_close(tangent, run(query, dx))


@pytest.mark.parametrize("groups", ["2", 2.0, None])
def test_groups_of_local_products_are_whole(groups: object) -> None:
    x = torch.randn(1, 4, 5, 5)
    with pytest.raises(TypeError, match="`groups` must be an int; got"):
        local_products(x, x, groups, 3, padding=1)


@pytest.mark.parametrize(
    ("query", "settings", "message"),
    [
        ((2, 6, 5, 5), (4, 3, 1, 1), "`groups` must divide the 6 channels of `query` and `x`; got 4."),
        ((2, 6, 5, 5), (0, 3, 1, 1), "`groups` must be at least 1; got 0."),
        ((2, 4, 5, 5), (2, 3, 1, 1), "`query` must have as many dimensions and channels as `x`"),
        ((2, 6, 5), (2, 3, 1, 1), "`query` must have as many dimensions and channels as `x`"),
        ((1, 6, 5, 5), (2, 3, 1, 1), "`query` has batch size 1, `x` has 2"),
        ((2, 6, 5, 5), (2, 3, 2, 1), r"`query` must end in the output size \(3, 3\)"),
    ],
)
def test_local_products_refuse_what_does_not_fit(query, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        local_products(torch.randn(query), torch.randn(2, 6, 5, 5), *settings)


def test_linear_is_one_product() -> None:
    generator = LinearGenerator(8, 2, (3, 3), (2, 2)).double()
    x = torch.randn(2, 8, 5, 7, dtype=torch.double)
    pooled = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    expected = torch.einsum("kc,bchw->bkhw", generator.span.weight[:, :, 0, 0], pooled)
    expected = expected + generator.span.bias[:, None, None]
    torch.testing.assert_close(generator(x), expected.unflatten(1, (2, 3, 3)))


@pytest.mark.parametrize("stride", [1, 2])
def test_neighbourhood_reaches_as_far_as_the_kernel(stride: int) -> None:
    generator = NeighbourhoodGenerator(8, 2, (5, 5), (stride, stride), act=nn.Tanh).double().eval()
    x = torch.randn(1, 8, 13, 13, dtype=torch.double, requires_grad=True)
    kernel = generator(x)
    assert kernel.shape == (1, 2, 5, 5, *[(13 - 1) // stride + 1] * 2)
    (grad,) = torch.autograd.grad(kernel[..., 6 // stride, 6 // stride].sum(), x)
    seen = grad[0].abs().sum(0) > 0
    assert seen[4:9, 4:9].all()
    assert seen.sum() == 25


@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_attention_is_attention(stride: int, dilation: int, softmax: bool, position: bool) -> None:
    sizes = ((3, 3), (stride, stride), (dilation, dilation))
    generator = AttentionGenerator(16, 2, *sizes, reduction=2, position=position, softmax=softmax).double()
    x = torch.randn(2, 16, 7, 8, dtype=torch.double)
    pooled = F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)
    query = F.conv2d(pooled, generator.query.weight).unflatten(1, (2, 4))
    key = neighbours(F.conv2d(x, generator.key.weight), 3, stride, dilation).unflatten(1, (2, 4))
    if position:
        key = key + generator.position.transpose(1, 2)[None, ..., None, None]
    logits = torch.einsum("bgdhw,bgdthw->bgthw", query, key) / 2  # sqrt of 4 channels a head
    kernel = logits.softmax(2) if softmax else logits
    torch.testing.assert_close(generator(x), kernel.unflatten(2, (3, 3)))
    layer = Involution2d(16, 3, stride, dilation=dilation, groups=2, generator=generator)
    seen = neighbours(x, 3, stride, dilation).unflatten(1, (2, 8))
    expected = torch.einsum("bgthw,bgcthw->bgchw", kernel, seen).flatten(1, 2)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_layers_take_generators_by_name(rank: int, name: str, stride: int, dilation: int) -> None:
    layer = LAYERS[rank - 1](8, 3, stride, dilation=dilation, groups=2, reduction=2, generator=name).eval()
    x = torch.randn(2, 8, *(9, 7, 5)[:rank])
    y = layer(x)
    assert y.shape == (2, 8, *[(side - 1) // stride + 1 for side in x.shape[2:]])
    window = layer.window
    torch.testing.assert_close(y, involution(x, layer.generator(x), window.stride, window.padding, window.dilation))


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name: str) -> None:
    layer = Involution2d(4, 3, 2, groups=2, reduction=2, norm=nn.Identity, act=nn.Tanh, generator=name).double()
    x = torch.randn(1, 4, 4, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph(name: str) -> None:
    layer = Involution2d(8, 3, groups=2, reduction=2, generator=name).eval()
    x = torch.randn(1, 8, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator": "bottlneck"}, "`generator`: unknown generator 'bottlneck'; did you mean 'bottleneck'?"),
        ({"generator": "neighbourhood", "kernel_size": 4, "padding": 1}, "`kernel_size` must be odd for a neighb"),
        ({"generator": "attention", "kernel_size": 4, "padding": 1}, "`kernel_size` must be odd for keys around"),
        ({"generator": "attention", "groups": 8}, "`groups` must divide the 4 channels of queries and keys; got 8 g"),
        ({"generator": "attention", "reduction": 3}, "`reduction` must divide the channels; got reduction 3 and 16"),
    ],
)
def test_settings_that_do_not_fit(settings, message) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        Involution2d(16, **({"groups": 2} | settings))


@pytest.mark.parametrize(
    ("generator", "settings", "message"),
    [
        (
            LinearGenerator(16, 2, (3, 3), (1, 1)),
            {"kernel_size": 5},
            r"shape \(2, 5, 5\); got one of sh",
        ),
        (LinearGenerator(16, 2, (3, 3), (1, 1)), {"groups": 4}, r"shape \(4, 3, 3\); got one of shape \(2, 3, 3\)"),
        (LinearGenerator(16, 2, (3, 3), (2, 2)), {}, r"stride \(1, 1\); got one of stride \(2, 2\)"),
        (AttentionGenerator(16, 2, (3, 3), (1, 1), (2, 2)), {}, r"dilation \(1, 1\); got one of dilation \(2, 2\)"),
        (AttentionGenerator(16, 2, (5, 5), (1, 1)), {}, r"shape \(2, 3, 3\); got one of shape \(2, 5, 5\)"),
        ("attention", {"padding": 0}, r"`padding` must be at least \(1, 1\) for AttentionGenerator.* got \(0, 0\)"),
        ("neighbourhood", {"padding": (1, 0)}, r"`padding` must be at least \(1, 1\) for NeighbourhoodGenerator"),
    ],
)
def test_a_generator_made_for_another_layer(generator, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Involution2d(16, **({"kernel_size": 3, "groups": 2, "generator": generator} | settings))
