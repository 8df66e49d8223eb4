"""The comparison of a RedNet with the ResNet it mirrors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from involution.tasks.commands import Command
from involution.tasks.report import draw_curves, measure, table


def compare(args: Sequence[str], name: str) -> None:
    """Fit the RedNet of a recipe and its mirrored ResNet in exactly the same way; print what each costs and can do.

    Args:
        args: settings of `fit`, for both.
        name: of the recipe, for the folder of the run.

    Raises:
        ValueError, TypeError, OSError: with one sentence for the user.
    """
    rednet = _RedNet("fit", args, name)
    folder = Path(rednet.trainer.log_dir)
    resnet = Command("fit", [*args, "--model.mirror", "true", "--folder", str(folder / "mirror")], name)
    fits = {fit.model.name: fit for fit in (rednet, resnet)}
    accuracies = [_test_accuracy(fit) for fit in fits.values()]

    image = next(iter(rednet.datamodule.test_dataloader()))[0][:1]
    rows = measure({name: fit.model for name, fit in fits.items()}, accuracies, image.to(rednet.model.device))
    draw_curves({name: Path(fit.trainer.log_dir) / "metrics.csv" for name, fit in fits.items()}, folder / "curves.png")
    (folder / "table.md").write_text(table(rows) + "\n")
    print(f"\n{table(rows)}\n")
    for what, where in (
        ("checkpoint", rednet.trainer.checkpoint_callback.last_model_path),
        ("mirror's", resnet.trainer.checkpoint_callback.last_model_path),
        ("learning curves", folder / "curves.png"),
        ("configuration", folder / "config.yaml"),
    ):
        print(f"{what:<16} {where}")


class _RedNet(Command):
    """A fit that refuses a network without a mirror before it has trained it."""

    def before_instantiate_classes(self) -> None:
        """Lightning calls it before it builds anything."""
        arch = self.config["fit"]["model"]["arch"]
        if not arch.startswith("rednet"):
            raise ValueError(f"`compare` needs a RedNet as `model.arch`, such as rednet26; got {arch!r}.")


def _test_accuracy(fit: Command) -> float:
    # The weights the schedule ended with: choosing by 197 validation images, nearly all right, would be a lottery.
    (metrics,) = fit.trainer.test(fit.model, datamodule=fit.datamodule, verbose=False)
    return metrics["test/accuracy"]
