"""Images in tar files, as WebDataset lays them out, on a disk or behind an address."""

from __future__ import annotations

import json
import re
import sys
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from fsspec.core import url_to_fs
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from involution.data.items import BadItemError, Items, open_image
from involution.data.order import DataError, Order

_INFO = "_info.json"  # of the shards of a folder, as timm writes it
_NAMES = {"train": ("train",), "val": ("validation", "val")}  # of a split
_SPLITS = [name for names in _NAMES.values() for name in names]


class Member(NamedTuple):
    """An image in a tar file: its name there, where its bytes are, and its class."""

    name: str
    start: int
    size: int
    number: int


class Shards(Items[tuple[Tensor, int]]):
    """The images of one split in tar files; an item is a transformed image and its class.

    In a tar file `KEY.jpg`, or another kind of image, has its class beside it: a number in `KEY.cls`, or else `label`
    in `KEY.json`. Shards are trained on file by file (see `Order`), and any of their items is read where it lies.

    Args:
        root: the folder of the tar files, or its address, such as https://host/folder or s3://bucket/folder. Which are
            of the split tells its `_info.json`, in the format of timm's data sets, which lists names and numbers of
            samples; without it, on a disk, their names or those of their folders, in which "train" or "val" is a word.
        split: "train" or "val".
        transform: from an image of Pillow to a tensor.
        num_classes: how many classes there are.
        cache: folder in which copies of shards are kept that are behind an address.
        train: the next good item takes the place of one left out.
        skip_bad: leave items out that are bad, and count them.

    Attributes:
        classes: their numbers, as texts.

    Raises:
        ValueError: if there are no shards, or they are damaged.
    """

    def __init__(
        self,
        root: str,
        split: str,
        transform: Callable[[Any], Tensor],
        num_classes: int,
        cache: Path,
        train: bool = False,
        skip_bad: bool = False,
    ) -> None:
        super().__init__(skip_bad, train)
        if num_classes < 1:
            raise DataError("shards do not tell how many classes there are; give it by `--data.num_classes`.")
        self.classes = tuple(map(str, range(num_classes)))
        self._transform, self._cache = transform, cache
        self._members: dict[int, list[Member] | BadItemError] = {}  # of the shards that were opened
        self._paths, self.counts = self._find(root.rstrip("/"), split)
        self._ends = list(accumulate(self.counts))
        if not self._ends[-1]:
            raise DataError(f"the shards of {split} in {root} hold no images.")

    def order(self, batch_size: int) -> Order:
        """In which this process asks for its items: file by file."""
        return Order(len(self), batch_size, self._train, files=self.counts)

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> tuple[Tensor, int]:
        """One image and its class."""
        shard = bisect_right(self._ends, index)
        member = self._listed(shard)[index - self._ends[shard]]  # counted from the shard's end
        name = f"{self._paths[shard]}: {member.name}"
        if not 0 <= member.number < len(self.classes):
            raise BadItemError(f"{name} is of class {member.number}; `num_classes` is {len(self.classes)}.")
        with self._local(self._paths[shard]).open("rb") as file:
            file.seek(member.start)
            content = file.read(member.size)
        return self._transform(open_image(name, content=content)), member.number

    def _find(self, root: str, split: str) -> tuple[list[str], list[int]]:
        """The shards of a split, and how many images each holds."""
        info = self._info(root)
        if info is not None:
            known = info["splits"]
            found = next((known[name] for name in _NAMES[split] if name in known), None)
            if found is None:
                raise DataError(f"{root}/{_INFO} has no split {_or(_NAMES[split])}; it has {', '.join(known)}.")
            return [f"{root}/{name}" for name in found["filenames"]], [int(count) for count in found["shard_lengths"]]
        names = "|".join(_NAMES[split])
        named = re.compile(rf"(^|[^a-z])({names})([^a-z]|$)", re.IGNORECASE)  # as a word: "retrieval" holds a "val"
        paths = sorted(path for path in _tars(Path(root)) if named.search(path.relative_to(root).as_posix()))
        if not paths:
            raise DataError(
                f"there are no shards of {split} in {root}: no tar file with {_or(_NAMES[split])} in its name, and no "
                f"{_INFO} that lists them."
            )
        shown = tqdm(paths, f"counting images of {split}", file=sys.stderr, leave=False, disable=None)
        try:
            lists = [members(path) for path in shown]
        except BadItemError as error:
            raise DataError(str(error)) from None
        self._members.update(enumerate(lists))
        return [str(path) for path in paths], [len(each) for each in lists]

    def _info(self, root: str) -> dict[str, Any] | None:
        try:
            files, folder = url_to_fs(root)
        except (ImportError, ValueError) as error:  # an address of a kind that takes another package, or of none
            raise DataError(f"`root` {root} cannot be read: {error}.") from error
        if not files.exists(f"{folder}/{_INFO}"):
            if "://" in root:
                raise DataError(f"there is no {root}/{_INFO}, which must list the shards and how much each holds.")
            return None
        try:
            info: dict[str, Any] = json.loads(files.cat_file(f"{folder}/{_INFO}"))
            for split in info["splits"].values():
                if len(split["filenames"]) != len(split["shard_lengths"]):
                    raise ValueError("it has other numbers of `filenames` and `shard_lengths`")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{root}/{_INFO} does not describe shards as timm's data sets do: {error!r}.") from error
        return info

    def candidates(self, index: int) -> Iterator[int]:
        """The item at `index`; then those as far on in other shards, as a whole shard may be bad; then all others."""
        length = -(-len(self) // len(self.counts))
        jumps = ((index + length * jump) % len(self) for jump in range(1, len(self.counts) if self._train else 0))
        return chain([index], jumps, islice(super().candidates(index), 1, None))

    def _listed(self, shard: int) -> list[Member]:
        """What a shard holds, read when it is first asked for; what is wrong with it is remembered too."""
        if shard not in self._members:
            try:
                found = members(self._local(self._paths[shard]))
                if len(found) != self.counts[shard]:
                    raise BadItemError(
                        f"{self._paths[shard]} holds {len(found)} images; {_INFO} tells of {self.counts[shard]}."
                    )
                self._members[shard] = found
            except BadItemError as error:
                self._members[shard] = error
        listed = self._members[shard]
        if isinstance(listed, BadItemError):
            raise listed
        return listed

    def _local(self, path: str) -> Path:
        """A shard on a disk; one behind an address is copied to the cache, once for all processes."""
        if "://" not in path:
            return Path(path)
        place = self._cache / path.partition("://")[2]
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{place}.lock"):
                if not place.exists():
                    part = place.with_name(f"{place.name}.part")
                    files, remote = url_to_fs(path)
                    files.get_file(remote, str(part))
                    part.replace(place)
        return place


def is_sharded(root: str) -> bool:
    """Whether `root` is an address, or a folder of tar files and not of folders of classes."""
    folder = Path(root)
    if "://" in root or (folder / _INFO).exists():
        return True
    return bool(_tars(folder)) and not any(path.is_dir() for name in _SPLITS for path in (folder / name).glob("*"))


def members(path: Path) -> list[Member]:
    """The images in a tar file, in its order.

    Raises:
        BadItemError: if the file cannot be read, or an image is without a class.
    """
    images: list[tuple[str, tarfile.TarInfo]] = []
    labels: dict[str, tuple[str, Any]] = {}  # of a key, by .cls rather than .json
    try:
        with tarfile.open(path, "r:") as file:
            for member in file:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key, extension = f"{folder}/{stem}", f".{extension.lower()}"
                if extension in IMG_EXTENSIONS:
                    images.append((key, member))
                elif extension == ".cls" or (extension == ".json" and key not in labels):
                    content = file.extractfile(member)
                    labels[key] = (member.name, content.read() if content else b"")
            if path.stat().st_size < file.offset + tarfile.BLOCKSIZE:  # no block of zeros: Python lets it pass
                raise tarfile.ReadError("it is cut off.")
    except (tarfile.TarError, OSError) as error:
        raise BadItemError(f"{path} cannot be read as a tar file: {error}") from error
    found = []
    for key, member in images:
        if key not in labels:
            raise BadItemError(f"{path}: {member.name} has no {key.lstrip('/')}.cls beside it, nor .json.")
        name, content = labels[key]
        try:
            told = json.loads(content)
            number = int(told if name.lower().endswith(".cls") else told["label"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadItemError(f"{path}: {name} does not tell a class: {error!r}.") from error
        found.append(Member(member.name, member.offset_data, member.size, number))
    return found


def _tars(folder: Path) -> list[Path]:
    """The tar files in a folder, and in the folders of splits there."""
    return [path for place in (folder, *(folder / name for name in _SPLITS)) for path in place.glob("*.tar")]


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)
