"""The command `study`: runs what is missing of a study, then shows what it found."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from involution.analysis.record import append
from involution.studies.results import Result, chosen, document, draw, results, table
from involution.studies.study import Run, Study, read
from involution.studies.training import costs, train
from involution.tasks.report import Row


def study(
    name: str,
    lanes: int | None = None,
    out: Path = Path("benchmarks/studies"),
    folder: Path = Path("runs/studies"),
    text: Path | None = None,
    again: str | None = None,
) -> None:
    """Train every variant of a study over its seeds, and compare them: a table, a picture, and a CSV row a run.

    Runs that the CSV file has already are not repeated, so a study that was interrupted goes on.

    Args:
        name: of a packaged study (cost, kernel, dense, range), or the path of a YAML file like theirs.
        lanes: how many runs go on side by side, each with its share of the processors. Default: one a processor.
        out: folder of NAME.csv and NAME.png.
        folder: where the runs keep their logs.
        text: a Markdown file with places for studies, to write the results into.
        again: train the first seed of this variant once more, from scratch, and print how far its test measures are
            from those in the CSV file; nothing is written.

    Raises:
        ValueError: if there is no such study or variant, a setting is out of range, or the CSV file has rows of another
            version of the study.
    """
    if lanes is None:
        lanes = os.cpu_count() or 1
    if lanes < 1:
        raise ValueError(f"`lanes` must be at least 1; got {lanes}.")
    plan, label = read(name), Path(name).stem
    path = out / f"{label}.csv"
    rows = _rows(plan, path)
    lane = _Lanes(plan, lanes, folder / label)
    if again is not None:
        _compare(plan, again, rows, lane, path)
        return
    rows += lane.run([run for run in plan.search() if _row(rows, run) is None], path)
    repeats = plan.repeats(chosen(plan, rows))
    rows += lane.run([run for run in repeats if _row(rows, run) is None], path)
    found = results(plan, rows)
    draw(plan, found, path.with_suffix(".png"))
    if text is not None:
        document(plan, label, found, path, text)
    print(f"\n{plan.question}\n\n{table(plan, found)}\n")
    _tell(("runs", path), ("picture", path.with_suffix(".png")), *([("text", text)] if text else []))


class _Lanes:
    """Processes of their own for runs side by side, kept for one run after another."""

    def __init__(self, plan: Study, count: int, folder: Path) -> None:
        self._plan, self._count, self._folder = plan, count, folder
        self._threads = max(1, (os.cpu_count() or 1) // count)

    def run(self, runs: Sequence[Run], path: Path | None = None) -> list[dict[str, Any]]:
        """The rows of the runs; each is added to the CSV file as soon as it is there."""
        if not runs:
            return []
        spent, rows, jobs = self._costs, [], {}  # the costs are timed now, before anything runs beside
        failed: list[tuple[Run, BaseException]] = []
        pool = ProcessPoolExecutor(
            self._count, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(self._threads,)
        )
        try:
            for run in runs:
                place = self._folder / f"{run.variant}-{run.rate:g}-{run.seed}".replace("/", "-").replace(" ", "-")
                jobs[pool.submit(train, self._plan, run, place)] = run
            for job in tqdm(as_completed(jobs), "training", len(jobs), file=sys.stderr, unit="run", disable=None):
                run, error = jobs[job], job.exception()
                if error is not None:  # told when the others are done
                    failed.append((run, error))
                    continue
                cost = spent[run.variant]
                row = {
                    "variant": run.variant,
                    "seed": run.seed,
                    "rate": run.rate,
                    "parameters": cost.parameters,
                    "macs": cost.macs,
                    "ms": round(cost.latency, 2),
                    **job.result(),
                    "configuration": run.configuration,
                }
                rows.append(row)
                if path is not None:
                    append([row], path)
        finally:
            pool.shutdown(cancel_futures=True)  # of what has not begun, when this is interrupted
        if failed:
            run, error = failed[0]
            raise ValueError(f"{len(failed)} of {len(runs)} runs failed; the first, {run}: {error}") from error
        return rows

    @cached_property
    def _costs(self) -> dict[str, Row]:
        torch.set_num_threads(self._threads)
        return costs(self._plan, self._folder)


def _compare(plan: Study, variant: str, rows: Sequence[dict[str, Any]], lanes: _Lanes, path: Path) -> None:
    found = {result.variant: result for result in results(plan, rows)}
    if variant not in found:
        raise ValueError(f"`again` must be a variant with all its rows in {path}: {', '.join(found)}; got {variant!r}.")
    result: Result = found[variant]
    run = plan.run(variant, plan.seeds[0], result.rate)
    old = _row(rows, run)
    (new,) = lanes.run([run])
    for name in plan.measures:
        before, now = (float(row[f"test_{name}"]) for row in (old or {}, new))
        deviation = result.deviation(name)
        print(f"{name}: {before:.4f} then, {now:.4f} now; deviation over seeds {deviation:.4f}")


def _rows(plan: Study, path: Path) -> list[dict[str, Any]]:
    """What the CSV file has already."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in plan.measures:
        if rows and f"test_{name}" not in rows[0]:
            raise ValueError(f"{path} lacks the measure {name} of the study; move it away, or give another `out`.")
    for row in rows:
        if row.get("variant") not in plan.variants or _row([row], _run(plan, row)) is None:
            raise ValueError(
                f"{path} has a row of another version of the study, {row.get('variant')} with seed {row.get('seed')}; "
                "move the file away, or give another `out`."
            )
    return rows


def _run(plan: Study, row: dict[str, Any]) -> Run:
    return plan.run(row["variant"], int(row["seed"]), float(row["rate"]))


def _row(rows: Iterable[dict[str, Any]], run: Run) -> dict[str, Any] | None:
    """The row of a run, if it is there."""
    return next((row for row in rows if row["configuration"] == run.configuration), None)


def _tell(*places: tuple[str, Path]) -> None:
    for what, where in places:
        print(f"{what:<8} {where}")
