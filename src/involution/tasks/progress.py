"""How a run shows that it is alive."""

from __future__ import annotations

import math
import sys
from datetime import timedelta
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from involution.ops.library import implementations

_LINES = 10


class Progress(TQDMProgressBar):
    """Lightning's progress bar on a terminal; elsewhere, where a bar would fill a log, about ten lines a run."""

    def __init__(self) -> None:
        super().__init__()
        if not sys.stdout.isatty():
            self.disable()

    def enable(self) -> None:
        """Lightning enables the bar on the first process of many; keep to terminals."""
        if sys.stdout.isatty():
            super().enable()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is trained, and where."""
        device = trainer.strategy.root_device.type
        code = implementations().get(device, implementations()["any other"])
        if trainer.is_global_zero:
            steps = trainer.max_epochs is None or trainer.max_epochs < 0
            length = f"{trainer.max_steps} steps" if steps else f"{trainer.max_epochs} epochs"
            print(f"Training {pl_module.name} for {length} on {device} (involution: {code})", flush=True)
        self._begin, self._first = perf_counter(), trainer.global_step
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a line, if there is no bar."""
        super().on_train_epoch_end(trainer, pl_module)
        epoch, epochs = trainer.current_epoch + 1, max(trainer.max_epochs or 0, 1)
        if (
            trainer.is_global_zero
            and self.is_disabled
            and (epoch * _LINES // epochs > (epoch - 1) * _LINES // epochs or trainer.should_stop)
        ):
            shown = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
            metrics = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"  epoch {epoch} of {epochs}, {self._left(trainer)} left: {metrics}", flush=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows: the time left of the whole fit, and no version number of a logger that has none."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if trainer.training:
            metrics["left"] = self._left(trainer)
        return metrics

    def _left(self, trainer: Trainer) -> str:
        """Hours, minutes and seconds until the last step, at the pace so far."""
        done, total = trainer.global_step - self._first, trainer.estimated_stepping_batches
        if not done or math.isinf(total):
            return "?"
        seconds = round((perf_counter() - self._begin) / done * max(0, total - trainer.global_step))
        return str(timedelta(seconds=seconds))


class Pace(Callback):
    """Logs how fast a fit goes, over the epoch so far.

    `images/s` of all processes together, and `waiting`, the share of the time in which the next batch was not there
    yet: where it is more than a few hundredths, more or faster workers make the fit faster.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._images, self._before, self._begin = 0, self._waited(trainer), perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, also in the middle of an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        self._images += len(batch[0]) * trainer.world_size
        length = perf_counter() - self._begin
        pl_module.log("images/s", self._images / length, prog_bar=True)
        pl_module.log("waiting", (self._waited(trainer) - self._before) / length)

    @staticmethod
    def _waited(trainer: Trainer) -> float:
        return float(getattr(trainer.train_dataloader, "waited", 0.0))
