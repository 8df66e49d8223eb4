"""Anchors, and what is read from a feature pyramid inside a box, to the pixel as mmdetection has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_area, roi_align

_RATIOS = (0.5, 1.0, 2.0)  # of height to width
_FINEST = 56  # a box whose sides are below twice this is read from the finest level


class Anchors(AnchorGenerator):
    """Anchors of three shapes at every position.

    torchvision's are rounded to whole pixels, and lie closer than the stride where a level's size was rounded up.

    Args:
        scales: sides of the square anchors, in steps of their level's positions.
        strides: of the levels, in pixels.
    """

    def __init__(self, scales: Sequence[float], strides: Sequence[int]) -> None:
        sizes = tuple(tuple(scale * stride for scale in scales) for stride in strides)
        super().__init__(sizes, (_RATIOS,) * len(sizes))
        self._strides = [[torch.tensor(stride)] * 2 for stride in strides]

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        """Boxes around the origin, (shapes * scales, 4)."""
        roots = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        sides = torch.tensor(scales, dtype=dtype, device=device)
        widths, heights = (sides / roots).flatten(), (sides * roots).flatten()
        return torch.stack((-widths, -heights, widths, heights), 1) / 2

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        """The anchors of all levels, (height * width * shapes * scales, 4) each; `strides` are torchvision's guess."""
        return super().grid_anchors(grid_sizes, self._strides)


class RoIAlign(MultiScaleRoIAlign):
    """Reads each box from the level of the pyramid that suits its size, in a grid of bins.

    torchvision's takes four samples in each bin, whatever its size, and reads half a position too far right and down.

    Args:
        side: of the grid.
        strides: of the levels it reads, in pixels.

    Shapes: the levels {"0": (B, C, H, W), ...}, B tensors of boxes (N, 4) -> (sum of N, C, side, side).

    Source: He et al., "Mask R-CNN", ICCV 2017; mmdetection, SingleRoIExtractor.
    """

    def __init__(self, side: int, strides: Sequence[int]) -> None:
        super().__init__([str(index) for index in range(len(strides))], side, sampling_ratio=0)
        self._strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """What is in the boxes."""
        every = torch.cat(boxes)
        numbers = torch.cat([box.new_full((len(box), 1), index) for index, box in enumerate(boxes)])
        regions = torch.cat((numbers, every), 1)
        sizes = box_area(every).sqrt()
        level_of = (sizes / _FINEST + 1e-6).log2().floor().clamp(0, len(self._strides) - 1)
        finest = x[self.featmap_names[0]]
        found = finest.new_zeros(len(every), finest.shape[1], *self.output_size)
        for level, (name, stride) in enumerate(zip(self.featmap_names, self._strides, strict=True)):
            (here,) = torch.where(level_of == level)
            found[here] = roi_align(
                x[name], regions[here], self.output_size, 1 / stride, self.sampling_ratio, aligned=True
            ).to(found.dtype)
        return found
