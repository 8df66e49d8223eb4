"""What the paper and its authors published on ImageNet: numbers only, each with where it can be read."""

from __future__ import annotations

from typing import NamedTuple

README = "README"
PLOT = "plots"
SOURCES = f"{README}: of the authors' code, d-li14/involution; {PLOT}: the paper's, read to 0.1"


class Published(NamedTuple):
    """A published result. Parameters in millions, FLOPs in billions as the authors count them, the rest in percent.

    `fewer_parameters` and `fewer_flops` compare with the ResNet of the same depth. None: not published, or not found.
    """

    parameters: float
    flops: float
    top1: float
    top5: float | None
    fewer_parameters: float | None
    fewer_flops: float | None
    source: str


# By depth.
REDNET = {
    26: Published(9.23, 1.73, 75.96, 93.19, 32.8, 29.2, README),
    38: Published(12.39, 2.22, 77.48, 93.57, 36.7, 31.3, README),
    50: Published(15.54, 2.71, 78.35, 94.13, 39.5, 34.1, README),
    101: Published(25.65, 4.74, 78.92, 94.35, 42.6, 40.5, README),
    152: Published(33.99, 6.79, 79.12, 94.38, 43.5, 41.4, README),
}
RESNET = {
    26: Published(13.7, 2.4, 73.6, None, None, None, PLOT),
    38: Published(19.6, 3.2, 76.0, None, None, None, PLOT),
    50: Published(25.6, 4.1, 76.8, None, None, None, PLOT),
    101: Published(44.6, 7.9, 78.5, None, None, None, PLOT),
    152: Published(60.2, 11.6, 79.3, None, None, None, PLOT),
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
