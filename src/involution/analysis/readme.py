"""The README's numbers, written from the rows of committed benchmarks and never by hand."""

from __future__ import annotations

import csv
from pathlib import Path

from involution.analysis import record, table
from involution.analysis.record import Row

_BEGIN = "<!-- measurements: `involution bench readme` writes what follows -->"
_END = "<!-- end of measurements -->"
# Columns of scenes/*.csv that are shown, and their heads.
_ACCURACIES = {"AP": "AP", "AP50": "AP50", "mask_AP": "mask AP", "mask_AP50": "mask AP50", "mIoU": "mIoU"}
_NONE = "There are no committed measurements yet; `involution bench op` and `involution bench model` take them."


def readme(file: Path = Path("README.md"), folder: Path = Path("benchmarks")) -> None:
    """Write the newest measurements into the README.

    Args:
        file: a text file with the two comments that the measurements stand between.
        folder: folder of op.csv, model.csv and gpu.csv, as the other benchmarks write them; each may be missing.

    Raises:
        ValueError: if the file lacks the comments, or a CSV file has other columns than those of today.
    """
    between(file, _BEGIN, _END, measurements(folder))


def between(file: Path, begin: str, end: str, text: str) -> None:
    """Put `text` between two comments of a text file, in place of what is there.

    Raises:
        ValueError: if the file lacks the comments.
    """
    head, first, rest = file.read_text().partition(begin)
    _, last, tail = rest.partition(end)
    if not (first and last):
        raise ValueError(f"`file` must hold the lines {begin!r} and {end!r}; {file} does not.")
    file.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")


def measurements(folder: Path) -> str:
    """The newest rows of op.csv, model.csv and gpu.csv in `folder`, and those of scenes/*.csv, as Markdown.

    Or a sentence that there are none.
    """
    op, model, gpu = (_newest(folder / f"{name}.csv") for name in ("op", "model", "gpu"))
    return "\n\n".join([*_operator(op), *_networks(model), *_gpu(gpu), *_scenes(folder / "scenes")]) or _NONE


def _newest(path: Path) -> list[Row]:
    return record.newest(record.read(path)) if path.exists() else []


def _operator(rows: list[Row]) -> list[str]:
    parts = []
    for setting in dict.fromkeys((row.window, row.dtype, row.layout) for row in rows):
        here = [row for row in rows if (row.window, row.dtype, row.layout) == setting and row.direction != "backward"]
        parts += [
            f"The operator and its rivals ({', '.join(setting)}); in brackets, how many times as long as ours. "
            f"{_measured(here)}",
            table.against_base(here, table.TIME),
        ]
    return parts


def _networks(rows: list[Row]) -> list[str]:
    parts = []
    for layout in dict.fromkeys(row.layout for row in rows):
        here = [row for row in rows if row.layout == layout]
        parts += [f"Networks ({layout}): time and peak memory, divided. {_measured(here)}", table.summary(here)]
    return parts


def _gpu(rows: list[Row]) -> list[str]:
    parts = []
    for setting in dict.fromkeys((row.device, row.dtype) for row in rows):
        here = [row for row in rows if (row.device, row.dtype) == setting]
        measured = f"Medians on {_runs(here)}."
        for benchmark, what in (("op", "operator and its rivals"), ("layer", "layer")):
            chosen = [r for r in here if r.benchmark == benchmark and not r.contender.startswith("copy")]
            if chosen:
                parts.append(f"On a GPU, the {what} ({setting[1]}, channels_last). {measured}")
                parts.append(table.against_base(chosen, table.TIME))
        networks = [row for row in here if row.benchmark == "model"]
        if networks:
            parts += [f"On a GPU, networks ({setting[1]}): time and peak memory, divided.", table.summary(networks)]
    return parts


def _scenes(folder: Path) -> list[str]:
    rows = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    if not rows:
        return []
    names = [name for name in _ACCURACIES if any(row.get(name) for row in rows)]
    lines = [("recipe", "backbone", "parameters", *(_ACCURACIES[name] for name in names), "minutes of training")]
    for row in rows:
        shares = (f"{float(row[name]):.1%}" if row.get(name) else "-" for name in names)
        lines.append((row["recipe"], row["model"], f"{int(row['parameters']):,}", *shares, row["minutes"]))
    runs = dict.fromkeys(
        f"{row['recipe'].rpartition('/')[2]}: {row['threads']} threads, commit {row['commit']}" for row in rows
    )
    told = (
        "Scenes of handwritten digits: detectors and segmentors on small RedNets, each trained like its mirror by "
        f"`make bench-scenes`; accuracy on test scenes. On {rows[0]['device']}, torch {rows[0]['torch']}; "
        f"{'; '.join(runs)}."
    )
    return [told, table.markdown(lines)]


def _measured(rows: list[Row]) -> str:
    """How, where and when on a processor."""
    return f"Medians of interleaved rounds on {_runs(rows)}."


def _runs(rows: list[Row]) -> str:
    """Where and when."""
    runs = dict.fromkeys(
        f"{row.device}, {row.threads} threads, torch {row.torch}, commit {row.commit}, {row.date.partition('T')[0]}"
        for row in rows
    )
    return "; ".join(runs)
