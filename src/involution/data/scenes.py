"""Scenes composed of real handwritten digits: images with boxes, instance masks and semantic maps."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from involution.data.digits import split
from involution.data.items import Item, lists
from involution.data.order import loader

Kept = TypeVar("Kept")

_INK = 16  # value of a black pixel in a scan
_TRIALS = 30  # places tried for a digit
_VISIBLE = 0.5  # of the ink, where a pixel belongs to the digit
SPLITS = ("train", "validation", "test")
Scene = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]


@dataclass(frozen=True)
class Look:
    """How scenes are composed.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        fewest: digits a scene.
        most: digits a scene; fewer where there is no room left.
        smallest: side of a digit, in pixels.
        largest: side of a digit, in pixels.
        turn: largest rotation of a digit, in degrees.
        clutter: pieces of digits strewn over the background.
        overlap: largest share of a digit's box that another's may cover, from 0 to 1; the later digit is in front.

    Raises:
        ValueError: if a setting is out of range.
    """

    height: int = 128
    width: int = 128
    fewest: int = 1
    most: int = 6
    smallest: int = 20
    largest: int = 48
    turn: float = 20.0
    clutter: int = 6
    overlap: float = 0.2

    def __post_init__(self) -> None:
        for name, least in (("height", 8), ("width", 8), ("fewest", 0), ("smallest", 8), ("turn", 0), ("clutter", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}; got {getattr(self, name)}.")
        if self.most < self.fewest:
            raise ValueError(f"`most` must be at least `fewest`, {self.fewest}; got {self.most}.")
        room = min(self.height, self.width)
        if not self.smallest <= self.largest <= room:
            raise ValueError(f"`largest` must be from `smallest`, {self.smallest}, to {room}; got {self.largest}.")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"`overlap` must be from 0 to 1; got {self.overlap}.")


class Scenes(Dataset[Item]):
    """Scenes of one split, composed once and kept.

    An item is an image, (3, H, W) float32 from 0 to 1, and its target: boxes (N, 4) float32, left, top, right and
    bottom in pixels; labels (N,) int64, the digit + 1; masks (N, H, W) uint8; map (H, W) int64, 0 where there is no
    digit. N may be 0.

    Args:
        split: "train", "validation" or "test"; no digit of one is in another.
        count: scenes.
        look: how they are composed.
        seed: the same gives the same scenes on every machine.

    Raises:
        ValueError: if there is no such split.
    """

    def __init__(self, split_name: str, count: int, look: Look, seed: int = 0) -> None:
        self._scenes = first(composed(split_name, look, seed), count, f"composing {split_name} scenes")

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Item:
        image, owner, labels = self._scenes[index]
        ids = np.arange(1, len(labels) + 1)
        masks = torch.from_numpy((owner == ids[:, None, None]).astype(np.uint8))
        boxes = [bounds(mask) for mask in masks.numpy()]
        classes = torch.from_numpy(np.concatenate([[0], labels])).long()
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": classes[1:],
            "masks": masks,
            "map": classes[torch.from_numpy(owner).long()],
        }
        return torch.from_numpy(image).permute(2, 0, 1).float() / 255, target


class SceneModule(LightningDataModule):
    """Scenes of digits; see its subclasses for what is asked about them.

    Args:
        look: how scenes are composed.
        train_scenes: in an epoch, the same in all.
        validation_scenes: scenes of other digits.
        test_scenes: scenes of yet other digits.
        batch_size: scenes in a training step.
        seed: the same gives the same scenes on every machine.

    Raises:
        ValueError: if a setting is out of range.
    """

    kind: Callable[[str, int, Look, int], Dataset[Any]]
    collate: Callable[[list[Any]], Any]

    def __init__(
        self,
        look: Look = Look(),  # frozen
        train_scenes: int = 2000,
        validation_scenes: int = 100,
        test_scenes: int = 300,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"train_scenes": train_scenes, "validation_scenes": validation_scenes, "test_scenes": test_scenes}
        for name, value, least in (
            *((name, value, 0) for name, value in counts.items()),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}; got {value}.")
        self.look, self.batch_size, self.seed = look, batch_size, seed
        self._counts = dict(zip(SPLITS, counts.values(), strict=True))
        self._scenes: dict[str, Dataset[Any]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Compose what the stage of Lightning needs, all by default; once."""
        needed = {"fit": SPLITS[:2], "validate": SPLITS[1:2], "test": SPLITS[2:], "predict": SPLITS[2:]}
        for name in needed.get(stage or "", SPLITS):
            if name not in self._scenes:
                self._scenes[name] = _dataset(type(self).kind, name, self._counts[name], self.look, self.seed)

    def train_dataloader(self) -> DataLoader[Any]:
        """The training scenes in a new order every epoch; an incomplete last batch is left out."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation scenes, in order."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test scenes, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test scenes, in order."""
        return self.test_dataloader()

    def _loader(self, split_name: str) -> DataLoader[Any]:
        return loader(
            self._scenes[split_name], self.batch_size, train=split_name == "train", collate=type(self).collate
        )


