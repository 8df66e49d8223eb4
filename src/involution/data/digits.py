"""Real handwritten digits that come with scikit-learn, as a LightningDataModule."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from PIL.Image import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms.functional import to_tensor

from involution.data.order import loader

TEST_IMAGES, VALIDATION_IMAGES = 500, 197
_SCAN = 8  # pixels a side
_INK = 16  # value of a black pixel


class Digits(LightningDataModule):
    """The 1797 scans of handwritten digits in scikit-learn (8 x 8 pixels, 10 classes), enlarged for nets that stride.

    500 images are held out for the test and 197 for validation; 1100 remain to train on. Both splits are stratified by
    class and drawn with a fixed seed, so they are the same in every run, whatever seed the run has.

    Batches are pairs of images, (B, 1, size, size) float32 with paper 0 and ink 1, and classes, (B,) int64.

    Args:
        size: pixels a side after bilinear enlargement.
        batch_size: images in a training step.
        max_shift: largest random shift of a training image, in pixels of the 8 x 8 scan, along each axis. 0: none.
        max_turn: largest random rotation of a training image, in degrees. 0: none.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> digits = Digits(size=32, batch_size=100)
        >>> digits.setup()
        >>> images, classes = next(iter(digits.train_dataloader()))
        >>> images.shape, classes.shape
        (torch.Size([100, 1, 32, 32]), torch.Size([100]))
    """

    in_chans = 1
    num_classes = 10

    def __init__(self, size: int = 32, batch_size: int = 64, max_shift: float = 0.5, max_turn: float = 10.0) -> None:
        super().__init__()
        for name, value, least in (
            ("size", size, _SCAN),
            ("batch_size", batch_size, 1),
            ("max_shift", max_shift, 0),
            ("max_turn", max_turn, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}; got {value}.")
        self.size, self.batch_size = size, batch_size
        self.max_shift, self.max_turn = max_shift, max_turn

    def setup(self, stage: str | None = None) -> None:
        """Read, enlarge and split the scans."""
        scans = load_digits()
        images = torch.from_numpy(scans.images).float().unsqueeze(1) / _INK
        images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)
        classes = torch.from_numpy(scans.target).long()
        train, validation, test = split(scans.target)
        self.train = TensorDataset(images[train], classes[train])
        self.validation = TensorDataset(images[validation], classes[validation])
        self.test = TensorDataset(images[test], classes[test])

    def to_tensor(self, image: Image) -> Tensor:
        """Any image of a digit, dark on light, as those of the data set, which its ink fills: (1, size, size)."""
        ink = 1 - to_tensor(image.convert("L"))[0]
        drawn = (ink > (ink.min() + ink.max()) / 2).nonzero()
        if len(drawn):
            (top, left), (bottom, right) = drawn.amin(0).tolist(), drawn.amax(0).tolist()
            ink = ink[top : bottom + 1, left : right + 1]
        rows, columns = (max(ink.shape) - side for side in ink.shape)  # that a square lacks
        ink = F.pad(ink, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        scan = F.interpolate(ink[None, None], size=(_SCAN, _SCAN), mode="area")  # coarse, as the scans are
        scan = scan / scan.max().clamp(min=1 / _INK)  # the darkest pixel of a scan is black
        return F.interpolate(scan, size=(self.size, self.size), mode="bilinear", align_corners=False)[0]

    def train_dataloader(self) -> DataLoader:
        """The training images in a new order every epoch; an incomplete last batch is left out."""
        moved = _Moved(self.train, 2 * self.max_shift / _SCAN, self.max_turn)
        return loader(moved, self.batch_size, train=True)

    def val_dataloader(self) -> DataLoader:
        """The validation images, in order."""
        return loader(self.validation, 2 * self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """The test images, in order."""
        return loader(self.test, 2 * self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        """The test images, in order."""
        return loader(self.test, 2 * self.batch_size)


class _Moved(Dataset[tuple[Tensor, Tensor]]):
    """Images with classes, each image shifted by up to `max_shift` half-widths and turned by up to `max_turn`."""

    def __init__(self, images: TensorDataset, max_shift: float, max_turn: float) -> None:
        self._images, self._max_shift, self._max_turn = images, max_shift, max_turn

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, digit = self._images[index]
        return _move(image[None], self._max_shift, self._max_turn)[0], digit


def split(classes: Any) -> tuple[Any, Any, Any]:
    """Indices of the training, validation and test images, given all classes: the same in every run."""
    rest, test = train_test_split(range(len(classes)), test_size=TEST_IMAGES, stratify=classes, random_state=0)
    train, validation = train_test_split(rest, test_size=VALIDATION_IMAGES, stratify=classes[rest], random_state=0)
    return train, validation, test


def _move(images: Tensor, max_shift: float, max_turn: float) -> Tensor:
    """`images`, (B, C, H, W), each shifted by up to `max_shift` half-widths and turned by up to `max_turn` degrees."""
    count = images.shape[0]
    shift = (2 * torch.rand(count, 2, 1, device=images.device) - 1) * max_shift
    turn = torch.deg2rad((2 * torch.rand(count, device=images.device) - 1) * max_turn)
    rotation = torch.stack((turn.cos(), -turn.sin(), turn.sin(), turn.cos()), dim=1).view(count, 2, 2)
    grid = F.affine_grid(torch.cat((rotation, shift), dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
