"""What the paper and its authors published: numbers only, each with where it can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

README = "README"
PLOT = "plots"
DERIVED = "derived"
SOURCES = f"{README}: of the authors' code, d-li14/involution; {PLOT}: the paper's, read to 0.1"
DENSE_SOURCES = f"{README}: of the authors' code, d-li14/involution; {DERIVED}: from the gains and percentages there"


class Published(NamedTuple):
    """A published result. Parameters in millions, FLOPs in billions as the authors count them, the rest in percent.

    `fewer_parameters` and `fewer_flops` compare with the ResNet in the same place; None: not published, or not found.
    `measures` are by name, such as top-1 or box AP.
    """

    parameters: float
    flops: float
    fewer_parameters: float | None
    fewer_flops: float | None
    measures: Mapping[str, float]
    source: str


# By depth.
REDNET = {
    26: Published(9.23, 1.73, 32.8, 29.2, {"top-1": 75.96, "top-5": 93.19}, README),
    38: Published(12.39, 2.22, 36.7, 31.3, {"top-1": 77.48, "top-5": 93.57}, README),
    50: Published(15.54, 2.71, 39.5, 34.1, {"top-1": 78.35, "top-5": 94.13}, README),
    101: Published(25.65, 4.74, 42.6, 40.5, {"top-1": 78.92, "top-5": 94.35}, README),
    152: Published(33.99, 6.79, 43.5, 41.4, {"top-1": 79.12, "top-5": 94.38}, README),
}
RESNET = {
    26: Published(13.7, 2.4, None, None, {"top-1": 73.6}, PLOT),
    38: Published(19.6, 3.2, None, None, {"top-1": 76.0}, PLOT),
    50: Published(25.6, 4.1, None, None, {"top-1": 76.8}, PLOT),
    101: Published(44.6, 7.9, None, None, {"top-1": 78.5}, PLOT),
    152: Published(60.2, 11.6, None, None, {"top-1": 79.3}, PLOT),
}
# By detector, then backbone, neck and head. Parameters are those trained: stem and first stage are frozen.
COCO = {
    "faster_rcnn": {
        ("resnet50", "convolution", "convolution"): Published(41.5, 207.1, None, None, {"box AP": 37.7}, DERIVED),
        ("rednet50", "convolution", "convolution"): Published(31.6, 177.9, 23.9, 14.1, {"box AP": 39.5}, README),
        ("rednet50", "involution", "convolution"): Published(29.5, 135.0, 28.9, 34.8, {"box AP": 40.2}, README),
        ("rednet50", "involution", "involution"): Published(29.0, 91.5, 30.1, 55.8, {"box AP": 39.2}, README),
    },
    "mask_rcnn": {
        ("resnet50", "convolution", "convolution"): Published(
            44.2, 253.4, None, None, {"box AP": 38.4, "mask AP": 35.1}, DERIVED
        ),
        ("rednet50", "convolution", "convolution"): Published(
            34.2, 224.2, 22.6, 11.5, {"box AP": 39.9, "mask AP": 35.7}, README
        ),
        ("rednet50", "involution", "convolution"): Published(
            32.2, 181.3, 27.1, 28.5, {"box AP": 40.8, "mask AP": 36.4}, README
        ),
        ("rednet50", "involution", "involution"): Published(
            29.5, 104.6, 33.3, 58.7, {"box AP": 39.6, "mask AP": 35.1}, README
        ),
    },
    "retinanet": {
        ("resnet50", "convolution", "convolution"): Published(37.7, 239.3, None, None, {"box AP": 36.6}, DERIVED),
        ("rednet50", "convolution", "convolution"): Published(27.8, 210.1, 26.3, 12.2, {"box AP": 38.2}, README),
        ("rednet50", "involution", "convolution"): Published(26.3, 199.9, 30.2, 16.5, {"box AP": 38.2}, README),
    },
}
# By segmentor, then backbone and neck.
CITYSCAPES = {
    "semantic_fpn": {
        ("resnet50c", "convolution"): Published(28.5, 362.8, None, None, {"mIoU": 74.4}, DERIVED),
        ("rednet50", "convolution"): Published(18.5, 293.9, 35.1, 19.0, {"mIoU": 78.0}, README),
        ("rednet50", "involution"): Published(16.4, 205.2, 42.5, 43.4, {"mIoU": 79.1}, README),
    },
    "upernet": {
        ("resnet50c", "convolution"): Published(66.4, 1893.8, None, None, {"mIoU": 78.2}, DERIVED),
        ("rednet50", "convolution"): Published(56.4, 1825.6, 15.1, 3.6, {"mIoU": 80.6}, README),
    },
}

# (top-1, parameters in millions, FLOPs in billions) of what the paper compares itself with, from its plots.
RIVALS = {
    "LR-Net": ((75.7, 14.7, 2.6), (77.3, 23.3, 4.3), (78.5, 42.0, 8.0)),
    "Stand-Alone attention": ((74.8, 10.3, 2.4), (76.9, 14.1, 3.0), (77.6, 18.0, 3.6)),
    "Stand-Alone attention, convolution stem": ((75.8, 10.3, 2.25), (77.1, 14.1, 2.35), (77.4, 18.0, 3.5)),
    "SAN, pairwise": ((75.5, 10.5, 2.2), (77.1, 14.1, 3.0), (77.4, 17.6, 3.8)),
    "SAN, patchwise": ((77.1, 11.8, 1.9), (78.2, 16.2, 2.6), (78.5, 20.5, 3.3)),
    "Axial attention": ((78.1, 12.5, 3.3), (79.2, 26.5, 6.8), (79.3, 45.8, 11.6)),
    "Axial attention, convolution stem": (
        *((76.4, 7.4, 1.8), (77.5, 12.4, 2.8)),
        *((78.6, 26.4, 5.7), (79.0, 45.6, 9.6)),
    ),
}
