"""What lets a fit be interrupted: whole checkpoints, now and then, and a log that goes on."""

from __future__ import annotations

import csv
import math
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.exceptions import SIGTERMException

LAST = "last.ckpt"
_PART = ".part"


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and moves it there when it is complete and on the disk.

    Lightning's own way writes to the system's temporary folder; from another disk the move is a copy, and what cuts it
    short leaves half a checkpoint in place of the last good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: if there is no room, or the folder cannot be written; whatever was at `path` is still there.
        """
        place = Path(path)
        part = place.with_name(place.name + _PART)
        buffer = BytesIO()
        torch.save(checkpoint, buffer)  # torch's own writing to a full disk ends in an error that does not say so
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            part.replace(place)
        except OSError as error:
            part.unlink(missing_ok=True)  # half a checkpoint takes the room that others need
            raise OSError(error.errno, error.strerror, str(place)) from error


class Saves(ModelCheckpoint):
    """Checkpoints to go on from: every few steps, the newest kept; when the process is told to end; and every epoch.

    Args:
        folder: where they are written.
        steps: optimizer steps between two checkpoints.
        keep: how many there are at most.
    """

    def __init__(self, folder: Path, steps: int, keep: int) -> None:
        super().__init__(
            filename="step-{step}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            every_n_train_steps=steps,
            save_top_k=keep,
            save_on_train_epoch_end=False,
            save_on_exception=True,
            enable_version_counter=False,
        )
        self.dirpath = str(folder)  # as the user wrote it, where Lightning would make it absolute

    @property
    def state_key(self) -> str:
        """Under which its state is kept: the same for all settings, so that these may change where a fit goes on."""
        return type(self).__name__

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save every few steps, but not at the end of an epoch: one that goes on from there would not be measured."""
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write last.ckpt, the end of the last epoch; Lightning's own is that of the last improvement."""
        trainer.save_checkpoint(Path(self.dirpath or "") / LAST, weights_only=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when the process is told to end, which Lightning heeds between two batches; not amid an error.

        Nor amid a step of several batches, whose gradients a checkpoint does not hold.
        """
        if isinstance(exception, SIGTERMException) and not trainer.fit_loop.epoch_loop._should_accumulate():
            super().on_exception(trainer, pl_module, exception)


class Log(CSVLogger):
    """Lightning's metrics.csv, going on where the run it belongs to was interrupted.

    Args:
        folder: of the run.
        steps: optimizer steps that have been taken; what an interrupted run logged later is logged again.
    """

    def __init__(self, folder: Path, steps: int = 0) -> None:
        super().__init__(folder, name="", version="")
        self._steps = steps

    @property
    @rank_zero_experiment  # type: ignore[untyped-decorator]
    def experiment(self) -> Any:
        """Lightning's writer of the file."""
        if self._experiment is None:
            path = Path(self.log_dir) / "metrics.csv"
            rows = []
            if path.exists():
                with path.open(newline="") as file:
                    rows = [row for row in csv.DictReader(file) if _step(row) < self._steps]
            writer = super().experiment  # which removes the file
            writer.metrics = [{name: value for name, value in row.items() if value} for row in rows]
            writer.save()
        return self._experiment


def _step(row: dict[str, str | None]) -> float:
    """The step of a logged row; that of a row that was cut off is never reached."""
    return int(step) if (step := row["step"] or "").isdigit() and None not in row.values() else math.inf


def newest(folder: Path) -> Path | None:
    """The checkpoint that was written last in `folder`, if there is one."""
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1] if found else None
