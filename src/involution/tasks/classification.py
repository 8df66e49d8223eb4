"""Image classification as a LightningModule, for any network timm can build."""

from __future__ import annotations

import inspect
import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from involution.models import RedNet, mirrored_resnet
from involution.names import unknown
from involution.weights import mismatch

# What a RedNet understands and its mirror, which has no involutions, does not.
_INVOLUTION_OPTIONS = {"stem", "stem_kernel", "kernel_size", "groups", "group_channels", "reduction"}
_PRETRAINED = {"pretrained", "pretrained_cfg_overlay", "checkpoint_path"}
_REDNET_OPTIONS = inspect.signature(RedNet).parameters.keys() - {"layers"} | _PRETRAINED


class Classification(LightningModule):
    """A timm network and how it is trained: cross entropy, warm-up and cosine decay of the learning rate step by step.

    Logs `train/loss`, `train/accuracy`, `validation/loss`, `validation/accuracy` every epoch, `lr` every step, and
    `test/loss`, `test/accuracy` in a test.

    Args:
        arch: name of the network in timm, such as rednet26, rednet50 or resnet50.
        options: further arguments of the network, such as num_classes and in_chans; for a RedNet also base_width,
            stem_width, stem_kernel, kernel_size, group_channels and reduction.
        mirror: train in place of the RedNet the ResNet of the same depths and widths, which has convolutions where
            the RedNet has involutions.
        optimizer: name of the optimizer in timm, such as sgd (with Nesterov's momentum 0.9) or adamw.
        optimizer_options: further arguments of the optimizer, such as betas of adamw.
        lr: largest learning rate, reached after the warm-up.
        weight_decay: weight decay of all parameters but biases and norms.
        warmup: share of all steps in which the learning rate grows linearly, from 0 to below 1.
        label_smoothing: share of the target spread evenly over all classes, from 0 to 1.
        channels_last: keep images and features with channels innermost in memory, the faster layout of involution.

    Shapes: forward maps images (B, in_chans, H, W) to logits (B, num_classes); predicting gives classes, (B,).

    Raises:
        ValueError: if a setting is out of range, or the network or one of its options is unknown.
    """

    def __init__(
        self,
        arch: str = "rednet50",
        options: dict[str, Any] | None = None,
        mirror: bool = False,
        optimizer: str = "adamw",
        optimizer_options: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        label_smoothing: float = 0.1,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise ValueError(f"`warmup` must be a share of all steps, from 0 to below 1; got {warmup}.")
        self.save_hyperparameters(logger=False)  # the run's config.yaml has them
        self.net: Any = _build(arch, options or {}, mirror)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.in_chans = (options or {}).get("in_chans", 3)  # timm's default for every network
        self.num_classes = classes = self.net.num_classes
        self.accuracies = nn.ModuleDict(
            {f"{stage}_accuracy": MulticlassAccuracy(classes, average="micro") for stage in _STAGES}
        )

    @property
    def name(self) -> str:
        """The network's name, for people."""
        arch = str(self.hparams["arch"])
        return arch.replace("rednet", "resnet") + " (mirror)" if self.hparams["mirror"] else arch

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, num_classes)."""
        if self.hparams["channels_last"]:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of one batch."""
        self.log("lr", self.lr_schedulers().get_last_lr()[0])
        return self._step("train", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Loss and accuracy of one batch, logged."""
        self._step("validation", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Loss and accuracy of one batch, logged."""
        self._step("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The likeliest class of each image, (B,)."""
        return self(batch[0]).argmax(dim=1)

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, classes = batch
        logits = self(images)
        smoothing = self.hparams["label_smoothing"] if stage == "train" else 0.0
        loss = F.cross_entropy(logits, classes, label_smoothing=smoothing)
        accuracy = self.accuracies[f"{stage}_accuracy"]
        accuracy(logits, classes)
        how = {"on_step": False, "on_epoch": True, "batch_size": len(classes)}
        self.log(f"{stage}/loss", loss, prog_bar=stage == "train", **how)  # the progress bar has room for two
        self.log(f"{stage}/accuracy", accuracy, prog_bar=stage != "train", **how)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer, and its schedule over all steps of the run."""
        optimizer = create_optimizer_v2(
            self.net,
            opt=self.hparams["optimizer"],
            lr=self.hparams["lr"],
            weight_decay=self.hparams["weight_decay"],
            **(self.hparams["optimizer_options"] or {}),
        )
        steps = self.trainer.estimated_stepping_batches
        warmup = int(self.hparams["warmup"] * steps)

        def share(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, share), "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another network, before torch does in many lines."""
        problem = mismatch(self.state_dict(), checkpoint["state_dict"])
        if problem:
            raise ValueError(
                f"the checkpoint belongs to another network than {self.name} with options {self.hparams['options']}: "
                f"{problem}. Give the `config.yaml` of the run it came from."
            )


_STAGES = ("train", "validation", "test")


def _build(arch: str, options: dict[str, Any], mirror: bool) -> Any:
    if not timm.is_model(arch):
        raise ValueError(unknown("network", arch, timm.list_models()))
    for name in options if arch.startswith("rednet") else ():
        if name not in _REDNET_OPTIONS:
            raise ValueError(unknown(f"option of {arch}", name, _REDNET_OPTIONS))
    if not mirror:
        return timm.create_model(arch, **options)
    if not arch.startswith("rednet"):
        raise ValueError(f"only a RedNet has a `mirror`; got `arch` {arch!r}.")
    shared = {key: value for key, value in options.items() if key not in _INVOLUTION_OPTIONS}
    return mirrored_resnet(int(arch.removeprefix("rednet")), **shared)
