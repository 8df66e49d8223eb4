"""ImageNet, or any images in a folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from involution.data.items import Items, ItemsModule, open_image

Labelled = tuple[Tensor, int]

_INTERPOLATION = "bilinear"


class Folders(Items[Labelled]):
    """The images in a folder that has a folder for each class; an item is a transformed image and its class.

    Args:
        root: the folder.
        transform: from an image of Pillow to a tensor.
        train: the next good item takes the place of one left out.
        skip_bad: leave items out that are bad, and count them.

    Attributes:
        classes: names of the folders, in order; a folder without images is a class too.

    Raises:
        ValueError: if there is no folder, or no image in it.
    """

    def __init__(self, root: Path, transform: Any, train: bool = False, skip_bad: bool = False) -> None:
        super().__init__(skip_bad, train)
        if not root.is_dir():
            raise ValueError(f"there is no folder {root}; it must hold a folder of images for each class.")
        try:
            found = ImageFolder(root, allow_empty=True)
        except FileNotFoundError as error:
            raise ValueError(f"{root} must hold a folder of images for each class: {error}") from None
        self.classes = tuple(found.classes)
        self._samples, self._transform = found.samples, transform
        if not self._samples:
            raise ValueError(f"no folder in {root} holds an image that ends in {', '.join(IMG_EXTENSIONS)}.")

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> Labelled:
        """One image and its class."""
        path, number = self._samples[index]
        return self._transform(open_image(Path(path))), number


class ImageNet(ItemsModule):
    """ImageNet, or any images in the same layout: ROOT/train/CLASS/*.JPEG and ROOT/val/CLASS/*.JPEG.

    Trained on parts of images of random size and shape, resized and half of them mirrored; measured on the centre.
    Batches are images (B, 3, size, size), normalised as timm's networks expect it, and classes (B,).

    Args:
        root: folder of the data set.
        batch_size: images in a training step, on each device.
        workers: processes that read images.
        size: pixels a side.
        resize: the shorter side of an image that is measured, before its centre is cut out.
        scale: least and largest share of an image that is trained on.
        auto_augment: further changes of training images by timm, such as rand-m9-mstd0.5-inc1.
        erase: how often a part of a training image is erased, from 0 to 1.
        skip_bad: leave images out that cannot be read, and tell at the end how many there were.

    Raises:
        ValueError: if a folder is missing or has no images, the classes of both differ, or a setting is out of range.
    """

    in_chans = 3
    num_classes = 0  # told by the folders

    def __init__(
        self,
        root: Path = Path("data/imagenet"),
        batch_size: int = 256,
        workers: int = 8,
        size: int = 224,
        resize: int = 256,
        scale: tuple[float, float] = (0.08, 1.0),
        auto_augment: str | None = None,
        erase: float = 0.0,
        skip_bad: bool = False,
    ) -> None:
        super().__init__(batch_size, workers)
        if not 1 <= size <= resize:
            raise ValueError(f"`size` must be from 1 to `resize`, {resize}; got {size}.")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"`scale` must be two shares of an image, the smaller first; got {scale}.")
        if not 0 <= erase <= 1:
            raise ValueError(f"`erase` must be a share from 0 to 1; got {erase}.")
        self._root, self._skip_bad = root, skip_bad
        self._transforms = {
            "train": create_transform(
                size,
                is_training=True,
                scale=scale,
                color_jitter=None,
                auto_augment=auto_augment,
                re_prob=erase,
                interpolation=_INTERPOLATION,
            ),
            "val": create_transform(size, crop_pct=size / resize, interpolation=_INTERPOLATION),
        }
        self.batch_measured = batch_size
        self._sets["val"] = val = self._folders("val")
        self.classes, self.num_classes, self._size = val.classes, len(val.classes), size

    def load(self, split: str) -> Items[Labelled]:
        """The set "train" or "val"."""
        folders = self._folders(split)
        if folders.classes != self.classes:
            different = sorted(set(folders.classes) ^ set(self.classes))
            raise ValueError(f"the classes of {split} in {self._root} are not those of val: {different[0]} is in one.")
        return folders

    def collate(self, items: Sequence[Labelled | None]) -> tuple[Tensor, Tensor]:
        """A batch of the images that were not left out."""
        kept = [item for item in items if item is not None]
        if not kept:
            return torch.empty(0, self.in_chans, self._size, self._size), torch.empty(0, dtype=torch.long)
        images, classes = default_collate(kept)
        return images, classes

    def _folders(self, split: str) -> Folders:
        return Folders(self._root / split, self._transforms[split], split == "train", self._skip_bad)
