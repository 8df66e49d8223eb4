"""Semantic segmentors over the stages of a network, with involutions in the neck where asked."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from involution.models.pyramid import Pyramid
from involution.models.stages import Layer, Stages, involve
from involution.names import unknown

Name = Literal["semantic_fpn", "upernet"]

_NAMES = ("semantic_fpn", "upernet")
_DROPOUT = 0.1


class SemanticFPN(nn.Module):
    """The segmentor of the paper: every level of a feature pyramid is brought to a quarter of the image and summed.

    Args:
        stages: the backbone.
        num_classes: of the map.
        neck: of the feature pyramid's outputs, "convolution" or "involution".
        channels: of the pyramid.
        head_channels: of the head.

    Shapes: (B, in_chans, H, W) -> {"out": (B, num_classes, H, W)}.

    Source: Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, as mmsegmentation builds it.
    """

    def __init__(
        self,
        stages: Stages,
        num_classes: int,
        neck: Layer = "convolution",
        channels: int = 256,
        head_channels: int = 128,
    ) -> None:
        super().__init__()
        self.pyramid = Pyramid(stages, neck, channels)
        self.levels = nn.ModuleList(_upward(channels, head_channels, doublings) for doublings in range(4))
        self.dropout = nn.Dropout2d(_DROPOUT)
        self.classifier = nn.Conv2d(head_channels, num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of every pixel."""
        raised = [level(each) for level, each in zip(self.levels, self.pyramid(x).values(), strict=True)]
        whole = sum((_resize(each, raised[0]) for each in raised[1:]), raised[0])
        return {"out": _resize(self.classifier(self.dropout(whole)), x)}


class UPerNet(nn.Module):
    """The heads of transformers' UPerNet over our stages, with the auxiliary classifier of the third one.

    Args:
        stages: the backbone.
        num_classes: of the map.
        neck: of the outputs of its feature pyramid, "convolution" or "involution".
        channels: of the head.
        auxiliary_channels: of the auxiliary head.

    Shapes: (B, in_chans, H, W) -> {"out": (B, num_classes, H, W)}, and in training also "aux" of this shape.

    Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018.
    """

    def __init__(
        self,
        stages: Stages,
        num_classes: int,
        neck: Layer = "convolution",
        channels: int = 512,
        auxiliary_channels: int = 256,
    ) -> None:
        super().__init__()
        from transformers import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

        config = UperNetConfig(
            num_labels=num_classes,
            hidden_size=channels,
            auxiliary_channels=auxiliary_channels,
            auxiliary_in_channels=stages.channels[2],
        )
        self.stages = stages
        self.head = UperNetHead(config, in_channels=stages.channels)
        self.auxiliary = UperNetFCNHead(config, in_channels=stages.channels)
        involve(self.head.fpn_convs, neck, "neck")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of every pixel."""
        maps = self.stages(x)
        logits = {"out": self.head(maps)}
        if self.training:
            logits["aux"] = self.auxiliary(maps)
        return {name: _resize(each, x) for name, each in logits.items()}


def segmentor(
    name: Name, stages: Stages, num_classes: int, neck: Layer = "convolution", channels: int | None = None
) -> nn.Module:
    """A segmentor by name, with as many parameters as the paper's.

    Args:
        name: "semantic_fpn" or "upernet".
        stages: the backbone.
        num_classes: of the map.
        neck: of the feature pyramid's outputs, "convolution" or "involution".
        channels: of its pyramid; its head has half as many in a Semantic FPN. Default: 256 there, 512 in an UPerNet.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in _NAMES:
        raise ValueError(unknown("segmentor", name, _NAMES))
    if name == "upernet":
        channels = channels or 512
        return UPerNet(stages, num_classes, neck, channels, channels // 2)
    channels = channels or 256
    return SemanticFPN(stages, num_classes, neck, channels, channels // 2)


def _upward(channels: int, width: int, doublings: int) -> nn.Sequential:
    """Convolutions that double the sides as often as told, at least one convolution."""
    layers: list[nn.Module] = []
    for index in range(max(1, doublings)):
        layers += [nn.Conv2d(channels if index == 0 else width, width, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        if doublings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """`x` brought to the sides of `like`."""
    sides = like.shape[2:]
    return x if x.shape[2:] == sides else F.interpolate(x, size=sides, mode="bilinear", align_corners=False)
