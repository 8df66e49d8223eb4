"""The names in the authors' checkpoints, of backbones, detectors and segmentors, turned into ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

Value = TypeVar("Value")

_BODY = "stages.body."  # the backbone, in a pyramid or segmentor of ours
# Pieces of names, (theirs, ours).
_REDNET = (
    ("stem.0.conv.", "stem.conv1."),
    ("stem.0.bn.", "stem.bn1."),
    ("stem.1.", "stem.conv2."),
    ("stem.2.", "stem.bn2."),
    ("stem.4.conv.", "stem.conv3."),
    ("stem.4.bn.", "stem.bn3."),
)
_INVOLUTION = (
    (".conv1.conv.", ".generator.reduce."),
    (".conv1.bn.", ".generator.norm."),
    (".conv2.conv.", ".generator.span."),
)
# Beginnings of names, (theirs, ours); the first that fits counts. Those of a neck go behind where ours has it.
_NECK = (
    (r"lateral_convs\.(\d)\.conv\.", r"fpn.inner_blocks.\1.0."),
    (r"fpn_convs\.(\d)\.conv\.", r"fpn.layer_blocks.\1.0."),
    (r"fpn_convs\.(\d)\.(?=conv[12]\.)", r"fpn.layer_blocks.\1.0."),
)
_RETINANET_NECK = (
    (r"fpn_convs\.3\.conv\.", "fpn.extra_blocks.p6."),
    (r"fpn_convs\.4\.conv\.", "fpn.extra_blocks.p7."),
)
_DETECTOR = (
    (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
    (r"roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"roi_head\.mask_head\.convs\.(\d)\.(?:conv|0)\.", r"roi_heads.mask_head.\1.0."),
    (r"roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_predictor.mask_fcn_logits."),
    (r"bbox_head\.cls_convs\.(\d)\.conv\.", r"head.classification_head.conv.\1.0."),
    (r"bbox_head\.reg_convs\.(\d)\.conv\.", r"head.regression_head.conv.\1.0."),
    (r"bbox_head\.retina_cls\.", "head.classification_head.cls_logits."),
    (r"bbox_head\.retina_reg\.", "head.regression_head.bbox_reg."),
)
# Every second of their layers is an upsampling; ours are a convolution, a norm, a ReLU and an upsampling.
_SEMANTIC_FPN = (
    *((rf"decode_head\.scale_heads\.(\d)\.{2 * i}\.conv\.", rf"levels.\1.{4 * i}.") for i in range(3)),
    *((rf"decode_head\.scale_heads\.(\d)\.{2 * i}\.bn\.", rf"levels.\1.{4 * i + 1}.") for i in range(3)),
    (r"decode_head\.conv_seg\.", "classifier."),
)
_UPERNET = (
    (r"decode_head\.conv_seg\.", "head.classifier."),
    (r"decode_head\.((?:\w+\.)+)bn\.", r"head.\1batch_norm."),
    (r"decode_head\.", "head."),
    (r"auxiliary_head\.conv_seg\.", "auxiliary.classifier."),
    (r"auxiliary_head\.((?:\w+\.)+)bn\.", r"auxiliary.\1batch_norm."),
    (r"auxiliary_head\.", "auxiliary."),
)
BACKGROUND_LAST = "roi_heads.box_predictor.cls_score."  # of its rows; ours has it first


def plain(state: Mapping[str, Value]) -> dict[str, Value]:
    """A state dict without the prefix that data parallel training puts before every name."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def backbone(state: Mapping[str, Value]) -> dict[str, Value]:
    """The backbone and classifier of an official state dict under the names of our RedNet; ours stays as it is.

    What detection and segmentation put around the backbone, such as `neck.*` and `decode_head.*`, is left out.
    """
    state = plain(state)
    if any(key.startswith("backbone.") for key in state):
        state = {key: value for key, value in state.items() if key.startswith(("backbone.", "head.fc."))}
    return {
        _replaced(key.removeprefix("backbone.").removeprefix("head."), _REDNET + _INVOLUTION): value
        for key, value in state.items()
    }


def whole(state: Mapping[str, Value], place: str) -> dict[str, Value]:
    """An official state dict of a detector or segmentor under our names.

    Args:
        state: what the file holds; names unknown here stay as they are.
        place: where our network has its RedNet, such as "backbone.stages.body.".
    """
    state = plain(state)
    neck = place.removesuffix(_BODY)
    pyramid = _NECK if any(key.startswith("neck.lateral_convs.3.") for key in state) else _RETINANET_NECK + _NECK
    head = _DETECTOR + (_UPERNET if any(key.startswith("decode_head.psp_modules.") for key in state) else _SEMANTIC_FPN)
    found: dict[str, Value] = {}
    for key, value in state.items():
        if key.startswith("backbone."):
            name = place + _replaced(key.removeprefix("backbone."), _REDNET)
        elif key.startswith("neck."):
            name = neck + _begun(key.removeprefix("neck."), pyramid)
        else:
            name = _begun(key, head)
        found[_replaced(name, _INVOLUTION)] = value
    return found


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a RedNet under the names of the official classification code, in its order."""
    renamed = {}
    for key, value in state_dict.items():
        for official, ours in _REDNET + _INVOLUTION:
            key = key.replace(ours, official)
        renamed[("head." if key.startswith("fc.") else "backbone.") + key] = value
    return renamed


def _replaced(name: str, pieces: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in pieces:
        name = name.replace(theirs, ours)
    return name


def _begun(name: str, beginnings: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in beginnings:
        if re.match(theirs, name):
            return re.sub(f"^{theirs}", ours, name)
    return name
