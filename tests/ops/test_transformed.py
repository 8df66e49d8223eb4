"""Forward-mode differentiation and the transforms of torch.func, nested."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from involution import Involution2d, involution
from involution.ops.functional import generated_involution, local_products

X, KERNEL = torch.randn(1, 4, 3, 2, dtype=torch.float64), torch.randn(1, 2, 3, 3, 3, 2, dtype=torch.float64)
TRANSFORMS: dict[str, Callable[..., Any]] = {"forward": jacfwd, "reverse": jacrev}
_ORDERS = [order for order in product(TRANSFORMS, repeat=3) if order.count("forward") < 2]
pytestmark = [
    # torch scripts its own forward-mode formulas, with its own deprecated compiler
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]


def _unfolded(x: Tensor, kernel: Tensor) -> Tensor:
    size = kernel.shape[2:4]
    columns = F.unfold(x, size, padding=_padding(kernel)).unflatten(1, (2, 2, -1)).unflatten(-1, x.shape[2:])
    return (columns * kernel.flatten(2, 3).unsqueeze(2)).sum(3).flatten(1, 2)


def _ours(x: Tensor, kernel: Tensor) -> Tensor:
    return involution(x, kernel, padding=_padding(kernel))


def _padding(kernel: Tensor) -> tuple[int, ...]:
    return tuple(size // 2 for size in kernel.shape[2:4])


def _cubed(operator: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, kernel: (operator(x, kernel) ** 3).sum()


@pytest.mark.parametrize("arguments", list(product((0, 1), repeat=3)))
@pytest.mark.parametrize("order", _ORDERS, ids=" of ".join)
def test_derivatives_of_derivatives(order: tuple[str, ...], arguments: tuple[int, ...]) -> None:
    ours, expected = _cubed(_ours), _cubed(_unfolded)
    for name, argument in zip(order, arguments, strict=True):
        ours, expected = (TRANSFORMS[name](f, argument) for f in (ours, expected))
    x, kernel = X[..., :2, :1], KERNEL[..., :1, :2, :1]  # few, as there are as many derivatives as their product
    torch.testing.assert_close(ours(x, kernel), expected(x, kernel))


@pytest.mark.parametrize("inner", [lambda f: f, grad])
def test_what_torch_would_make_zero_is_refused(inner: Callable[..., Any]) -> None:
    derivative = jacfwd(jacfwd(inner(_cubed(_ours)), 1), 0)
    with pytest.raises(NotImplementedError, match=r"are not served. Take one of them in reverse mode: torch.func.hess"):
        derivative(X, KERNEL)


def test_keys_and_queries() -> None:
    def ours(query: Tensor, x: Tensor) -> Tensor:
        return (local_products(query, x, 2, 3, padding=1) ** 3).sum()

    def expected(query: Tensor, x: Tensor) -> Tensor:
        columns = F.unfold(x, 3, padding=1).unflatten(1, (2, 2, 9)).unflatten(-1, x.shape[2:])
        return ((columns * query.unflatten(1, (2, 2)).unsqueeze(3)).sum(2) ** 3).sum()

    query = torch.randn_like(X)
    for transform in (grad, lambda f: jacfwd(jacrev(f)), lambda f: jacrev(jacfwd(f, 1), 0)):
        torch.testing.assert_close(transform(ours)(query, X), transform(expected)(query, X))


@pytest.mark.parametrize("create_graph", [False, True])
def test_forward_over_reverse(create_graph: bool) -> None:
    """A Hessian times a vector by dual numbers, without torch.func."""
    direction, products = torch.randn_like(X), []
    for operator in (_ours, _unfolded):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(X.clone().requires_grad_(), direction)
            loss = _cubed(operator)(x, KERNEL)
            (gradient,) = torch.autograd.grad(loss, x, create_graph=create_graph)
            products.append(forward_ad.unpack_dual(gradient).tangent)
    torch.testing.assert_close(*products)


def test_weights_of_a_layer() -> None:
    """Against the layer that stores its kernel, by plain differentiation twice."""
    layer, x = Involution2d(8, 3, group_channels=4).double().eval(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(layer, weights, x) ** 2).sum()

    directions = {name: torch.randn_like(w) for name, w in weights.items()}
    gradients, products = jvp(grad(loss), (weights,), (directions,))
    own = dict(layer.named_parameters())
    first = torch.autograd.grad((layer(x) ** 2).sum(), list(own.values()), create_graph=True)
    along = sum((g * directions[name]).sum() for name, g in zip(own, first, strict=True))
    second = torch.autograd.grad(along, list(own.values()))
    for name, g, product_ in zip(own, first, second, strict=True):
        torch.testing.assert_close(gradients[name], g.detach())
        torch.testing.assert_close(products[name], product_)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (2, 3)])
def test_gradients_of_each_sample(in_dims: tuple[int | None, int | None]) -> None:
    x, kernel = (
        t if axis is None else torch.stack([t, 2 * t, -t], axis) for t, axis in zip((X, KERNEL), in_dims, strict=True)
    )
    found = vmap(grad(_cubed(_ours), (0, 1)), in_dims)(x, kernel)
    expected = vmap(grad(_cubed(_unfolded), (0, 1)), in_dims)(x, kernel)
    torch.testing.assert_close(found, expected)


def test_a_batch_of_gradients() -> None:
    """As `jacobian` asks for when it is vectorised, with a graph for further derivatives or without."""
    layer = Involution2d(8, 3, group_channels=4, norm=torch.nn.Identity).double()
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian
    for create_graph in (False, True):
        found = jacobian(layer, x, vectorize=True, create_graph=create_graph)
        torch.testing.assert_close(found, jacobian(layer, x, create_graph=create_graph))


def test_generated_kernels_have_derivatives_of_derivatives() -> None:
    features, weight = torch.randn(1, 3, 3, 2, dtype=torch.float64), torch.randn(18, 3, dtype=torch.float64)
    bias = torch.randn(18, dtype=torch.float64)

    def ours(x: Tensor, features: Tensor) -> Tensor:
        return generated_involution(x, features, weight, bias, 3, padding=1)

    def expected(x: Tensor, features: Tensor) -> Tensor:
        kernel = torch.einsum("or,brhw->bohw", weight, features) + bias[:, None, None]
        return _unfolded(x, kernel.unflatten(1, (2, 3, 3)))

    for argument in (0, 1):
        torch.testing.assert_close(
            jacrev(jacfwd(_cubed(ours), argument))(X, features), jacrev(jacfwd(_cubed(expected), argument))(X, features)
        )


@pytest.mark.parametrize("name", ["grad", "jvp"])
def test_compiled_code_leaves_transforms_to_python(name: str) -> None:
    def run(x: Tensor) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            return _cubed(_ours)(x, KERNEL)

        derivative: Tensor = grad(loss)(x) if name == "grad" else jvp(loss, (x,), (x,))[1]
        return derivative

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(X), run(X))
    torch._dynamo.reset()
