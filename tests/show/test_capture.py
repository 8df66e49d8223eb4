"""Captured kernels: they are what the layers used, and capturing leaves no trace."""

import pytest
import timm
import torch
from torch import Tensor, nn

from involution import Involution1d, Involution2d
from involution.models import RedNet
from involution.show.capture import capture_kernels


@pytest.fixture(scope="module")
def network() -> RedNet:
    torch.manual_seed(0)
    model = timm.create_model("rednet26", base_width=16, stem_width=32, num_classes=3, zero_init_last=False)
    return model.double().eval()


def test_kernels_multiplied_by_hand_give_the_outputs(network: RedNet) -> None:
    x = torch.randn(2, 3, 97, 75).double()
    with torch.no_grad():
        plain = network(x)
        with capture_kernels(network) as captured:
            found = network(x)
    torch.testing.assert_close(found, plain)
    assert list(captured) == [name for name, layer in network.named_modules() if isinstance(layer, Involution2d)]
    assert {each.layer.window.stride for each in captured.values()} == {(1, 1), (2, 2)}
    draw = torch.Generator().manual_seed(1)
    for name, each in captured.items():
        assert each.name == name
        height, width = each.output.shape[2:]
        assert each.kernel.shape[-2:] == (height, width)
        for _ in range(10):
            image, row, column = (int(torch.randint(n, (), generator=draw)) for n in (2, height, width))
            products = each.patch(row, column, image).unflatten(0, (each.layer.groups, -1))
            products = products * each.kernel[image, :, None, ..., row, column]
            torch.testing.assert_close(products.sum((2, 3)).flatten(), each.output[image, ..., row, column])
    sums = captured["layer3.1.conv2"].sums()
    torch.testing.assert_close(sums, captured["layer3.1.conv2"].kernel.flatten(2, 3).sum(2))


def test_afterwards_all_is_as_before(network: RedNet) -> None:
    layers = [layer for layer in network.modules() if isinstance(layer, Involution2d)]
    names = list(network.state_dict())
    with capture_kernels(network):
        assert not any(layer.generator.is_plain() for layer in layers)
    with pytest.raises(ValueError, match="`x` must be images"), capture_kernels(network):
        network(torch.randn(2))
    assert all(layer.generator.is_plain() for layer in layers)
    assert not any(layer._forward_hooks for layer in layers)
    assert list(network.state_dict()) == names


def test_norms_see_a_batch_once() -> None:
    layer = Involution2d(16, 3).train()
    with capture_kernels(layer) as captured:
        layer(torch.randn(2, 16, 5, 5))
    assert captured[""].kernel.shape == (2, 1, 3, 3, 5, 5)
    assert int(layer.generator.norm.num_batches_tracked) == 1


def test_generators_of_all_kinds_are_captured() -> None:
    def average(x: Tensor) -> Tensor:
        return x.new_full((len(x), 1, 3, 3, *x.shape[2:]), 1 / 9)

    for generator in ("linear", "neighbourhood", "attention", average):
        layer = Involution2d(16, 3, generator=generator)
        own, x = layer.generator, torch.randn(1, 16, 6, 7)
        with capture_kernels(layer) as captured:
            output = layer(x)
        assert layer.generator is own
        kernel = own(x)
        torch.testing.assert_close(captured[""].kernel, kernel)
        torch.testing.assert_close(captured[""].output, output)


def test_a_network_without_involutions_is_refused() -> None:
    for network in (nn.Conv2d(3, 3, 3), Involution1d(16, 3)):
        with pytest.raises(ValueError, match="`model` must have involution layers; "), capture_kernels(network):
            pass
