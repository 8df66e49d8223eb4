"""Are two digits the same? Strips on which only a network that sees both at once can tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from involution.data.digits import split
from involution.data.order import loader
from involution.data.scenes import SPLITS

HEIGHT = 32
_SIDE = 16  # of a digit
_INK = 16  # value of a black pixel in a scan


class Pairs(LightningDataModule):
    """Two real handwritten digits on a strip, a given distance apart: class 1 if they are the same digit, else 0.

    Either answer is half of all. What single digits look like does not tell: whatever score each of them adds, two of
    one kind and two of the other cannot both score higher than one of each. So whoever adds up what single places say,
    by average pooling and a linear layer, answers at chance unless some place has seen both.

    Batches are pairs of images, (B, 1, 32, width) float32 with paper 0 and ink 1, and classes, (B,) int64.

    Args:
        distance: from the left edge of one digit to that of the other, in pixels; digits are 16 pixels wide.
        digits: which there are.
        width: of the strip, in pixels; both digits are anywhere on it.
        train_pairs: in an epoch, the same in all.
        validation_pairs: pairs of other scans.
        test_pairs: pairs of yet other scans.
        batch_size: pairs in a training step.
        seed: the same gives the same pairs on every machine.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> pairs = Pairs(distance=48, train_pairs=8, validation_pairs=0, test_pairs=0, batch_size=4)
        >>> pairs.setup()
        >>> images, same = next(iter(pairs.train_dataloader()))
        >>> images.shape, same.shape
        (torch.Size([4, 1, 32, 112]), torch.Size([4]))
    """

    in_chans = 1
    num_classes = 2

    def __init__(
        self,
        distance: int = 32,
        digits: Sequence[int] = (0, 1),
        width: int = 112,
        train_pairs: int = 8000,
        validation_pairs: int = 1000,
        test_pairs: int = 2000,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not _SIDE <= distance <= width - _SIDE:
            raise ValueError(
                f"`distance` must be from {_SIDE}, side by side, to {width - _SIDE} on a strip {width} wide; got "
                f"{distance}."
            )
        if len(set(digits)) < 2 or not set(digits) <= set(range(10)):
            raise ValueError(f"`digits` must be two or more of 0 to 9; got {tuple(digits)}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
        self.distance, self.digits, self.width = distance, sorted(set(digits)), width
        self.batch_size, self.seed = batch_size, seed
        self._counts = dict(zip(SPLITS, (train_pairs, validation_pairs, test_pairs), strict=True))
        self._pairs: dict[str, TensorDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Draw the pairs of all splits, once."""
        scans = load_digits()
        for number, (name, indices) in enumerate(zip(SPLITS, split(scans.target), strict=True)):
            if name not in self._pairs:
                # This generator's stream is frozen, unlike that of numpy's newer ones.
                random = np.random.RandomState((self.seed, number))
                of_digit = [scans.images[indices][scans.target[indices] == digit] / _INK for digit in self.digits]
                self._pairs[name] = self._draw(random, of_digit, self._counts[name])

    def _draw(self, random: np.random.RandomState, scans: Sequence[np.ndarray], count: int) -> TensorDataset:
        images = np.zeros((count, 1, HEIGHT, self.width), np.float32)
        for index, image in enumerate(images):
            first = random.randint(len(scans))
            step = 0 if index % 2 else random.randint(1, len(scans))  # to the other digit
            left = random.randint(self.width - _SIDE - self.distance + 1)
            for which, at in ((first, left), ((first + step) % len(scans), left + self.distance)):
                top = random.randint(HEIGHT - _SIDE + 1)
                scan = scans[which][random.randint(len(scans[which]))]
                image[0, top : top + _SIDE, at : at + _SIDE] = scan.repeat(2, axis=0).repeat(2, axis=1)
        return TensorDataset(torch.from_numpy(images), torch.arange(count) % 2)

    def train_dataloader(self) -> DataLoader:
        """The training pairs in a new order every epoch; an incomplete last batch is left out."""
        return loader(self._pairs["train"], self.batch_size, train=True)

    def val_dataloader(self) -> DataLoader:
        """The validation pairs, in order."""
        return loader(self._pairs["validation"], self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """The test pairs, in order."""
        return loader(self._pairs["test"], self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        """The test pairs, in order."""
        return self.test_dataloader()
