"""Semantic segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from involution.data.items import UNLABELLED, Batch
from involution.models.segmentation import segmentor as build_segmentor
from involution.models.stages import Layer, Stages, build
from involution.tasks.task import Task

_AUXILIARY = 0.4  # weight of the auxiliary head's loss


class Segmentation(Task):
    """A segmentor on a network of timm, trained by cross entropy of every pixel.

    Logs `train/loss` every epoch, `lr` every step, `validation/mIoU` every epoch, and in a test `test/mIoU` and the
    intersection over union of every class, such as `test/IoU/road`.

    Args:
        segmentor: "semantic_fpn" or "upernet".
        channels: of its pyramid. Default: 256, and 512 in an UPerNet.
        classes: names of the classes, in their order in the map.
        neck: of the feature pyramid's outputs, "convolution" or "involution".
        scale: of the images as the network sees them: 2 doubles their sides. Maps have the size of the images.
        arch: name of the backbone in timm, such as rednet50 or resnet50c.
        options: its further arguments, such as stem_kernel, or checkpoint_path, for weights `involution convert` wrote.
        mirror: take in place of the RedNet the ResNet of the same depths and widths.
        frozen_stages: stages of the backbone that are not trained; the stem goes with the first.
        norm_eval: batch norms of the backbone keep their statistics.
        training: how it is trained; see `Task`.

    A batch is a list of images, (3, H, W) from 0 to 1, of any sizes, and a list of their targets: map (H, W), 255
    where nothing is known. Predicting gives maps.

    Raises:
        ValueError: if a setting is out of range or unknown.
    """

    measures = ("mIoU",)
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        segmentor: Literal["semantic_fpn", "upernet"] = "semantic_fpn",
        channels: int | None = None,
        classes: Sequence[str] = (),
        neck: Layer = "convolution",
        scale: float = 1.0,
        arch: str = "rednet50",
        options: dict[str, Any] | None = None,
        mirror: bool = False,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        if len(classes) < 2:
            raise ValueError(f"`classes` must name at least two; got {list(classes)}.")
        if scale <= 0:
            raise ValueError(f"`scale` must be above 0; got {scale}.")
        self.classes = tuple(classes)
        count = len(classes)
        stages = Stages(build(arch, options, mirror), frozen_stages, norm_eval)
        self.keep(build_segmentor(segmentor, stages, count, neck, channels))
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        counts = {
            f"{stage}_counts": MulticlassConfusionMatrix(count, ignore_index=UNLABELLED, validate_args=False)
            for stage in ("validation", "test")
        }
        self.counts = nn.ModuleDict(counts)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        """The likeliest class of every pixel, (H, W) for each image."""
        logits = self._logits(images)["out"]
        return [
            each[:, : image.shape[1], : image.shape[2]].argmax(0) for each, image in zip(logits, images, strict=True)
        ]

    def _logits(self, images: list[Tensor]) -> dict[str, Tensor]:
        batch = _stack([(image - self.mean) / self.std for image in images], 0.0)
        if self.hparams["channels_last"]:
            batch = batch.contiguous(memory_format=torch.channels_last)
        scale, sides = self.hparams["scale"], batch.shape[2:]
        if scale == 1:
            logits: dict[str, Tensor] = self.net(batch)
            return logits
        seen = F.interpolate(batch, size=[max(1, round(scale * side)) for side in sides], mode="bilinear")
        return {name: F.interpolate(each, size=sides, mode="bilinear") for name, each in self.net(seen).items()}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The loss of one batch."""
        images, targets = batch
        classes = _stack([target["map"] for target in targets], UNLABELLED)
        logits = self._logits(images)
        losses = {name: F.cross_entropy(each, classes, ignore_index=UNLABELLED) for name, each in logits.items()}
        loss = losses["out"] + _AUXILIARY * losses["aux"] if "aux" in losses else losses["out"]
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def predict_step(self, batch: Batch, index: int) -> list[Tensor]:
        """The maps of one batch."""
        return self(batch[0]) if batch[0] else []

    def measure(self, stage: str, batch: Batch) -> None:
        """Compare the maps of one batch with its targets."""
        images, targets = batch
        for found, target in zip(self(images) if images else [], targets, strict=True):  # none, if all were left out
            self._counts(stage).update(found, target["map"])

    def _counts(self, stage: str) -> MulticlassConfusionMatrix:
        return cast(MulticlassConfusionMatrix, self.counts[f"{stage}_counts"])

    def conclude(self, stage: str) -> None:
        """Log the mean intersection over union, and in a test that of every class."""
        counts = self._counts(stage).compute()  # of all processes; (shown, found)
        both = counts.diag()
        shares = both / (counts.sum(0) + counts.sum(1) - both)  # NaN for a class neither shown nor found
        self.log(f"{stage}/mIoU", shares.nanmean(), prog_bar=True)
        for name, value in zip(self.classes, shares, strict=True) if stage == "test" else ():
            self.log(f"test/IoU/{name}", value)
        self._counts(stage).reset()


def _stack(parts: list[Tensor], fill: float) -> Tensor:
    """One batch of all, the smaller filled up at the right and bottom."""
    height, width = (max(part.shape[axis] for part in parts) for axis in (-2, -1))
    return torch.stack([F.pad(p, (0, width - p.shape[-1], 0, height - p.shape[-2]), value=fill) for p in parts])
