"""ImageNet, or any images of classes: in folders, in tar files, or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from involution.data.items import Items, ItemsModule, open_image
from involution.data.order import DataError
from involution.data.shards import Shards, is_sharded

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
            raise DataError(f"there is no folder {root}; it must hold a folder of images for each class.")
        try:
            found = ImageFolder(root, allow_empty=True)
        except FileNotFoundError as error:
            raise DataError(f"{root} must hold a folder of images for each class: {error}") from None
        self.classes = tuple(found.classes)
        self._samples, self._transform = found.samples, transform
        if not self._samples:
            raise DataError(f"no folder in {root} holds an image that ends in {', '.join(IMG_EXTENSIONS)}.")

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> Labelled:
        """One image and its class."""
        path, number = self._samples[index]
        return self._transform(open_image(Path(path))), number


class ImageNet(ItemsModule):
    """ImageNet, or any images of classes.

    Trained on parts of images of random size and shape, resized and half of them mirrored; measured on the centre.
    Batches are images (B, 3, size, size), normalised as timm's networks expect it, and classes (B,).

    Args:
        root: where the images are. A folder with a folder for each class, ROOT/train/CLASS/*.JPEG and
            ROOT/val/CLASS/*.JPEG; a folder of tar files, as WebDataset lays them out, ROOT/train-0000.tar and
            ROOT/val-0000.tar, or its address, https://host/folder (see docs/training.md); or hf:NAME for a data set of
            Hugging Face that is streamed.
        batch_size: images in a training step, on each device.
        workers: processes that decode images.
        size: pixels a side.
        resize: the shorter side of an image that is measured, before its centre is cut out.
        scale: least and largest share of an image that is trained on.
        auto_augment: further changes of training images by timm, such as rand-m9-mstd0.5-inc1.
        erase: how often a part of a training image is erased, from 0 to 1.
        skip_bad: leave images out that cannot be read, and tell at the end how many there were.
        num_classes: how many classes there are, where the images do not tell: in tar files.
        train_images: images of an epoch of a stream that does not tell.
        cache: folder for copies of tar files that are behind an address.

    Raises:
        ValueError: if there are no images, the classes of both splits differ, or a setting is out of range.
    """

    in_chans = 3
    num_classes = 0  # told by the images

    def __init__(
        self,
        root: str = "data/imagenet",
        batch_size: int = 256,
        workers: int = 8,
        size: int = 224,
        resize: int = 256,
        scale: tuple[float, float] = (0.08, 1.0),
        auto_augment: str | None = None,
        erase: float = 0.0,
        skip_bad: bool = False,
        num_classes: int = 0,
        train_images: int = 0,
        cache: str = "data/shards",
    ) -> None:
        super().__init__(batch_size, workers)
        if not 1 <= size <= resize:
            raise ValueError(f"`size` must be from 1 to `resize`, {resize}; got {size}.")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"`scale` must be two shares of an image, the smaller first; got {scale}.")
        if not 0 <= erase <= 1:
            raise ValueError(f"`erase` must be a share from 0 to 1; got {erase}.")
        for name, value in (("num_classes", num_classes), ("train_images", train_images)):
            if value < 0:
                raise ValueError(f"`{name}` must be at least 0; got {value}.")
        self._root, self._skip_bad, self._size = str(root), skip_bad, size
        self._given, self._train_images, self._cache = num_classes, train_images, Path(cache)
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
        self._sets["val"] = val = self._split("val")
        self.classes, self.num_classes = val.classes, len(val.classes)
        if num_classes and num_classes != self.num_classes:
            raise ValueError(f"`num_classes` must be {self.num_classes}, as in {root}, or left out; got {num_classes}.")

    def to_tensor(self, image: Image) -> Tensor:
        """Any image as it is measured, (3, size, size)."""
        tensor: Tensor = self._transforms["val"](image)
        return tensor

    def load(self, split: str) -> Items[Labelled]:
        """The set "train" or "val"."""
        items = self._split(split)
        if items.classes != self.classes:
            different = sorted(set(items.classes) ^ set(self.classes))
            raise DataError(f"the classes of {split} in {self._root} are not those of val: {different[0]} is in one.")
        return items

    def collate(self, items: Sequence[Labelled | None]) -> tuple[Tensor, Tensor]:
        """A batch of the images that were not left out."""
        kept = [item for item in items if item is not None]
        if not kept:
            return torch.empty(0, self.in_chans, self._size, self._size), torch.empty(0, dtype=torch.long)
        images, classes = default_collate(kept)
        return images, classes

    def _split(self, split: str) -> Any:
        how = {"train": split == "train", "skip_bad": self._skip_bad}
        scheme, _, name = self._root.partition(":")
        if scheme == "hf":
            from involution.data.stream import Stream  # needs a package that few have

            return Stream(name, split, self._transforms[split], self._given, self._train_images, **how)
        if is_sharded(self._root):
            return Shards(self._root, split, self._transforms[split], self._given, self._cache, **how)
        return Folders(Path(self._root) / split, self._transforms[split], **how)