class DigitScenes(SceneModule):
    """Scenes of digits for detection, instance and semantic segmentation; see `Scenes` for what a batch lists.

    Example:
        >>> scenes = DigitScenes(train_scenes=4, validation_scenes=0, test_scenes=0, batch_size=2)
        >>> scenes.setup()
        >>> images, targets = next(iter(scenes.train_dataloader()))
        >>> images[0].shape, sorted(targets[0])
        (torch.Size([3, 128, 128]), ['boxes', 'labels', 'map', 'masks'])
    """

    classes = tuple("0123456789")
    map_classes = ("background", *classes)
    kind = Scenes
    collate = staticmethod(lists)


@lru_cache(maxsize=len(SPLITS))
def _dataset(
    kind: Callable[[str, int, Look, int], Dataset[Any]], split_name: str, count: int, look: Look, seed: int
) -> Dataset[Any]:
    """Composed once for all trainings of a process, which often ask for the same."""
    return kind(split_name, count, look, seed)


def first(scenes: Iterator[Kept], count: int, doing: str) -> list[Kept]:
    """The first `count`, with a progress bar."""
    shown = tqdm(itertools.islice(scenes, count), doing, count, file=sys.stderr, leave=False, disable=None)
    return list(shown)


def composed(split_name: str, look: Look, seed: int = 0) -> Iterator[Scene]:
    """Scenes of one split without end, the same on every machine; see `Scenes` and `compose`.

    Raises:
        ValueError: if there is no such split.
    """
    if split_name not in SPLITS:
        raise ValueError(f"`split_name` must be one of {', '.join(SPLITS)}; got {split_name!r}.")
    scans = load_digits()
    number = SPLITS.index(split_name)
    chosen = split(scans.target)[number]
    images, classes = scans.images[chosen], scans.target[chosen]
    # This generator's stream is frozen, unlike that of numpy's newer ones.
    return (compose(np.random.RandomState((seed, number, i)), images, classes, look) for i in itertools.count())


