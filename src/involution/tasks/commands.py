"""The training commands: Lightning's command line over our task and data, and the comparison with the mirror."""

from __future__ import annotations

import logging
import re
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from involution.data import Digits
from involution.tasks.classification import Classification
from involution.tasks.names import unknown
from involution.tasks.progress import Progress
from involution.tasks.report import draw_curves, measure, table


class _Command(LightningCLI):
    """One of Lightning's commands, run on construction; a fit keeps its files in a folder of its own."""

    def __init__(self, command: str, args: Sequence[str], name: str) -> None:
        self._command, self._name = command, name
        super().__init__(
            Classification,
            Digits,
            args=[command, *args],
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfigCallback if command == "fit" else None,
            parser_kwargs={"prog": "involution", "exit_on_error": False, command: {"exit_on_error": False}},
        )

    def subcommands(self) -> dict[str, set[str]]:
        """Only the one that runs: building the parsers of all takes seconds."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our one setting beside Lightning's."""
        parser.add_argument(
            "--folder",
            default=f"runs/{self._name}",
            help="Where a fit keeps its files; where it is taken, the first of FOLDER-2, FOLDER-3, ... that is free.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in one sentence what is wrong."""
        with warnings.catch_warnings():
            # Lightning warns of our `args` beside those of the console script, of which they are the checked form.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            try:
                super().parse_arguments(parser, args)
            except ArgumentError as error:
                raise ValueError(self._explain(str(error))) from None

    def _explain(self, message: str) -> str:
        found = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
        if found is None:
            return message
        known = self._subcommand_parsers[self._command].get_defaults().keys()
        return unknown("setting", found[1] or found[2], known) + f" (`involution {self._command} --help` lists all)"

    def _parse_ckpt_path(self) -> None:
        """Leave the settings as they are: what the user writes counts, and Lightning would let the checkpoint win."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with our progress display and the folder of the run."""
        settings = self._get(self.config_init, "trainer")
        if settings.enable_progress_bar is not False:
            settings.callbacks = [*(settings.callbacks or []), Progress()]
        if settings.logger is None and self._command == "fit":
            folder = _free(Path(self._get(self.config, "folder")))
            kwargs |= {"logger": CSVLogger(folder, name="", version=""), "default_root_dir": folder}
        elif settings.logger is None:
            kwargs |= {"logger": False}
        return super().instantiate_trainer(**kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Write the class of every image, a line each."""
        for classes in self.trainer.predict(**kwargs):
            print(*classes.tolist(), sep="\n")


def run(command: str, args: Sequence[str], name: str) -> None:
    """Run fit, validate, test or predict.

    Args:
        command: which.
        args: the rest of the command line.
        name: of the recipe, for the folder of the run.

    Raises:
        ValueError, TypeError, OSError: with one sentence for the user.
    """
    _calm()
    done = _Command(command, args, name)
    if command == "fit":
        folder = done.trainer.log_dir
        print(f"\ncheckpoints    {folder}/checkpoints\nmetrics        {folder}/metrics.csv")
        print(f"configuration  {folder}/config.yaml")


def compare(args: Sequence[str], name: str) -> None:
    """Fit the RedNet of a recipe and its mirrored ResNet in exactly the same way; print what each costs and can do.

    Args:
        args: settings of `fit`, for both.
        name: of the recipe, for the folder of the run.

    Raises:
        ValueError, TypeError, OSError: with one sentence for the user.
    """
    _calm()
    rednet = _Command("fit", args, name)
    folder = Path(rednet.trainer.log_dir)
    resnet = _Command("fit", [*args, "--model.mirror", "true", "--folder", str(folder / "mirror")], name)
    fits = {fit.model.name: fit for fit in (rednet, resnet)}
    accuracies = [_test_accuracy(fit) for fit in fits.values()]

    image = next(iter(rednet.datamodule.test_dataloader()))[0][:1]
    rows = measure({name: fit.model for name, fit in fits.items()}, accuracies, image.to(rednet.model.device))
    draw_curves({name: Path(fit.trainer.log_dir) / "metrics.csv" for name, fit in fits.items()}, folder / "curves.png")
    (folder / "table.md").write_text(table(rows) + "\n")
    print(f"\n{table(rows)}\n")
    for what, where in (
        ("checkpoint", rednet.trainer.checkpoint_callback.best_model_path),
        ("mirror's", resnet.trainer.checkpoint_callback.best_model_path),
        ("learning curves", folder / "curves.png"),
        ("configuration", folder / "config.yaml"),
    ):
        print(f"{what:<16} {where}")


def _test_accuracy(fit: _Command) -> float:
    (metrics,) = fit.trainer.test(fit.model, datamodule=fit.datamodule, ckpt_path="best", verbose=False)
    return metrics["test/accuracy"]


def _free(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that is missing or empty."""
    candidate, number = folder, 1
    while candidate.exists() and any(candidate.iterdir()):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _calm() -> None:
    """Keep Lightning to what matters here: its advertisements and state of the machine go, its warnings stay."""
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "lightning.fabric.utilities.seed",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The data is a few tensors in memory, so more worker processes would only cost.
    warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")
    # Lightning's own use of torch, which nobody who reads it here could change.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
