"""Cityscapes' semantic maps, in the layout they are published in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import Cityscapes as Published
from torchvision.transforms import v2

from involution.data.items import UNLABELLED, BadItemError, Item, Items, ItemsModule, open_image

_CROP = (512, 1024)  # height and width
_SCALES = (0.5, 2.0)
_TRIALS, _SHARE = 10, 0.75  # crops tried until no class fills more than this share
_CLASSES = tuple(each.name for each in Published.classes if 0 <= each.train_id < UNLABELLED)
_MOST = 255  # of a label in a file


class CityscapesItems(Items[Item]):
    """The images of a split with their maps of the 19 classes that are scored.

    An item is an image, (3, H, W) float32 from 0 to 1, and its target: map (H, W) int64, 255 where no class is scored.
    In training both are resized by a factor from 0.5 to 2, cropped to 512 x 1024, every second is flipped, and the
    colours are distorted; a crop in which one class fills more than three quarters is drawn anew.

    Args:
        root: folder of the data set, with leftImg8bit and gtFine.
        split: "train" or "val".
        skip_bad: leave items out that are bad, and count them.

    Raises:
        ValueError: if the split has no images.
    """

    def __init__(self, root: Path, split: str, skip_bad: bool = False) -> None:
        super().__init__(skip_bad, train=split == "train")
        self._images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        if not self._images:
            raise ValueError(f"there are no images {root}/leftImg8bit/{split}/CITY/*_leftImg8bit.png.")
        self._targets = root / "gtFine" / split
        self._classes = torch.full((_MOST + 1,), UNLABELLED)
        for each in Published.classes:
            if each.id >= 0:
                self._classes[each.id] = each.train_id
        self._distort = v2.RandomPhotometricDistort()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Item:
        """One image and its target."""
        path = self._images[index]
        name = path.name.replace("_leftImg8bit", "_gtFine_labelIds")
        target = self._targets / path.parent.name / name
        image = v2.functional.to_image(open_image(path)).as_subclass(Tensor)
        labels = torch.from_numpy(np.array(open_image(target, "L")))
        if labels.shape != image.shape[1:]:
            raise BadItemError(
                f"{target} has {labels.shape[1]} x {labels.shape[0]} pixels, its image {path.name} has "
                f"{image.shape[2]} x {image.shape[1]}."
            )
        known = {each.id for each in Published.classes}
        unknown = [value for value in labels.unique().tolist() if value not in known]
        if unknown:
            raise BadItemError(f"{target} holds the unknown label {unknown[0]}.")
        classes = self._classes[labels.long()]
        if self._train:
            image, classes = self._augment(image, classes)
        return image.float() / 255, {"map": classes}

    def _augment(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        scale = float(torch.empty(()).uniform_(*_SCALES))
        size = [round(side * scale) for side in classes.shape]
        image = v2.functional.resize(image, size, antialias=True)
        classes = v2.functional.resize(classes[None], size, v2.InterpolationMode.NEAREST)[0]
        short = [max(0, wanted - side) for wanted, side in zip(_CROP, size, strict=True)]
        image = v2.functional.pad(image, [0, 0, short[1], short[0]])
        classes = v2.functional.pad(classes[None], [0, 0, short[1], short[0]], fill=UNLABELLED)[0]
        for _ in range(_TRIALS):
            top, left = (
                int(torch.randint(side - wanted + 1, ())) for side, wanted in zip(classes.shape, _CROP, strict=True)
            )
            part = (slice(top, top + _CROP[0]), slice(left, left + _CROP[1]))
            counts = torch.bincount(classes[part].flatten(), minlength=UNLABELLED + 1)[:UNLABELLED]
            if counts.max() <= _SHARE * counts.sum():
                break
        image, classes = image[:, part[0], part[1]], classes[part]
        if torch.rand(()) < 0.5:
            image, classes = image.flip(2), classes.flip(1)
        return self._distort(image), classes


class Cityscapes(ItemsModule):
    """Cityscapes: ROOT/leftImg8bit/train/CITY/*_leftImg8bit.png, ROOT/gtFine/train/CITY/*_gtFine_labelIds.png, and val.

    Args:
        root: folder of the data set.
        batch_size: images in a training step, on each device.
        workers: processes that read images.
        skip_bad: leave items out that are bad, and tell at the end how many there were.
    """

    map_classes = _CLASSES

    def __init__(
        self, root: Path = Path("data/cityscapes"), batch_size: int = 2, workers: int = 2, skip_bad: bool = False
    ) -> None:
        super().__init__(batch_size, workers)
        self._root, self._skip_bad = root, skip_bad

    def load(self, split: str) -> Items[Item]:
        """The set "train" or "val"."""
        return CityscapesItems(self._root, split, self._skip_bad)
