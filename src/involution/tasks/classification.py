"""Image classification, by any network timm can build."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from involution.models.stages import build
from involution.tasks.task import Task

_STAGES = ("train", "validation", "test")


class Classification(Task):
    """A timm network trained by cross entropy.

    Logs `train/loss`, `train/accuracy`, `validation/loss`, `validation/accuracy` every epoch, `lr` every step, and
    `test/loss`, `test/accuracy` in a test.

    Args:
        arch: name of the network in timm, such as rednet26, rednet50 or resnet50.
        options: further arguments of the network, such as num_classes and in_chans; for a RedNet also base_width,
            stem_width, stem_kernel, kernel_size, group_channels and reduction.
        mirror: train in place of the RedNet the ResNet of the same depths and widths, which has convolutions where
            the RedNet has involutions.
        label_smoothing: share of the target spread evenly over all classes, from 0 to 1.
        mixup: alpha of the mixing of images with one another; 0: none. With it batches are even.
        cutmix: alpha of the pasting of images into one another; 0: none. Steps choose by chance, where both are asked.
        training: how it is trained; see `Task`.

    Shapes: forward maps images (B, in_chans, H, W) to logits (B, num_classes); predicting gives
        probabilities of the same shape.

    Raises:
        ValueError: if a setting is out of range, or the network or one of its options is unknown.
    """

    measures = ("accuracy",)

    def __init__(
        self,
        arch: str = "rednet50",
        options: dict[str, Any] | None = None,
        mirror: bool = False,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if alpha < 0:
                raise ValueError(f"`{name}` must be at least 0; got {alpha}.")
        self.keep(build(arch, options, mirror))
        self.in_chans = (options or {}).get("in_chans", 3)  # timm's default for every network
        self.num_classes = classes = self.net.num_classes
        self._mix = None
        if mixup or cutmix:
            self._mix = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=classes)
        self.accuracies = nn.ModuleDict(
            {f"{stage}_accuracy": MulticlassAccuracy(classes, average="micro") for stage in _STAGES}
        )
        # as a metric, which counts every image once, however many processes share them
        self.losses = nn.ModuleDict({f"{stage}_loss": MeanMetric(nan_strategy="ignore") for stage in _STAGES})

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, num_classes)."""
        if self.hparams["channels_last"]:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of one batch."""
        return self._step("train", batch)

    def measure(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        """Loss and accuracy of one batch, logged."""
        if len(batch[1]):  # none, if all were bad and left out
            self._step(stage, batch)

    def predict_step(self, batch: tuple[Tensor, Any], index: int) -> Tensor:
        """How likely each image is of each class, (B, num_classes)."""
        return self(batch[0]).float().softmax(dim=1)

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, classes = batch
        target, smoothing = classes, self.hparams["label_smoothing"] if stage == "train" else 0.0
        if self._mix is not None and stage == "train":
            if len(classes) % 2:
                raise ValueError(f"`mixup` and `cutmix` need an even `data.batch_size`; got {len(classes)}.")
            images, target = self._mix(images.clone(), classes)  # it mixes in place, and smooths too
            smoothing = 0.0
        logits = self(images)
        loss = F.cross_entropy(logits, target, label_smoothing=smoothing)
        accuracy = self.accuracies[f"{stage}_accuracy"]
        accuracy(logits, classes)
        mean = self.losses[f"{stage}_loss"]
        mean(loss.detach(), weight=len(classes))
        how = {"on_step": False, "on_epoch": True, "batch_size": len(classes)}
        self.log(f"{stage}/loss", mean, prog_bar=stage == "train", **how)  # the progress bar has room for two
        self.log(f"{stage}/accuracy", accuracy, prog_bar=stage != "train", **how)
        return loss
