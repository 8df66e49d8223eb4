"""Detectors of torchvision over the stages of a network, with involutions in neck and heads where asked."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from involution.models.pyramid import P6P7, Pyramid
from involution.models.regions import Anchors, RoIAlign
from involution.models.stages import Layer, Stages, involve
from involution.names import unknown

Name = Literal["retinanet", "faster_rcnn", "mask_rcnn"]
Targets = list[dict[str, Tensor]]

_CLASSES = {"retinanet": RetinaNet, "faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}
_NAMES = tuple(_CLASSES)
_STRIDES = (4, 8, 16, 32, 64, 128)  # of levels P2 to P7
_BOX, _MASK = 7, 14  # sides of what is read for a box and for a mask


class _BoxPredictor(FastRCNNPredictor):
    """Scores of all classes and the background, and boxes of the classes alone, as in mmdetection."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes + 1)
        self.bbox_pred = nn.Linear(channels, 4 * num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, boxes = super().forward(x)
        return scores, F.pad(boxes, (4, 0))  # torchvision looks for boxes of the background too, and drops them


class _MaskPredictor(MaskRCNNPredictor):
    """Masks of the classes alone, as in mmdetection."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(super().forward(x), (0, 0, 0, 0, 1, 0))


class _RetinaNet(RetinaNet):
    """Counts labels from one, as the other detectors do; torchvision's head has no background, and counts from zero."""

    def forward(self, images: list[Tensor], targets: Targets | None = None) -> Any:
        if targets is not None:
            targets = [{**target, "labels": target["labels"] - 1} for target in targets]
        found = super().forward(images, targets)
        if not self.training:
            found = [{**each, "labels": each["labels"] + 1} for each in found]
        return found


def detector(
    name: Name,
    stages: Stages,
    num_classes: int,
    neck: Layer = "convolution",
    head: Layer = "convolution",
    channels: int = 256,
    box_channels: int = 1024,
    anchor_scale: float = 8.0,
    **settings: Any,
) -> nn.Module:
    """A detector of torchvision on a feature pyramid, with as many parameters as the paper's.

    Boxes are regressed, and masks predicted, for the classes alone, where torchvision also does so for the background;
    what else differs from the authors' code is told in `docs/detection.md`.

    Args:
        name: "retinanet", "faster_rcnn" or "mask_rcnn".
        stages: the backbone.
        num_classes: the background not counted; labels are 1 to `num_classes`.
        neck: of the feature pyramid's outputs, "convolution" or "involution".
        head: of the proposal network's and the mask head's 3x3 layers, "convolution" or "involution"; a RetinaNet has
            no such variant.
        channels: of the neck and the convolutional heads.
        box_channels: of the box head's two linear layers; unused in a RetinaNet.
        anchor_scale: side of the smallest anchor at each level, in steps of its positions.
        settings: any other argument of torchvision's class, such as min_size, max_size, box_score_thresh.

    Returns:
        A module with torchvision's interface: in training it maps images, a list of (3, H, W) from 0 to 1, and targets
        to losses by name; else images to detections, with boxes (N, 4), labels, scores, and masks (N, 1, H, W).

    Raises:
        ValueError: if a setting is unknown or does not fit.

    Source: Li et al., CVPR 2021, table 3; torchvision.models.detection.
    """
    if name not in _NAMES:
        raise ValueError(unknown("detector", name, _NAMES))
    known = _settings(_CLASSES[name])
    for setting in settings:
        if setting not in known:
            ours = inspect.signature(detector).parameters.keys() - {"name", "stages", "settings"}
            raise ValueError(unknown(f"setting of {name}", setting, known | ours))
    if name == "retinanet":
        if head != "convolution":
            raise ValueError(f"`head` must be 'convolution' for a RetinaNet, which has no other; got {head!r}.")
        pyramid = Pyramid(stages, neck, channels, first=1, extra=P6P7(stages.channels[-1], channels))
        scales = [anchor_scale / 2 * 2 ** (third / 3) for third in range(3)]  # its octave begins at 4, for 8 elsewhere
        anchors = Anchors(scales, _STRIDES[1:])
        per_place = anchors.num_anchors_per_location()[0]
        classifier = RetinaNetHead(channels, per_place, num_classes)
        return _RetinaNet(pyramid, num_classes, anchor_generator=anchors, head=classifier, **settings)
    pyramid = Pyramid(stages, neck, channels, extra=LastLevelMaxPool())
    parts: dict[str, Any] = {
        "rpn_anchor_generator": Anchors([anchor_scale], _STRIDES[:-1]),
        "box_roi_pool": RoIAlign(_BOX, _STRIDES[:4]),
        "box_head": TwoMLPHead(channels * _BOX**2, box_channels),
        "box_predictor": _BoxPredictor(box_channels, num_classes),
    }
    if name == "faster_rcnn":
        model = FasterRCNN(pyramid, **parts, **settings)
    else:
        masks = MaskRCNNHeads(channels, (channels,) * 4, dilation=1)
        parts |= {"mask_head": involve(masks, head, "head"), "mask_predictor": _MaskPredictor(channels, num_classes)}
        parts["mask_roi_pool"] = RoIAlign(_MASK, _STRIDES[:4])
        model = MaskRCNN(pyramid, **parts, **settings)
    involve(model.rpn.head.conv, head, "head")
    return model


def _settings(kind: type[nn.Module]) -> set[str]:
    """Names of what a detector takes, or hands on to the class it is made from, or to what resizes its images."""
    parameters: set[str] = set()
    for each in (*kind.__mro__, GeneralizedRCNNTransform):
        if issubclass(each, (RetinaNet, FasterRCNN, GeneralizedRCNNTransform)):
            parameters |= inspect.signature(each).parameters.keys()
    return parameters - {"backbone", "num_classes", "kwargs"}
