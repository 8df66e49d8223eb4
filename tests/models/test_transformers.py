"""RedNets as backbones of transformers' own classes, with weights as docs/detection.md loads them."""

import pytest
import timm
import torch
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

import involution.models  # noqa: F401  # registers the RedNets with timm

NARROW = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
FEW = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5}


def backbone() -> TimmBackboneConfig:
    return TimmBackboneConfig(backbone="rednet26", out_indices=[1, 2, 3, 4])


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return timm.create_model("rednet26").state_dict()


def holds(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    told = module.load_state_dict(weights, strict=False)
    assert told.missing_keys == []
    assert told.unexpected_keys == ["fc.weight", "fc.bias"]
    assert torch.equal(module.state_dict()["layer4.0.conv1.weight"], weights["layer4.0.conv1.weight"])


def test_detr(weights: dict[str, torch.Tensor]) -> None:
    model = DetrForObjectDetection(DetrConfig(backbone_config=backbone(), **NARROW, **FEW)).eval()
    # its frozen norms have no count of batches
    told = model.model.backbone.model.load_state_dict(weights, strict=False)
    assert told.missing_keys == []
    assert all(key.startswith("fc.") or key.endswith("num_batches_tracked") for key in told.unexpected_keys)
    with torch.no_grad():
        assert model(pixel_values=torch.rand(1, 3, 64, 49)).pred_boxes.shape == (1, 5, 4)


def test_upernet(weights: dict[str, torch.Tensor]) -> None:
    config = UperNetConfig(backbone_config=backbone(), hidden_size=16, auxiliary_in_channels=1024, num_labels=3)
    model = UperNetForSemanticSegmentation(config).eval()
    holds(model.backbone._backbone, weights)
    with torch.no_grad():
        assert model(pixel_values=torch.rand(1, 3, 64, 49)).logits.shape == (1, 3, 64, 49)


def test_mask2former(weights: dict[str, torch.Tensor]) -> None:
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 16}
    config = Mask2FormerConfig(backbone_config=backbone(), num_queries=5, num_labels=3, **sizes, **layers)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    holds(model.model.pixel_level_module.encoder._backbone, weights)
    with torch.no_grad():
        assert model(pixel_values=torch.rand(1, 3, 64, 64)).masks_queries_logits.shape[:2] == (1, 5)
