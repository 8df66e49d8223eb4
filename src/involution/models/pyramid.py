"""A feature pyramid over the stages of a network, with involutions where asked."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7

from involution.models.stages import Layer, Stages, involve


class Pyramid(nn.Module):
    """A feature pyramid over the last stages of a network; torchvision's, with involutions for 3x3 convolutions.

    The 1x1 convolutions beside it and `extra`, the levels above the last stage, stay convolutions.

    Args:
        stages: the backbone.
        layer: of the outputs, "convolution" (3x3) or "involution" (7x7).
        channels: of every output.
        first: the finest stage used, 0 to 3.
        extra: makes further levels, as torchvision's pyramid takes it.

    Attributes:
        out_channels: `channels`, where torchvision's detectors look for them.

    Shapes: (B, in_chans, H, W) -> {"0": (B, channels, H', W'), ...}, the finest first.

    Source: Lin et al., CVPR 2017; Li et al., CVPR 2021, section 5.2.
    """

    def __init__(
        self,
        stages: Stages,
        layer: Layer = "convolution",
        channels: int = 256,
        first: int = 0,
        extra: ExtraFPNBlock | None = None,
    ) -> None:
        super().__init__()
        self.stages, self.out_channels, self._first = stages, channels, first
        self.fpn = FeaturePyramidNetwork(stages.channels[first:], channels, extra)
        involve(self.fpn.layer_blocks, layer, "neck")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The levels of the pyramid."""
        maps = self.stages(x)[self._first :]
        levels: dict[str, Tensor] = self.fpn(OrderedDict((str(index), each) for index, each in enumerate(maps)))
        return levels


class P6P7(LastLevelP6P7):
    """Two further levels of a RetinaNet's pyramid by convolutions of stride 2, from the last stage.

    torchvision's has a ReLU before P7, and takes P5 where the last stage is as wide as the pyramid.

    Source: mmdetection, FPN with add_extra_convs="on_input".
    """

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The levels `p` of the pyramid over the stages `c`, and two more."""
        p6 = self.p6(c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]
