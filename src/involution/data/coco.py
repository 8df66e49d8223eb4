"""COCO's boxes and masks, in the layout they are published in."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Mask

from involution.data.items import BadItemError, Item, Items, ItemsModule, open_image
from involution.data.order import DataError

_SLACK = 1.0  # pixels that a box may overhang its image by: published ones are rounded
_LEAST = 1.0  # side of a box; smaller ones are left out, as mmdetection does


class CocoItems(Items[Item]):
    """The images of an annotation file in COCO's format, with boxes, labels and masks.

    An item is an image, (3, H, W) float32 from 0 to 1, and its target: boxes (N, 4) float32, left, top, right and
    bottom in pixels; labels (N,) int64, from 1 in the order of the file's categories; masks (N, H, W) uint8; iscrowd
    (N,) int64; area (N,) float32 and image_id.

    Args:
        images: folder of the images.
        annotations: the file.
        train: leave out images without objects and crowds, and flip every second image.
        skip_bad: leave items out that are bad, and count them.

    Attributes:
        classes: names of the categories.
        category_ids: their numbers in the file, in the same order.

    Raises:
        ValueError: if the annotation file is missing or not in COCO's format.
    """

    def __init__(self, images: Path, annotations: Path, train: bool = False, skip_bad: bool = False) -> None:
        super().__init__(skip_bad, train)
        self._images, self._file = images, annotations
        try:
            with redirect_stdout(io.StringIO()):  # pycocotools tells its progress in three lines
                self._coco = COCO(annotations)
            categories = sorted(self._coco.cats.values(), key=lambda category: category["id"])
            self.classes = tuple(str(category["name"]) for category in categories)
        except FileNotFoundError:
            raise DataError(f"there is no annotation file {annotations}.") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AssertionError) as error:
            raise DataError(f"{annotations} is no annotation file of COCO's format: {error!r}.") from error
        if not self.classes:
            raise DataError(f"{annotations} is no annotation file of COCO's format: it has no categories.")
        self.category_ids = tuple(category["id"] for category in categories)
        self._label = {number: label for label, number in enumerate(self.category_ids, start=1)}
        self._flip = v2.RandomHorizontalFlip(0.5 if train else 0.0)
        self._ids = sorted(self._coco.imgs)
        if train:
            self._ids = [number for number in self._ids if self._objects(number)]
            if not self._ids:
                raise DataError(f"no image in {annotations} has an object to train on.")

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, index: int) -> Item:
        """One image and its target."""
        number = self._ids[index]
        image = open_image(self._images / self._coco.imgs[number]["file_name"])
        size = (image.height, image.width)
        objects = self._objects(number)
        targets = [self._target(each, size) for each in objects]
        boxes = torch.tensor([box for box, _, _ in targets], dtype=torch.float32).reshape(-1, 4)
        masks = torch.stack([mask for _, _, mask in targets]) if targets else torch.zeros(0, *size, dtype=torch.uint8)
        image, boxes, masks = self._flip(
            v2.functional.to_image(image),
            BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=size),
            Mask(masks),
        )
        target = {
            "boxes": boxes.as_subclass(torch.Tensor),
            "labels": torch.tensor([label for _, label, _ in targets], dtype=torch.long),
            "masks": masks.as_subclass(torch.Tensor),
            "iscrowd": torch.tensor([each.get("iscrowd", 0) for each in objects], dtype=torch.long),
            "area": torch.tensor([each["area"] for each in objects], dtype=torch.float32),
            "image_id": torch.tensor(number),
        }
        return image.as_subclass(torch.Tensor).float() / 255, target

    def _objects(self, number: int) -> list[dict[str, Any]]:
        """What is annotated in an image and large enough; in training no crowds, which no single box is right for."""
        found = self._coco.imgToAnns[number]
        return [
            each
            for each in found
            if min(each.get("bbox", [_LEAST])[-2:]) >= _LEAST and not (self._train and each.get("iscrowd", 0))
        ]

    def _target(self, each: dict[str, Any], size: tuple[int, int]) -> tuple[list[float], int, torch.Tensor]:
        where = f"annotation {each['id']} of image {each['image_id']} in {self._file}"
        for name in ("bbox", "area"):
            if name not in each:
                raise BadItemError(f"{where} has no `{name}`.")
        left, top, width, height = each["bbox"]
        if min(left, top) < -_SLACK or left + width > size[1] + _SLACK or top + height > size[0] + _SLACK:
            raise BadItemError(
                f"{where} has the box {each['bbox']}, outside its image of {size[1]} x {size[0]} pixels."
            )
        if each["category_id"] not in self._label:
            raise BadItemError(f"{where} has the unknown category {each['category_id']}.")
        try:
            mask = torch.from_numpy(self._coco.annToMask(each))
        except Exception as error:  # pycocotools raises nothing more precise
            raise BadItemError(f"{where} has a mask that cannot be read: {error}.") from None
        if tuple(mask.shape) != size:
            raise BadItemError(
                f"{where} has a mask of {tuple(mask.shape)[::-1]} pixels, its image is {size[::-1]}. Are `width` and "
                "`height` of the image right in the file?"
            )
        right, bottom = min(left + width, size[1]), min(top + height, size[0])
        return [max(left, 0), max(top, 0), right, bottom], self._label[each["category_id"]], mask


class Coco(ItemsModule):
    """COCO, or any data set in its format: ROOT/annotations/instances_train2017.json, ROOT/train2017 and so on.

    Args:
        root: folder of the data set.
        year: in the names of files and folders.
        batch_size: images in a training step, on each device.
        workers: processes that read images.
        skip_bad: leave items out that are bad, and tell at the end how many there were.

    Raises:
        ValueError: if the annotation file is missing or not in COCO's format.
    """

    classes: tuple[str, ...] = ()  # told by the annotation file

    def __init__(
        self,
        root: Path = Path("data/coco"),
        year: str = "2017",
        batch_size: int = 2,
        workers: int = 2,
        skip_bad: bool = False,
    ) -> None:
        super().__init__(batch_size, workers)
        self._root, self._year, self._skip_bad = root, year, skip_bad
        self._sets["val"] = val = self._items("val")
        self.classes, self.category_ids = val.classes, val.category_ids

    def load(self, split: str) -> Items[Item]:
        """The set "train" or "val"."""
        items = self._items(split)
        if items.classes != self.classes:
            raise DataError(f"the categories of {split} in {self._root} are not those of val.")
        return items

    def _items(self, split: str) -> CocoItems:
        annotations = self._root / "annotations" / f"instances_{split}{self._year}.json"
        return CocoItems(self._root / f"{split}{self._year}", annotations, split == "train", self._skip_bad)
