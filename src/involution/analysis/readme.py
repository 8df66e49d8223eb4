"""The README's numbers, written from the rows of committed benchmarks and never by hand."""

from __future__ import annotations

from pathlib import Path

from involution.analysis import record, table
from involution.analysis.record import Row

_BEGIN = "<!-- measurements: `involution bench readme` writes what follows -->"
_END = "<!-- end of measurements -->"
_NONE = "There are no committed measurements yet; `involution bench op` and `involution bench model` take them."


def readme(file: Path = Path("README.md"), folder: Path = Path("benchmarks")) -> None:
    """Write the newest measurements into the README.

    Args:
        file: a text file with the two comments that the measurements stand between.
        folder: folder of op.csv and model.csv, as the other benchmarks write them; either may be missing.

    Raises:
        ValueError: if the file lacks the comments, or a CSV file has other columns than those of today.
    """
    head, begin, rest = file.read_text().partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"`file` must hold the lines {_BEGIN!r} and {_END!r}; {file} does not.")
    file.write_text(f"{head}{begin}\n\n{measurements(folder)}\n\n{end}{tail}")


def measurements(folder: Path) -> str:
    """The newest rows of op.csv and model.csv in `folder` as Markdown, or a sentence that there are none."""
    paths = [path for name in ("op", "model") if (path := folder / f"{name}.csv").exists()]
    rows = [row for path in paths for row in record.newest(record.read(path))]
    parts = [*_operator([row for row in rows if row.benchmark == "op"])]
    parts += _networks([row for row in rows if row.benchmark == "model"])
    return "\n\n".join(parts) or _NONE


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
    if not rows:
        return []
    return [f"Networks: time and peak memory, divided. {_measured(rows)}", table.summary(rows)]


def _measured(rows: list[Row]) -> str:
    """Where and when."""
    runs = dict.fromkeys(
        f"{row.device}, {row.threads} threads, torch {row.torch}, commit {row.commit}, {row.date.partition('T')[0]}"
        for row in rows
    )
    return f"Medians of interleaved rounds on {'; '.join(runs)}."
