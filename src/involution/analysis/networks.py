"""The networks of the paper's tables: how to build each, what to count, and what was published of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from involution import cost
from involution.analysis import paper
from involution.models import detection, mirrored_resnet, segmentation
from involution.models.rednet import BLOCKS
from involution.models.stages import Stages, build

IMAGE = (224, 224)
_DETECTED, _SEGMENTED = (800, 1280), (1024, 2048)
_PROPOSALS, _MASKS = 1000, 100  # of an image, as the authors count them
_COCO, _CITYSCAPES = 80, 19  # classes
_TITLES = {"faster_rcnn": "Faster R-CNN", "mask_rcnn": "Mask R-CNN", "retinanet": "RetinaNet"}
_TITLES |= {"semantic_fpn": "Semantic FPN", "upernet": "UPerNet"}
_TITLES |= {"resnet50": "ResNet-50", "resnet50c": "ResNet-50-C", "rednet50": "RedNet-50"}
# RedNet-50 as published, and with one setting changed at a time: the paper's table 6 and what its code offers.
ABLATIONS: Mapping[str, Mapping[str, object]] = {
    "RedNet-50": {},
    "K 3": {"kernel_size": 3},
    "K 5": {"kernel_size": 5},
    "K 9": {"kernel_size": 9},
    "C/G 1": {"group_channels": 1},
    "C/G 4": {"group_channels": 4},
    "C/G C": {"groups": 1},
    "r 1": {"reduction": 1},
    "r 16": {"reduction": 16},
    "linear generator": {"generator": "linear"},
    "neighbourhood generator": {"generator": "neighbourhood"},
    "attention generator": {"generator": "attention"},
    "convolution stem": {"stem": "convolution"},
    "involution stem of K 7": {"stem_kernel": 7},
}


def count(network: nn.Module, size: tuple[int, int] = IMAGE) -> cost.Counts:
    """The work of a network on an image of `size`; see `cost.counts`."""
    return cost.counts(network, torch.empty(1, 3, *size))


def count_detector(model: Any) -> cost.Counts:
    """The work of a detector on an image of 800 x 1280, with 1000 proposals and 100 masks; see `cost.counts`.

    Counted part by part, as on the meta device, where nothing is computed, there are no proposals.
    """
    image = torch.empty(1, 3, *_DETECTED)
    levels = list(model.backbone(image).values())
    parts: list[tuple[nn.Module, torch.Tensor | list[torch.Tensor]]]
    if hasattr(model, "head"):
        parts = [(model.backbone, image), (model.head, levels)]
    else:
        pyramid, heads = model.backbone.out_channels, model.roi_heads
        box, mask = (torch.empty(n, pyramid, side, side) for n, side in ((_PROPOSALS, 7), (_MASKS, 14)))
        parts = [(model.backbone, image), (model.rpn.head, levels)]
        parts.append((nn.Sequential(heads.box_head, heads.box_predictor), box))
        if heads.has_mask():
            parts.append((nn.Sequential(heads.mask_head, heads.mask_predictor), mask))
    counts = [cost.counts(part, given) for part, given in parts]
    return cost.Counts(*map(sum, zip(*counts, strict=True)))


@dataclass(frozen=True)
class Network:
    """A row of a table: `base` is the name of the row it is compared with."""

    name: str
    base: str
    make: Callable[[], nn.Module]
    published: paper.Published | None
    count: Callable[[nn.Module], cost.Counts] = count


def imagenet() -> Iterator[Network]:
    """The five RedNets with both stems, and the ResNets they mirror."""
    for depth in BLOCKS:
        mirror, ours = f"ResNet-{depth}", f"RedNet-{depth}"
        create = partial(timm.create_model, f"rednet{depth}")
        yield Network(mirror, mirror, partial(mirrored_resnet, depth), paper.RESNET[depth])
        yield Network(ours, mirror, create, paper.REDNET[depth])
        yield Network(f"{ours}, stem of K 7", mirror, partial(create, stem_kernel=7), paper.REDNET[depth])


def ablation() -> Iterator[Network]:
    """RedNet-50, and with one setting changed at a time."""
    for label, settings in ABLATIONS.items():
        yield Network(label, next(iter(ABLATIONS)), partial(timm.create_model, "rednet50", **settings), None)


def coco() -> Iterator[Network]:
    """The detectors with ResNet-50, and RedNet-50 with either neck and head; stems of K 7 unless they say other."""
    for name, rows in paper.COCO.items():
        mirror = ""
        for (arch, neck, head), published in rows.items():
            label = f"{_TITLES[name]}, {_TITLES[arch]}, {neck} / {head}"
            mirror = mirror or label
            make = partial(_detector, name, arch, neck, head)
            yield Network(label, mirror, make, published, count_detector)
            if (arch, neck) == ("rednet50", "convolution"):
                yield Network(f"{label}, stem of K 3", mirror, partial(make, stem_kernel=3), published, count_detector)


def cityscapes() -> Iterator[Network]:
    """The segmentors with ResNet-50-C, and RedNet-50 with either neck."""
    for name, rows in paper.CITYSCAPES.items():
        mirror = ""
        for (arch, neck), published in rows.items():
            label = f"{_TITLES[name]}, {_TITLES[arch]}, {neck}"
            mirror = mirror or label
            make = partial(_segmentor, name, arch, neck)
            yield Network(label, mirror, make, published, partial(count, size=_SEGMENTED))


TABLES: Mapping[str, Callable[[], Iterator[Network]]] = {
    "imagenet": imagenet,
    "ablation": ablation,
    "coco": coco,
    "cityscapes": cityscapes,
}


def _detector(name: Any, arch: str, neck: Any, head: Any, stem_kernel: int = 7) -> nn.Module:
    options = {"stem_kernel": stem_kernel} if arch.startswith("rednet") else {}
    return detection.detector(name, Stages(build(arch, options), frozen_stages=1), _COCO, neck, head)


def _segmentor(name: Any, arch: str, neck: Any) -> nn.Module:
    return segmentation.segmentor(name, Stages(build(arch)), _CITYSCAPES, neck)
