"""What data sets in files share: items, batches of them, and items that are bad."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from involution.data.order import DataError, Order, Share, loader

Kept = TypeVar("Kept")  # an item of any kind
Item = tuple[Tensor, dict[str, Tensor]]
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]

UNLABELLED = 255  # of a pixel of a map that counts neither in training nor in measures


class BadItemError(DataError):
    """An item of a data set that cannot be used: one sentence with its file."""


class Items(Dataset[Kept | None], Generic[Kept]):
    """A data set that reads its items from files.

    Args:
        skip_bad: leave items out that raise `BadItemError`, and count them.
        train: the next good item takes the place of one left out, so that all batches are full.
    """

    hint = " Leave such items out by `--data.skip_bad true`."  # for the user, behind what is bad

    def __init__(self, skip_bad: bool, train: bool = False) -> None:
        self._skip_bad, self._train = skip_bad, train
        self._skipped = torch.zeros((), dtype=torch.long).share_memory_()  # counted in all worker processes

    @property
    def skipped(self) -> int:
        """How often an item was left out."""
        return int(self._skipped)

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: Any) -> Kept:
        """One item."""
        raise NotImplementedError

    def order(self, batch_size: int) -> Share:
        """In which this process asks for its items."""
        return Order(len(self), batch_size, self._train)

    def candidates(self, index: Any) -> Iterable[Any]:
        """The item at `index`, and those that may take its place if it is bad."""
        return (place % len(self) for place in range(index, index + (len(self) if self._train else 1)))

    def __getitem__(self, index: Any) -> Kept | None:
        for place in self.candidates(index):
            try:
                return self.read(place)
            except BadItemError as error:
                if not self._skip_bad:
                    raise BadItemError(f"{error}{self.hint}") from None
                self._skipped += 1
        return None


class ItemsModule(LightningDataModule):
    """Loads items of a training and a validation set; the validation set is also tested on.

    Args:
        batch_size: images in a training step, on each device.
        workers: processes that read images.
    """

    batch_measured = 1  # images at a time where they are measured: they may differ in size

    def __init__(self, batch_size: int, workers: int) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}; got {value}.")
        self.batch_size, self._workers = batch_size, workers
        self._sets: dict[str, Items[Any]] = {}

    def load(self, split: str) -> Items[Any]:
        """The set "train" or "val"."""
        raise NotImplementedError

    def collate(self, items: Sequence[Any]) -> Any:
        """A batch of items; None stands for one that was left out."""
        return lists(items)

    def setup(self, stage: str | None = None) -> None:
        """Read the lists of what the stage of Lightning needs."""
        for split in ("train", "val") if stage in (None, "fit") else ("val",):
            if split not in self._sets:
                self._sets[split] = self.load(split)

    def teardown(self, stage: str) -> None:
        """Tell what was left out."""
        for split, items in self._sets.items():
            if items.skipped:
                print(f"skipped {items.skipped} bad items of {split}")

    def train_dataloader(self) -> DataLoader[Any]:
        """The training images in a new order every epoch; an incomplete last batch is left out."""
        return self._loader("train", self.batch_size, train=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation images, in order."""
        return self._loader("val", self.batch_measured)

    def test_dataloader(self) -> DataLoader[Any]:
        """The validation images, in order: the test images of these data sets have no public targets."""
        return self._loader("val", self.batch_measured)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The validation images, in order."""
        return self._loader("val", self.batch_measured)

    def _loader(self, split: str, size: int, train: bool = False) -> DataLoader[Any]:
        items = self._sets[split]
        return loader(items, size, train, self._workers, self.collate, items.order(size))


def lists(items: Sequence[Item | None]) -> Batch:
    """A batch of images of any sizes: a list of them, and one of their targets; what was left out is not in it."""
    kept = [item for item in items if item is not None]
    return [image for image, _ in kept], [target for _, target in kept]


def open_image(path: Path | str, mode: str = "RGB", content: bytes | None = None) -> Image.Image:
    """The image in a file, decoded; `content` is that of the file where `path` only names it.

    Raises:
        BadItemError: if there is no image to be read.
    """
    try:
        with Image.open(path if content is None else BytesIO(content)) as image:
            if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
                return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert(mode)
            return image.convert(mode) if image.mode != mode else image.copy()
    except FileNotFoundError:
        raise BadItemError(f"there is no image {path}.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # what damaged files make Pillow raise
        raise BadItemError(f"{path} cannot be read as an image: {error}.") from None
