"""RedNets as encoders of segmentation_models_pytorch."""

import pytest
import segmentation_models_pytorch as smp
import torch

import involution.models  # noqa: F401  # registers the RedNets with timm


@pytest.mark.parametrize("architecture", [smp.Unet, smp.FPN, smp.UPerNet])
def test_a_rednet_is_an_encoder(architecture: type[torch.nn.Module]) -> None:
    model = architecture("tu-rednet26", encoder_weights=None, classes=3)
    y = model(torch.rand(2, 3, 64, 96))
    assert y.shape == (2, 3, 64, 96)
    y.square().mean().backward()
    assert model.encoder.model.layer4[0].conv2.generator.span.weight.grad is not None