def compose(random: np.random.RandomState, scans: NDArray[np.float64], classes: NDArray[np.int64], look: Look) -> Scene:
    """One scene: paper, clutter, and digits in the order of their labels, the later in front.

    Args:
        random: what is drawn from.
        scans: digits to choose from, (N, 8, 8) from 0 to 16.
        classes: their digits, (N,).
        look: how scenes are composed.

    Returns:
        The image, (H, W, 3); the number of the digit each pixel shows, from 1, and 0 for none, (H, W); and the labels
        of the digits, each its digit + 1, (N,).
    """
    paper = random.randint(150, 256, 3)
    grain = random.randint(-12, 13, (look.height, look.width, 1))
    image = np.clip(paper + grain, 0, 255).astype(np.float64)
    for _ in range(look.clutter):
        row, column = random.randint(0, 5, 2)
        piece = np.zeros_like(scans[0])
        piece[row : row + 4, column : column + 4] = scans[random.randint(len(scans))][
            row : row + 4, column : column + 4
        ]
        ink = _render(piece, random.randint(look.smallest, look.largest + 1), random.randint(-180, 181))
        _blend(image, ink, _place(random, ink, look), random.randint(0, 150, 3))
    owner = np.zeros(image.shape[:2], np.uint8)
    labels: list[int] = []
    taken: list[tuple[int, int, int, int]] = []
    for _ in range(random.randint(look.fewest, look.most + 1)):
        chosen = random.randint(len(scans))
        side = random.randint(look.smallest, look.largest + 1)
        ink = _render(scans[chosen], side, (2 * random.random_sample() - 1) * look.turn)
        colour = random.randint(0, 110, 3)
        for _ in range(_TRIALS):
            top, left = _place(random, ink, look)
            box = (left, top, left + ink.shape[1], top + ink.shape[0])
            if all(_covered(box, other) <= look.overlap for other in taken):
                _blend(image, ink, (top, left), colour)
                owner[top : box[3], left : box[2]][ink >= _VISIBLE] = len(labels) + 1
                labels.append(int(classes[chosen]) + 1)
                taken.append(box)
                break
    return np.rint(image).astype(np.uint8), *_seen(owner, labels)


def _seen(owner: NDArray[np.uint8], labels: list[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Without the digits that others hide."""
    present = [number for number in range(1, len(labels) + 1) if (owner == number).any()]
    renumber = np.zeros(len(labels) + 1, np.uint8)
    renumber[present] = np.arange(1, len(present) + 1)
    return renumber[owner], np.array([labels[number - 1] for number in present], np.int64)


def _render(scan: NDArray[np.float64], side: int, turn: float) -> NDArray[np.float64]:
    """A scan enlarged to `side`, turned by degrees, cut to its ink: (h, w) from 0 to 1."""
    angle = np.deg2rad(turn)
    # Rounded, as machines differ in the last bits of a cosine; all else is exact arithmetic, the same everywhere.
    cosine, sine = round(float(np.cos(angle)), 6), round(float(np.sin(angle)), 6)
    reach = int(np.ceil(side * (abs(cosine) + abs(sine))))
    at = (np.arange(reach) - (reach - 1) / 2) * (len(scan) / side)
    padded = np.pad(scan / _INK, 2)
    middle, last = (len(padded) - 1) / 2, len(padded) - 1.001
    turned = (at[:, None] * cosine - at * sine, at[:, None] * sine + at * cosine)
    rows, columns = (np.clip(each + middle, 0, last) for each in turned)
    r, c = rows.astype(int), columns.astype(int)
    y, x = rows - r, columns - c
    upper = padded[r, c] * (1 - x) + padded[r, c + 1] * x
    lower = padded[r + 1, c] * (1 - x) + padded[r + 1, c + 1] * x
    ink = upper * (1 - y) + lower * y
    seen = ink >= _VISIBLE
    if not seen.any():
        return np.zeros((1, 1))
    left, top, right, bottom = bounds(seen)
    return ink[top:bottom, left:right]


def _place(random: np.random.RandomState, ink: NDArray[np.float64], look: Look) -> tuple[int, int]:
    """Where the top left pixel goes: anywhere inside."""
    return (
        random.randint(0, max(1, look.height - ink.shape[0] + 1)),
        random.randint(0, max(1, look.width - ink.shape[1] + 1)),
    )


def _blend(
    image: NDArray[np.float64], ink: NDArray[np.float64], place: tuple[int, int], colour: NDArray[np.int64]
) -> None:
    """Draw `ink` in place; what overhangs is cut."""
    top, left = place
    part = image[top : top + ink.shape[0], left : left + ink.shape[1]]
    alpha = ink[: part.shape[0], : part.shape[1], None]
    part[:] = part * (1 - alpha) + colour * alpha


def _covered(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """The common part of two boxes, as a share of the smaller."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (box, other)]
    return max(0, width) * max(0, height) / min(areas)


def bounds(mask: NDArray[np.generic]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is not zero, in pixels; the last two are the first outside."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
