"""Which network an official checkpoint belongs to, told from the names and shapes in it."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from os import PathLike
from typing import Literal

import timm
import torch
from torch import Tensor, nn

from involution.models import official
from involution.models.detection import detector
from involution.models.rednet import BLOCKS, RedNet
from involution.models.segmentation import segmentor
from involution.models.stages import Layer, Stages
from involution.weights import fill, some

_INVOLUTIONS = ("layer1.0.conv2", "stem.conv2")  # the first of the blocks, and that of the stem
# What tells networks from each other; the first that is there counts.
_TELLS: dict[Literal["mask_rcnn", "faster_rcnn", "retinanet", "semantic_fpn", "upernet"], str] = {
    "mask_rcnn": "roi_head.mask_head.conv_logits.weight",
    "faster_rcnn": "rpn_head.rpn_cls.weight",
    "retinanet": "bbox_head.retina_cls.weight",
    "semantic_fpn": "decode_head.scale_heads.0.0.conv.weight",
    "upernet": "decode_head.fpn_bottleneck.conv.weight",
}
_LATERAL, _SHARED = "neck.lateral_convs.0.conv.weight", "roi_head.bbox_head.shared_fcs.0.weight"
_ANCHORS = 9  # at a position of a RetinaNet


def rednet_of(state_dict: Mapping[str, Tensor], path: str | PathLike[str]) -> RedNet:
    """The RedNet of an official state dict, with its weights: depth, widths, kernel sizes, classes told from shapes.

    Args:
        state_dict: what `read` gives; the network takes these tensors themselves, where the dtype is right.
        path: where it was read, for errors.

    Raises:
        ValueError: if no RedNet has its blocks or shapes.
    """
    state = official.backbone(state_dict)
    blocks = {key.rsplit(".", 2)[0] for key in state if key.endswith(".conv3.weight") and key.startswith("layer")}
    layers = tuple(sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in (1, 2, 3, 4))
    depths = [depth for depth, of in BLOCKS.items() if of == layers]
    if not depths:
        known = ", ".join(f"{depth} {of}" for depth, of in BLOCKS.items())
        raise ValueError(f"{path} has {layers} blocks in its stages, which no RedNet has. There is: {known}.")
    axes = {"layer1.0.conv1.weight": 4, "stem.conv1.weight": 4, "stem.conv3.weight": 4}
    for place in _INVOLUTIONS:
        axes |= {f"{place}.generator.span.bias": 1, f"{place}.generator.reduce.weight": 4}
    missing = [key for key in axes if key not in state]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} entries that every RedNet has ({some(missing)}).")
    if "fc.weight" in state:
        axes["fc.weight"] = 2
    for key, dimensions in axes.items():
        shape = tuple(state[key].shape)
        if len(shape) != dimensions or 0 in shape:
            raise ValueError(f"{path} is of no RedNet: {key} must have {dimensions} axes, none empty; it is {shape}.")
    settings = {
        "in_chans": state["stem.conv1.weight"].shape[1],
        "num_classes": len(state["fc.weight"]) if "fc.weight" in state else 0,
        "base_width": len(state["layer1.0.conv1.weight"]),
        "stem_width": len(state["stem.conv3.weight"]),
    }
    for setting, place in zip(("kernel_size", "stem_kernel"), _INVOLUTIONS, strict=True):
        bias, reduce = (state[f"{place}.generator.{part}"] for part in ("span.bias", "reduce.weight"))
        settings[setting] = isqrt(4 * len(bias) // len(reduce))  # 16 channels a group, reduced by 4
    try:
        with torch.device("meta"):  # what initial weights cost in time and memory would be for nothing
            model: RedNet = timm.create_model(f"rednet{depths[0]}", **settings)
    except ValueError as error:
        told = ", ".join(f"{name} {value}" for name, value in settings.items())
        raise ValueError(f"{path} is of no RedNet: its shapes tell {told}, and {error}") from error
    fill(model, state, path)
    return model


def network_of(state_dict: Mapping[str, Tensor], path: str | PathLike[str]) -> tuple[str, nn.Module]:
    """The network of an official state dict, with all its weights: a RedNet, detector or segmentor.

    Args:
        state_dict: what `read` gives.
        path: where it was read, for errors.

    Returns:
        What it is, for people; and the network.

    Raises:
        ValueError: if it is none that is built here.
    """
    state = official.plain(state_dict)
    rednet = rednet_of(state, path)
    name = next((name for name, tell in _TELLS.items() if tell in state), None)
    if name is None:
        around = sorted({key.split(".")[0] for key in state} - {"backbone", "head"})
        if any(key.startswith("backbone.") for key in state) and around:
            raise ValueError(f"{path} is of no network built here; around its backbone it has {', '.join(around)}.")
        return f"classifier of {rednet.num_classes} classes" if rednet.num_classes else "backbone", rednet

    def rows(key: str) -> int:
        if key not in state or state[key].dim() == 0:
            raise ValueError(f"{path} looks like a {name}, yet lacks {key}, or has a single number there.")
        return len(state[key])

    def layer(key: str) -> Layer:
        return "involution" if f"{key}.conv1.conv.weight" in state else "convolution"

    stages, neck, head = Stages(rednet), layer("neck.fpn_convs.0"), layer("rpn_head.rpn_conv")
    model: nn.Module
    if name == "semantic_fpn":
        classes = rows("decode_head.conv_seg.weight")
        model = segmentor(name, stages, classes, neck, rows(_LATERAL))
    elif name == "upernet":
        classes = rows("decode_head.conv_seg.weight")
        model = segmentor(name, stages, classes, neck, rows(_TELLS[name]))
    elif name == "retinanet":
        classes = rows(_TELLS[name]) // _ANCHORS
        model = detector(name, stages, classes, neck, channels=rows(_LATERAL))
    else:
        classes = rows("roi_head.bbox_head.fc_cls.weight") - 1
        model = detector(name, stages, classes, neck, head, rows(_LATERAL), rows(_SHARED))
    fill(model, state, path)
    told = f" and head of {head}s" if name.endswith("rcnn") else ""
    return f"{name} of {classes} classes, neck of {neck}s{told}", model
