"""Detection and instance segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from involution.data.items import Batch
from involution.models import detection
from involution.models.stages import Layer, Stages, build
from involution.tasks.task import Task

_STAGES = ("validation", "test")
_MASK = 0.5  # of a pixel's probability
# What COCO reports, by torchmetrics' names.
_PRECISIONS = {"map": "AP", "map_50": "AP50", "map_75": "AP75", "map_small": "AP_S", "map_medium": "AP_M"}
_PRECISIONS |= {"map_large": "AP_L"}


class Detection(Task):
    """A detector of torchvision or transformers on a network of timm.

    Logs `train/loss` and each of its parts every epoch, `lr` every step, and COCO's average precisions of boxes,
    `validation/AP`, `/AP50`, `/AP75`, and for small, medium and large objects `/AP_S`, `/AP_M`, `/AP_L` where there
    are any; those of masks begin with `/mask_`.

    Args:
        detector: "retinanet", "faster_rcnn", "mask_rcnn" or "detr".
        detector_options: its further arguments, such as anchor_scale, channels and min_size; see
            `involution.models.detection.detector` and `involution.models.detr.Detr`.
        classes: names of the classes, the background not among them.
        neck: of the feature pyramid's outputs, "convolution" or "involution".
        head: of the proposal network's and the mask head's 3x3 layers, "convolution" or "involution".
        arch: name of the backbone in timm, such as rednet50 or resnet50.
        options: its further arguments, such as stem_kernel, or checkpoint_path, for weights `involution convert` wrote.
        mirror: take in place of the RedNet the ResNet of the same depths and widths.
        frozen_stages: stages of the backbone that are not trained; the stem goes with the first.
        norm_eval: batch norms of the backbone keep their statistics.
        training: how it is trained; see `Task`.

    A batch is a list of images, (3, H, W) from 0 to 1, of any sizes, and a list of their targets: boxes (N, 4) in
    pixels, labels (N,) from 1, and for a Mask R-CNN masks (N, H, W). Predicting gives the same, with scores.

    Raises:
        ValueError: if a setting is out of range or unknown.
    """

    measures = ("AP", "AP50", "AP75", "mask_AP", "mask_AP50")

    def __init__(
        self,
        detector: Literal["retinanet", "faster_rcnn", "mask_rcnn", "detr"] = "faster_rcnn",
        detector_options: dict[str, Any] | None = None,
        classes: Sequence[str] = (),
        neck: Layer = "convolution",
        head: Layer = "convolution",
        arch: str = "rednet50",
        options: dict[str, Any] | None = None,
        mirror: bool = False,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        if not classes:
            raise ValueError("`classes` must name at least one; got none.")
        self.classes = tuple(classes)
        stages = Stages(build(arch, options, mirror), frozen_stages, norm_eval)
        self.keep(_build(detector, stages, len(classes), neck, head, detector_options or {}))
        kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm") if detector == "mask_rcnn" else ("bbox",)
        self.precisions = nn.ModuleDict(
            {f"{stage}_precision": MeanAveragePrecision(iou_type=kinds) for stage in _STAGES}
        )

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detections; in training mode torchvision's detectors want targets, so call `eval` first."""
        found: list[dict[str, Tensor]] = self.net(images)
        return [{**each, "masks": each["masks"][:, 0] > _MASK} if "masks" in each else each for each in found]

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The loss of one batch."""
        images, targets = batch
        losses = self.net(images, targets)
        total: Tensor = sum(losses.values())
        how = {"on_step": False, "on_epoch": True, "batch_size": len(images)}
        self.log("train/loss", total, prog_bar=True, **how)
        if len(losses) > 1:
            self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, **how)
        return total

    def predict_step(self, batch: Batch, index: int) -> list[dict[str, Tensor]]:
        """The detections of one batch."""
        return self(batch[0]) if batch[0] else []

    def measure(self, stage: str, batch: Batch) -> None:
        """Compare the detections of one batch with its targets."""
        images, targets = batch
        if images:  # none, if all were bad and left out
            self._precision(stage).update(self(images), targets)

    def _precision(self, stage: str) -> MeanAveragePrecision:
        return cast(MeanAveragePrecision, self.precisions[f"{stage}_precision"])

    def conclude(self, stage: str) -> None:
        """Log the average precisions."""
        precision = self._precision(stage)
        for name, value in precision.compute().items():
            plain = name.removeprefix("bbox_").removeprefix("segm_")
            if plain in _PRECISIONS and value >= 0:  # -1: there is no such object
                label = ("mask_" if name.startswith("segm_") else "") + _PRECISIONS[plain]
                self.log(f"{stage}/{label}", value, prog_bar=plain == "map_50", sync_dist=True)
        precision.reset()


def _build(
    name: Literal["retinanet", "faster_rcnn", "mask_rcnn", "detr"],
    stages: Stages,
    num_classes: int,
    neck: Layer,
    head: Layer,
    options: dict[str, Any],
) -> nn.Module:
    if name != "detr":
        return detection.detector(name, stages, num_classes, neck, head, **options)
    from involution.models.detr import Detr

    for part, layer in (("neck", neck), ("head", head)):
        if layer != "convolution":
            raise ValueError(f"`{part}` must be 'convolution' for detr, which has none of involutions; got {layer!r}.")
    return Detr(stages, num_classes, **options)
