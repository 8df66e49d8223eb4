"""One run of a study: a training and its test, in whatever process it is called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from involution.analysis.memory import rise_mib
from involution.analysis.record import here
from involution.recipes import recipe
from involution.studies.study import Run, Study
from involution.tasks.commands import Command
from involution.tasks.report import Row, measure


def train(study: Study, run: Run, folder: Path) -> dict[str, Any]:
    """Train, then test; the part of a row that only a training tells.

    Args:
        study: that the run is part of.
        run: what to train.
        folder: where the training keeps its log.

    Raises:
        ValueError: if the settings do not fit together, or a test does not give the study's measures.
    """
    fit = _fit(study, run.settings, folder)
    fit.datamodule.setup("fit")  # composing or reading data is no part of a training's cost
    start = perf_counter()
    peak = rise_mib(fit.start)
    minutes = (perf_counter() - start) / 60
    found = dict(fit.trainer.callback_metrics)
    (tested,) = fit.trainer.test(fit.model, datamodule=fit.datamodule, verbose=False)
    row: dict[str, Any] = {"minutes": round(minutes, 2), "peak_mib": peak and round(peak)}
    for stage, metrics in (("validation", found), ("test", tested)):
        for name in study.measures:
            if f"{stage}/{name}" not in metrics:
                raise ValueError(f"`measures` of the study name {name}, which its {stage} does not give.")
            row[f"{stage}_{name}"] = round(float(metrics[f"{stage}/{name}"]), 4)
    return row | here(fit.model.device.type)


def costs(study: Study, folder: Path) -> dict[str, Row]:
    """What each variant costs, by its name: all timed in turns, on one image of the first variant's test data."""
    fits = {name: _fit(study, {**study.settings, **own}, folder) for name, own in study.variants.items()}
    data = next(iter(fits.values())).datamodule
    data.setup("test")
    images: Tensor | list[Tensor] = next(iter(data.test_dataloader()))[0][:1]
    rows = measure({name: fit.model for name, fit in fits.items()}, [{} for _ in fits], images)
    return {row.name: row for row in rows}


def _fit(study: Study, settings: Mapping[str, Any], folder: Path) -> Command:
    args = ["--config", str(recipe(study.recipe)), "--folder", str(folder)]
    for name, value in settings.items():
        args += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return Command("fit", args, study.recipe)
