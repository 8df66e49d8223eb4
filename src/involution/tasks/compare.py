"""The comparison of a RedNet with the ResNet it mirrors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from involution.tasks.commands import Command
from involution.tasks.report import draw_curves, measure, table, write
from involution.tasks.saves import LAST


class Comparison:
    """A fit of the RedNet of a recipe and, in exactly the same way, of its mirrored ResNet.

    Args:
        args: settings of `fit`, for both.
        name: of the recipe, for the folder of the run.

    Raises:
        ValueError, TypeError, OSError: with one sentence for the user.
    """

    def __init__(self, args: Sequence[str], name: str) -> None:
        self._args, self._name = args, name
        self._rednet = _RedNet("fit", args, name)

    def run(self) -> None:
        """Fit both; print what each costs and can do."""
        rednet = self._rednet
        folder = Path(rednet.trainer.log_dir)
        minutes = [_timed(rednet)]
        # built only now, for building seeds what the fit draws
        resnet = Command("fit", [*self._args, "--model.mirror", "true", "--folder", str(folder / "mirror")], self._name)
        minutes.append(_timed(resnet))
        fits = {fit.model.name: fit for fit in (rednet, resnet)}
        measures = [_tested(fit) for fit in fits.values()]

        batch = next(iter(rednet.datamodule.test_dataloader()))
        batch = rednet.trainer.strategy.batch_to_device(batch, rednet.model.device)
        rows = measure({name: fit.model for name, fit in fits.items()}, measures, batch[0])
        logs = {name: Path(fit.trainer.log_dir) / "metrics.csv" for name, fit in fits.items()}
        draw_curves(logs, rednet.model.measures[0], folder / "curves.png")
        text = table(rows, minutes)
        (folder / "table.md").write_text(text + "\n")
        write(rows, self._name, minutes, rednet.model.device.type, folder / "results.csv")
        print(f"\n{text}\n")
        for what, where in (
            ("checkpoint", folder / "checkpoints" / LAST),
            ("mirror's", folder / "mirror" / "checkpoints" / LAST),
            ("learning curves", folder / "curves.png"),
            ("results", folder / "results.csv"),
            ("configuration", folder / "config.yaml"),
        ):
            print(f"{what:<16} {where}")


class _RedNet(Command):
    """A fit that refuses, before it has trained, what cannot be compared."""

    def before_instantiate_classes(self) -> None:
        """Lightning calls it before it builds anything."""
        settings = self.config["fit"]
        arch = settings["model"]["arch"]
        if not arch.startswith("rednet"):
            raise ValueError(f"`compare` needs a RedNet as `model.arch`, such as rednet26; got {arch!r}.")
        if settings["ckpt_path"] is not None:
            raise ValueError("`compare` fits both networks from the start; leave out `ckpt_path`.")
        if settings["trainer"]["logger"] is not None:
            raise ValueError("`compare` draws its curves from a log of its own; leave out `trainer.logger`.")
        if settings["trainer"]["fast_dev_run"]:
            raise ValueError("`compare` needs the log that `trainer.fast_dev_run` does not write; leave it out.")


def _timed(fit: Command) -> float:
    start = perf_counter()
    fit.start()
    return (perf_counter() - start) / 60


def _tested(fit: Command) -> dict[str, float]:
    # The weights the schedule ended with: choosing by few validation images, nearly all right, would be a lottery.
    (metrics,) = fit.trainer.test(fit.model, datamodule=fit.datamodule, verbose=False)
    found = {name: metrics.get(f"test/{name}") for name in fit.model.measures}
    return {name: value for name, value in found.items() if value is not None}
