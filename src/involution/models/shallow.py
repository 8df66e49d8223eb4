"""A network of so few layers that their kernels decide what it can see at once."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from involution.nn import Involution2d


class Shallow(nn.Module):
    """A stem of stride 4, `depth` bottlenecks of one spatial layer each, average pooling, and a linear classifier.

    Pooling and classifier add up what single positions of the last feature map say, so nothing is known of two places
    that no position has seen both of: a position sees 7 pixels by the stem, and `4 (kernel_size - 1)` more by each
    bottleneck.

    Args:
        layer: the spatial layers, "involution" or "convolution".
        kernel_size: of the spatial layers.
        depth: number of bottlenecks.
        width: channels throughout.
        in_chans: channels of the image.
        num_classes: outputs.

    Shapes: (B, in_chans, H, W) -> (B, num_classes).

    Raises:
        ValueError: if there is no such `layer`.
    """

    def __init__(
        self,
        layer: Literal["involution", "convolution"] = "involution",
        kernel_size: int = 7,
        depth: int = 2,
        width: int = 32,
        in_chans: int = 1,
        num_classes: int = 2,
    ) -> None:
        super().__init__()
        if layer not in ("involution", "convolution"):
            raise ValueError(f"`layer` must be 'involution' or 'convolution'; got {layer!r}.")
        self.num_classes = num_classes
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.ModuleList(_bottleneck(layer, width, kernel_size) for _ in range(depth))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images `x`."""
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.fc(x.mean((2, 3)))


def _bottleneck(layer: str, width: int, kernel_size: int) -> nn.Sequential:
    spatial: nn.Module = Involution2d(width, kernel_size)
    if layer == "convolution":
        spatial = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(
        nn.Conv2d(width, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        spatial,
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 1, bias=False),
        nn.BatchNorm2d(width),
    )


default_cfgs = generate_default_cfgs({"shallow": {"num_classes": 2, "input_size": (1, 32, 112)}})


def shallow(pretrained: bool = False, **kwargs: Any) -> Shallow:
    """A stem and two bottlenecks; see `Shallow`."""
    return build_model_with_cfg(Shallow, "shallow", pretrained, **kwargs)


register_model(shallow)
