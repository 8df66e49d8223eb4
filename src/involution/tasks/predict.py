"""Predictions for people and programs: classes, or pictures with boxes, masks or maps drawn, and all as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL.Image import Image
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from involution.data.items import Batch, Item, Items, lists, open_image

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_LIKELIEST = 5  # classes of an image that are written down
_ALPHA = 0.5  # of what is drawn over an image
_READABLE = 384  # pixels of the longer side, at least
_COLOURS = [
    *("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#ee7733", "#0077bb", "#33bbee"),
    *("#ee3377", "#cc3311", "#009988", "#ddaa33", "#bb5566", "#004488", "#997700", "#6699cc", "#994455", "#5566aa"),
]


class Pictures(Items[Item]):
    """The images in files and folders, in the order of their names.

    Args:
        paths: of images, or of folders of images.
        to_tensor: from an image of Pillow to what a network takes. Default: (3, H, W), from 0 to 1.

    Raises:
        ValueError: if a path does not exist, or there is no image.
    """

    hint = ""

    def __init__(self, paths: Sequence[Path], to_tensor: Callable[[Image], Tensor] | None = None) -> None:
        super().__init__(skip_bad=False)
        self._to_tensor = to_tensor or _to_tensor
        self.files: list[Path] = []
        for path in paths:
            if not path.exists():
                raise ValueError(f"`images` must be paths of images or folders; there is no {path}.")
            found = sorted(path.iterdir()) if path.is_dir() else [path]
            self.files += [file for file in found if file.suffix.lower() in _SUFFIXES] if path.is_dir() else found
        if not self.files:
            raise ValueError(f"`images` must hold images; there is none in {', '.join(map(str, paths))}.")
        self.names = [file.stem for file in self.files]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"`images` must differ in their names; got two of {_twice(self.names)}.")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Item:
        """An image, and no target."""
        return self._to_tensor(open_image(self.files[index])), {}


def _to_tensor(image: Image) -> Tensor:
    return F.to_image(image).as_subclass(Tensor).float() / 255


def _twice(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def loader(pictures: Items, alike: bool) -> DataLoader[Item | None]:
    """The pictures one by one, as they may differ in size: in a tensor if they are `alike`, else in a list."""
    return DataLoader(pictures, batch_size=1, collate_fn=None if alike else lists)


class _Writer(BasePredictionWriter):
    """Writes down at the end what was found in each image, and before that if something goes wrong."""

    what: str  # it writes of each image

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        super().__init__(write_interval="batch")
        self._folder, self._names = folder, names
        self.entries: list[dict[str, Any]] = []
        self.count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def _next_name(self) -> str:
        """That of the image whose turn it is."""
        self.count += 1
        return self._names[self.count - 1] if self._names else f"{self.count - 1:05d}"

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write down what was found before something went wrong."""
        self.on_predict_end(trainer, pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Write down what was found."""
        (self._folder / "predictions.json").write_text(json.dumps(self.entries, indent=1) + "\n")


class Classes(_Writer):
    """Writes down the likeliest classes of each image.

    Args:
        folder: where predictions.json goes.
        classes: their names.
        names: of the images, in their order. Default: their places.

    Raises:
        ValueError: of an image whose probabilities are not numbers; none of its classes is likelier than another.
    """

    what = "images in predictions.json"

    def __init__(self, folder: Path, classes: Sequence[str], names: Sequence[str] = ()) -> None:
        super().__init__(folder, names)
        self._classes = classes

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *_: Any) -> None:
        """Remember the images of one batch."""
        best = prediction.cpu().topk(min(_LIKELIEST, len(self._classes)))
        for scores, numbers in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            name = self._next_name()
            if not all(map(isfinite, scores)):
                raise ValueError(
                    f"`ckpt_path` must hold weights that give probabilities; for image {name} the likeliest class has "
                    f"{scores[0]}. Take a checkpoint from before the training diverged, or, if 16 bits overflow, "
                    "predict with --trainer.precision 32."
                )
            likely = zip(numbers, scores, strict=True)
            found = [{"class": self._classes[number], "probability": round(score, 4)} for number, score in likely]
            self.entries.append({"image": name, "classes": found})


class Drawings(_Writer):
    """Draws what was found in each image, batch by batch, and at the end writes it down.

    Small images with detections are drawn several times as large, for the labels to fit.

    Detections are written in COCO's format of results, maps as images of class numbers.

    Args:
        folder: where NAME.png and predictions.json go.
        classes: names of the classes.
        category_ids: of detections, the number of each class in the file.
        least: the score from which detections are drawn; all are written down.
        names: of the images, in their order. Default: the number that COCO has for each, else their place.
    """

    what = "pictures and predictions.json"

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str],
        category_ids: Sequence[int],
        least: float,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, names)
        self._classes, self._numbers, self._least = classes, category_ids, least

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Batch, *_: int
    ) -> None:
        """Draw and remember the images of one batch."""
        for found, image, target in zip(prediction, *batch, strict=True):
            name: int | str = self._next_name()
            if "image_id" in target:
                name = int(target["image_id"])
            self._write(found, (image.cpu() * 255).round().byte(), name)

    def _write(self, found: dict[str, Tensor] | Tensor, picture: Tensor, name: int | str) -> None:
        if isinstance(found, Tensor):
            found = found.cpu()
            counts = torch.bincount(found.flatten(), minlength=len(self._classes)).tolist()
            pixels = {label: count for label, count in zip(self._classes, counts, strict=True) if count}
            self.entries.append({"image": name, "map": f"{name}_map.png", "pixels": pixels})
            F.to_pil_image(found.byte()[None]).save(self._folder / f"{name}_map.png")
            picture = _draw_map(picture, found)
        else:
            found = {key: value.cpu() for key, value in found.items()}
            self.entries += _entries(found, name, self._numbers)
            picture = _draw_detections(picture, found, self._classes, self._least)
        F.to_pil_image(picture).save(self._folder / f"{name}.png")


def _draw_map(picture: Tensor, classes: Tensor) -> Tensor:
    present = classes.unique().tolist()
    colours = [_COLOURS[number % len(_COLOURS)] for number in present]
    return draw_segmentation_masks(picture, torch.stack([classes == n for n in present]), _ALPHA, colours)


def _draw_detections(picture: Tensor, found: dict[str, Tensor], classes: Sequence[str], least: float) -> Tensor:
    kept = found["scores"] >= least
    labels, scores = found["labels"][kept].tolist(), found["scores"][kept].tolist()
    if not labels:
        return picture
    colours = [_COLOURS[label % len(_COLOURS)] for label in labels]
    if "masks" in found:
        picture = draw_segmentation_masks(picture, found["masks"][kept], _ALPHA, colours)
    told = [f"{classes[label - 1]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    times = -(-_READABLE // max(picture.shape[1:]))
    picture = picture.repeat_interleave(times, 1).repeat_interleave(times, 2)
    return draw_bounding_boxes(picture, times * found["boxes"][kept], told, colours, width=2)


def _entries(found: dict[str, Tensor], name: int | str, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
    entries: list[dict[str, Any]] = []
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    for index, (label, score, box) in enumerate(zip(labels, scores, boxes, strict=True)):
        entries.append({"image_id": name, "category_id": category_ids[label - 1], "bbox": box, "score": score})
        if "masks" in found:
            code = rle.encode(np.asfortranarray(found["masks"][index].numpy().astype(np.uint8)))
            entries[-1]["segmentation"] = {"size": code["size"], "counts": code["counts"].decode("ascii")}
    return entries
