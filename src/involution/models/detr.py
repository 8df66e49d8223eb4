"""DETR of transformers over the stages of a network, with the interface of torchvision's detectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_convert
from transformers import DetrConfig, DetrForObjectDetection, TimmBackboneConfig

from involution.models.stages import Stages

_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet


class Detr(nn.Module):
    """Boxes as a set, by a transformer over the last feature map.

    Args:
        stages: the backbone; its last map is used.
        num_classes: the background not counted; labels are 1 to `num_classes`.
        queries: boxes predicted for an image.
        width: of the transformer.
        layers: of its encoder, and of its decoder.
        feedforward: width inside its layers.
        heads: of its attention.
        min_size: the shorter side images are resized to, in pixels.
        max_size: the most the longer side may be then.
        score_thresh: detections below are left out.
        settings: any other setting of transformers' `DetrConfig`.

    In training it maps images, a list of (3, H, W) from 0 to 1, and targets to losses by name; else images to
    detections, with boxes (N, 4), labels and scores.

    Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020.
    """

    def __init__(
        self,
        stages: Stages,
        num_classes: int,
        queries: int = 100,
        width: int = 256,
        layers: int = 6,
        feedforward: int = 2048,
        heads: int = 8,
        min_size: int = 800,
        max_size: int = 1333,
        score_thresh: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.num_classes, self.score_thresh = num_classes, score_thresh
        self.transform = GeneralizedRCNNTransform(min_size, max_size, _MEAN, _STD)
        config = DetrConfig(
            backbone_config=TimmBackboneConfig(backbone="resnet18", out_indices=[4]),
            num_labels=num_classes,
            num_queries=queries,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_ffn_dim=feedforward,
            decoder_ffn_dim=feedforward,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            auxiliary_loss=True,
            **settings,
        )
        self.net = DetrForObjectDetection(config)
        # It builds its backbone by timm's name alone, which knows neither our options nor our mirrors.
        self.net.model.backbone.model = stages
        self.net.model.input_projection = nn.Conv2d(stages.channels[-1], width, 1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses in training, else detections."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, resized = self.transform(images, targets)
        inside = torch.zeros(len(images), *batch.tensors.shape[-2:], dtype=torch.long, device=batch.tensors.device)
        for each, (height, width) in zip(inside, batch.image_sizes, strict=True):
            each[:height, :width] = 1
        if not self.training:
            out = self.net(pixel_values=batch.tensors, pixel_mask=inside)
            return self.transform.postprocess(self._found(out, batch.image_sizes), batch.image_sizes, sizes)
        labels = [
            {
                "class_labels": target["labels"] - 1,
                "boxes": box_convert(target["boxes"], "xyxy", "cxcywh") / _scale(size, target["boxes"]),
            }
            for target, size in zip(resized, batch.image_sizes, strict=True)
        ]
        return {"detr": self.net(pixel_values=batch.tensors, pixel_mask=inside, labels=labels).loss}

    def _found(self, out: Any, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        best = out.logits.softmax(-1)[..., : self.num_classes].max(-1)
        found = []
        for scores, classes, boxes, size in zip(best.values, best.indices, out.pred_boxes, sizes, strict=True):
            kept = scores >= self.score_thresh
            corners = box_convert(boxes, "cxcywh", "xyxy").clamp(0, 1) * _scale(size, boxes)
            found.append({"boxes": corners[kept], "labels": classes[kept] + 1, "scores": scores[kept]})
        return found


def _scale(size: tuple[int, int], like: Tensor) -> Tensor:
    height, width = size
    return like.new_tensor([width, height, width, height])
