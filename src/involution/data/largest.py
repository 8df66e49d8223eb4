"""Which digit is the largest? Scenes of digits for classification."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import IMAGENET_DEFAULT_MEAN as _MEAN
from timm.data import IMAGENET_DEFAULT_STD as _STD
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.functional import normalize

from involution.data.scenes import Look, Scene, SceneModule, bounds, composed, first

_MARGIN = 1.2  # how many times the box of the largest digit is as large as the next


class Questions(Dataset[tuple[Tensor, int]]):
    """Scenes of one split in which one digit is clearly the largest.

    An item is an image, (3, H, W) float32, normalised as timm's networks expect it, and the largest digit: that whose
    box, around what is seen of it, is at least 1.2 times as large as any other.

    Args:
        split_name: "train", "validation" or "test"; no digit of one is in another.
        count: scenes; those without a clear answer are passed over, and not counted.
        look: how they are composed.
        seed: the same gives the same scenes on every machine.

    Raises:
        ValueError: if there is no such split, or scenes hold no digits.
    """

    def __init__(self, split_name: str, count: int, look: Look, seed: int = 0) -> None:
        if look.most < 1:
            raise ValueError(f"`look.most` must be at least 1, for there to be a largest digit; got {look.most}.")
        self._items = first(_clear(composed(split_name, look, seed)), count, f"composing {split_name} scenes")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, digit = self._items[index]
        return normalize(torch.from_numpy(image).permute(2, 0, 1).float() / 255, _MEAN, _STD), digit


class LargestDigit(SceneModule):
    """Cluttered scenes of handwritten digits, each with the class of its largest digit.

    Which is the largest shows only to a network that sees all of them.

    Example:
        >>> scenes = LargestDigit(train_scenes=4, validation_scenes=0, test_scenes=0, batch_size=2)
        >>> scenes.setup()
        >>> images, digits = next(iter(scenes.train_dataloader()))
        >>> images.shape, digits.shape
        (torch.Size([2, 3, 128, 128]), torch.Size([2]))
    """

    in_chans = 3
    num_classes = 10
    kind = Questions
    collate = staticmethod(default_collate)


def _clear(scenes: Iterator[Scene]) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Images and largest digits of the scenes in which one is clearly the largest."""
    for image, owner, labels in scenes:
        corners = [bounds(owner == number) for number in range(1, len(labels) + 1)]
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in corners]
        order = np.argsort(areas)
        if len(areas) == 1 or (len(areas) > 1 and areas[order[-1]] >= _MARGIN * areas[order[-2]]):
            yield image, int(labels[order[-1]]) - 1
