"""What all tasks share: the optimizer, the schedule of the learning rate, and checkpoints that fit or are refused."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.distributed.fsdp.wrap import wrap
from torch.optim.lr_scheduler import LambdaLR

from involution.data.order import DataError, Resumable, seed_all
from involution.names import unknown
from involution.weights import mismatch

Schedule = Literal["cosine", "cosine_by_epoch", "step", "poly"]

_SCHEDULES = ("cosine", "cosine_by_epoch", "step", "poly")
_MOST = 1e6  # of a loss; those here begin below a hundred
_WRAPPER = "_fsdp_wrapped_module."  # in names of weights that are shared out
_STEP, _POWER = 0.1, 0.9  # of the step and poly schedules


class DivergedError(ValueError):
    """Training that has left all bounds: one sentence with the step, the learning rate, and what to do."""


class Task(LightningModule):
    """A network and how it is trained.

    Args:
        optimizer: name of the optimizer in timm, such as sgd (with Nesterov's momentum 0.9), momentum (without
            Nesterov) or adamw.
        optimizer_options: further arguments of the optimizer, such as betas of adamw; or filter_bias_and_bn, whose
            false decays biases and norms too.
        lr: largest learning rate, reached after the warm-up.
        lr_batch: images in a step, on all devices, that `lr` is for; with others the rate is changed in proportion.
            Default: `lr` is right as it is.
        weight_decay: weight decay of all parameters but biases and norms.
        warmup: share of all steps in which the learning rate grows linearly; from 1 on, the number of these steps.
        warmup_from: share of `lr` at which the warm-up begins.
        schedule: of the learning rate after the warm-up: "cosine" to `floor`; "cosine_by_epoch", a cosine over the
            whole run that changes with every epoch and that the warm-up scales, as in mmcv; "step", a tenth at each of
            the milestones; or "poly", (1 - share of steps done) ** 0.9.
        milestones: of "step", as shares of all steps.
        floor: share of `lr` below which "cosine" and "poly" do not go.
        channels_last: keep images and features with channels innermost in memory, the faster layout of involution.
        compile: train the network compiled by torch; for images of one size.
        recompute: keep only what is between the network's blocks, and compute the rest again in the backward pass. It
            takes a third more time, and norms count the statistics of every batch twice.

    Raises:
        ValueError: if a setting is out of range.
    """

    net: Any
    measures: tuple[str, ...]  # what a test logs under `test/`, that which says most first

    def __init__(
        self,
        optimizer: str = "adamw",
        optimizer_options: dict[str, Any] | None = None,
        lr: float = 1e-3,
        lr_batch: int | None = None,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        warmup_from: float = 0.0,
        schedule: Schedule = "cosine",
        milestones: Sequence[float] = (8 / 12, 11 / 12),
        floor: float = 0.0,
        channels_last: bool = True,
        compile: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if warmup < 0:
            raise ValueError(f"`warmup` must be at least 0; got {warmup}.")
        for name, share in (("warmup_from", warmup_from), ("floor", floor)):
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` must be a share of `lr`, from 0 to 1; got {share}.")
        if lr_batch is not None and lr_batch < 1:
            raise ValueError(f"`lr_batch` must be at least 1; got {lr_batch}.")
        if optimizer.lower().removeprefix("lookahead_") not in (known := list_optimizers()):
            raise ValueError(f"`optimizer`: {unknown('optimizer', optimizer, known)}")
        if schedule not in _SCHEDULES:
            raise ValueError(unknown("schedule", schedule, _SCHEDULES))
        self._loader_states: list[dict[str, int]] = []  # of the checkpoint to go on from
        self._given: list[dict[str, Any]] = []  # of the optimizer, for each group of weights
        self.save_hyperparameters(logger=False)  # the run's config.yaml has them

    @property
    def name(self) -> str:
        """The network's name, for people."""
        arch = str(self.hparams["arch"])
        return arch.replace("rednet", "resnet") + " (mirror)" if self.hparams["mirror"] else arch

    def keep(self, net: nn.Module) -> None:
        """Make `net` the network of this task, in the layout and with the memory it is trained in."""
        if self.hparams["recompute"]:
            able: list[Any] = [each for each in net.modules() if hasattr(each, "set_grad_checkpointing")]
            if not able:
                raise ValueError(f"`recompute` must be false for {self.name}, which does not offer it.")
            for each in able:
                each.set_grad_checkpointing(True)
        self.net = net.to(memory_format=torch.channels_last) if self.hparams["channels_last"] else net
        # Told now, as weights that are shared out over devices lose their shapes.
        self._plain = {name for name, weight in net.named_parameters() if weight.ndim <= 1 or name.endswith(".bias")}

    def configure_model(self) -> None:
        """Share the network out part by part, under a strategy that shares weights out; else nothing happens."""
        for name, part in self.net.named_children():
            if next(part.parameters(), None) is not None:
                setattr(self.net, name, wrap(part))

    def on_fit_start(self) -> None:
        """Compile the network, in place, so that its weights keep their names."""
        if self.hparams["compile"]:
            self.net.compile()

    def on_train_start(self) -> None:
        """Put the loader where the checkpoint was taken, and let the settings of this run go before those in it.

        Lightning would see to the loader, had our schedule, which needs the number of steps, not built it before.
        """
        scheduler: Any = self.lr_schedulers()
        groups = scheduler.optimizer.param_groups
        for group, given in zip(groups, self._given, strict=True):
            group.update(given)
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, share in zip(groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * share(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in groups]
        loader: Any = self.trainer.train_dataloader
        if self._loader_states and isinstance(loader, Resumable):
            # those that Lightning will not do again: the loader has also handed out one that was not trained on yet
            done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
            loader.load_state_dict({**self._loader_states[0], "batches": done})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log the learning rate, and seed what the step draws, so that a step is the same whenever it is taken."""
        numbers = (int(os.environ.get("PL_GLOBAL_SEED", 0)), self.global_rank, self.trainer.current_epoch, batch_idx)
        seed_all(np.random.SeedSequence(numbers).generate_state(1).item())
        self.log("lr", self.lr_schedulers().get_last_lr()[0])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop when the loss has left all bounds; on a GPU, which would have to wait for it, look now and then."""
        loss, trainer = outputs["loss"], self.trainer
        looks = loss.device.type == "cpu" or trainer.global_step % trainer.log_every_n_steps == 0
        if looks and not loss.abs() < _MOST:  # nor is it where it is no number
            rate = self.lr_schedulers().get_last_lr()[0]
            raise DivergedError(
                f"the loss is {float(loss)} at step {trainer.global_step}, in epoch {trainer.current_epoch + 1}, at "
                f"the learning rate {rate:g}. As the authors advise, clip gradients "
                "(`--trainer.gradient_clip_val 5`) or lower `--model.lr`."
            )

    def measure(self, stage: str, batch: Any) -> None:
        """Compare what the network finds in a batch with its targets; `stage` is "validation" or "test"."""
        raise NotImplementedError

    def conclude(self, stage: str) -> None:
        """Log what was measured in a stage, unless each batch did so."""

    def validation_step(self, batch: Any, index: int) -> None:
        """Measure one batch."""
        self.measure("validation", batch)

    def test_step(self, batch: Any, index: int) -> None:
        """Measure one batch."""
        self.measure("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the measures."""
        self.conclude("validation")

    def on_test_epoch_end(self) -> None:
        """Log the measures."""
        self.conclude("test")

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer, and its schedule over all steps of the run."""
        settings = self.hparams
        options = dict(settings["optimizer_options"] or {})
        plain = self._plain if options.pop("filter_bias_and_bn", True) else set()
        optimizer = create_optimizer_v2(
            self._groups(plain, settings["weight_decay"]),
            opt=settings["optimizer"],
            lr=settings["lr"] * self._scaling(),
            weight_decay=settings["weight_decay"],
            **options,
        )
        names = ("schedule", "warmup", "warmup_from", "milestones", "floor")
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise DataError(
                "`trainer.max_epochs` or `trainer.max_steps` must end the fit, as the learning rate follows it."
            )
        epochs = self.trainer.max_epochs or 0
        if epochs < 1:  # only steps are given
            self.trainer.fit_loop.setup_data()  # else it does not know how many batches there are
            an_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
            epochs = math.ceil(steps / an_epoch)
        share = learning_rate(int(steps), **{name: settings[name] for name in names}, epochs=epochs)
        scheduler = LambdaLR(optimizer, share)
        set_here = ("initial_lr", "weight_decay", *options)
        self._given = [{name: group[name] for name in set_here if name in group} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _groups(self, plain: Collection[str], weight_decay: float) -> list[dict[str, Any]]:
        """The weights that are trained: those without decay, and those with."""
        groups: tuple[list[Any], list[Any]] = ([], [])
        for name, weight in self.net.named_parameters():
            if weight.requires_grad:
                groups[name.replace(_WRAPPER, "") not in plain].append(weight)
        decays = (0.0, weight_decay)
        return [{"params": group, "weight_decay": d} for group, d in zip(groups, decays, strict=True) if group]

    def _scaling(self) -> float:
        """What the learning rate is multiplied with for the number of images in a step."""
        wanted = self.hparams["lr_batch"]
        if wanted is None:
            return 1.0
        trainer: Any = self.trainer
        return trainer.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches / wanted

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another network, before torch does in many lines; remember where its data was."""
        states = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        self._loader_states = states.get("combined_loader", [])
        if "state_dict" not in checkpoint:  # a strategy that shares weights out has taken them, when they were checked
            return
        problem = mismatch(self.state_dict(), checkpoint["state_dict"])
        if problem:
            raise ValueError(
                f"the checkpoint belongs to another network than {self.name} with options {self.hparams['options']}: "
                f"{problem}. Give the `config.yaml` of the run it came from."
            )


def learning_rate(
    steps: int,
    schedule: Schedule,
    warmup: float,
    warmup_from: float,
    milestones: Sequence[float],
    floor: float,
    epochs: int = 1,
) -> Callable[[int], float]:
    """The share of the largest learning rate at each of `steps` steps in `epochs`; see `Task` for the settings.

    Example:
        >>> share = learning_rate(10, "step", warmup=2, warmup_from=0.0, milestones=(0.5, 0.8), floor=0.0)
        >>> [round(share(step), 3) for step in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01, 0.01]
    """
    first = int(warmup if warmup >= 1 else warmup * steps)

    def share(step: int) -> float:
        if schedule == "cosine_by_epoch":
            epoch = step * epochs // steps
            grown = min(1.0, warmup_from + (1 - warmup_from) * step / first) if first else 1.0
            return grown * (floor + (1 - floor) * (0.5 + 0.5 * math.cos(math.pi * epoch / epochs)))
        if step < first:
            return warmup_from + (1 - warmup_from) * (step + 1) / first
        if schedule == "step":
            return _STEP ** bisect_right(milestones, step / steps)
        if schedule == "poly":
            return floor + (1 - floor) * (1 - min(step, steps) / steps) ** _POWER
        return floor + (1 - floor) * (0.5 + 0.5 * math.cos(math.pi * (step - first) / max(1, steps - first)))

    return share
