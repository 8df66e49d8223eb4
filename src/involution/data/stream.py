"""Images streamed from a data set of Hugging Face, which need not fit on a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, repeat
from typing import Any, NamedTuple

import torch
from datasets import ClassLabel, Features, IterableDataset, Value, load_dataset
from datasets import Image as ImageFeature
from datasets.distributed import split_dataset_by_node
from fsspec.core import url_to_fs
from torch import Tensor

from involution.data.items import BadItemError, Items, open_image
from involution.data.order import DataError, Share

_NAMES = {"train": ("train",), "val": ("validation", "val", "test")}  # of a split
_BUFFER = 1024  # images that wait to be drawn from, some hundred megabytes


class Encoded(NamedTuple):
    """An image as it came: its name, its bytes (None: they are in the file of that name), and its class."""

    name: str
    content: bytes | None
    number: int


class Stream(Items[tuple[Tensor, int]]):
    """The images of one split of a data set that is read as it comes; an item is a transformed image and its class.

    The order of training is that of the data set's shuffled files, with images drawn from a buffer.

    Args:
        path: what `datasets.load_dataset` takes: a name such as ILSVRC/imagenet-1k, or a folder of files.
        split: "train" or "val", which is called "validation", "val" or "test" there.
        transform: from an image of Pillow to a tensor.
        num_classes: how many classes there are, if the data set does not tell.
        count: images of an epoch of training, on all processes, if the data set does not tell.
        train: read to train on.
        skip_bad: leave items out that are bad, and count them; batches are smaller by them.

    Attributes:
        classes: their names.

    Raises:
        ValueError: if there is no such data set, it does not hold one image and one class an item, or it does not tell
            what is not given.
    """

    def __init__(
        self,
        path: str,
        split: str,
        transform: Callable[[Any], Tensor],
        num_classes: int = 0,
        count: int = 0,
        train: bool = False,
        skip_bad: bool = False,
    ) -> None:
        super().__init__(skip_bad, train)
        self._transform, self._path = transform, path
        try:
            parts = load_dataset(path, streaming=True)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a data set of Hugging Face: {error}") from error
        name = next((name for name in _NAMES[split] if name in parts), None)
        if name is None:
            raise DataError(f"{path} has no split {' or '.join(_NAMES[split])}; it has {', '.join(parts)}.")
        stream = parts[name]
        features: Features = stream.features or stream._resolve_features().features
        self._image, self._label = _columns(path, features)
        self.stream: IterableDataset = stream.cast_column(self._image, ImageFeature(decode=False))
        label = features[self._label]
        if not isinstance(label, ClassLabel) and num_classes < 1:
            raise DataError(f"{path} does not tell how many classes there are; give it by `--data.num_classes`.")
        self.classes = tuple(label.names) if isinstance(label, ClassLabel) else tuple(map(str, range(num_classes)))
        told = (stream.info.splits or {}).get(name)
        self.count = count or (told.num_examples if told else 0)
        if train and not self.count:
            raise DataError(f"{path} does not tell how many images there are; give it by `--data.train_images`.")

    def order(self, batch_size: int) -> Share:
        """In which this process asks for its items."""
        return (_Training if self._train else _Measuring)(self, batch_size)

    def encoded(self, stream: IterableDataset) -> Iterator[Encoded]:
        """The images of (a part of) the stream as they come."""
        for number, item in enumerate(stream):
            image = item[self._image]
            yield Encoded(image["path"] or f"image {number} of {self._path}", image["bytes"], int(item[self._label]))

    def candidates(self, index: Any) -> Iterator[Any]:
        """No other item takes the place of a bad one."""
        yield index

    def read(self, index: Any) -> tuple[Tensor, int]:
        """One image, decoded and transformed, and its class."""
        name, content, number = index
        if not 0 <= number < len(self.classes):
            raise BadItemError(f"{name} is of class {number}; there are {len(self.classes)}.")
        if content is None:
            files, place = url_to_fs(name)
            content = files.cat_file(place)
        return self._transform(open_image(name, content=content)), number


class _Measuring(Share):
    """Every image once, in the order of the stream."""

    def __init__(self, items: Stream, batch_size: int) -> None:
        super().__init__(train=False)
        self._items = items

    def __iter__(self) -> Iterator[tuple[Encoded, int]]:
        part = split_dataset_by_node(self._items.stream, self.rank, self.num_replicas)
        return zip(self._items.encoded(part), repeat(0))

    def __len__(self) -> int:
        raise TypeError("what a process measures of a stream is known only in the end")


class _Training(Share):
    """As many images for each process, and as many full batches, shuffled by seed and epoch.

    A process whose files end before its share does begins with them again.
    """

    def __init__(self, items: Stream, batch_size: int) -> None:
        super().__init__(train=True)
        self._items, self._batch_size = items, batch_size
        self._length = self.full(items.count, batch_size) // self.num_replicas

    def __iter__(self) -> Iterator[tuple[Encoded, int]]:
        shuffled = self._items.stream.shuffle(seed=self.seed, buffer_size=_BUFFER)
        part = split_dataset_by_node(shuffled, self.rank, self.num_replicas)
        part.set_epoch(self.epoch)  # last, as a part of a stream does not know the epoch of the whole
        seeds = torch.randint(2**32, (self._length, self.num_replicas), generator=self.generator())[:, self.rank]
        drawn = zip(self._again_and_again(part), seeds.tolist(), strict=False)
        return islice(drawn, self._batch_size * self.batches_skipped, None)

    def _again_and_again(self, part: IterableDataset) -> Iterator[Encoded]:
        found = True
        while found:
            found = False
            for each in self._items.encoded(part):
                found = True
                yield each
        raise BadItemError("a process found no images in its part of the stream; use fewer processes or more files.")

    def __len__(self) -> int:
        return self._length


def _columns(path: str, features: Features) -> tuple[str, str]:
    """The names of the image and the class in an item."""
    images = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
    labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    if not labels:
        labels = [name for name, kind in features.items() if isinstance(kind, Value) and "int" in kind.dtype]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(f"an item of {path} must hold one image and one class; it holds {', '.join(features)}.")
    return images[0], labels[0]
