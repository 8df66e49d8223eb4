"""What a benchmark writes down: a row for every time it took, in a CSV file."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, get_type_hints

import torch

from involution import cost
from involution.ops.library import implementations


@dataclass(frozen=True)
class Row:
    """One contender in one situation.

    Times are in milliseconds, the peak of memory (see `memory.peak_mib`) in MiB or None where it was not measured.
    GFLOP counts two for a multiply-add; GB counts each tensor read or written once a pass. `base` is the contender of
    the same run to compare with, `date` the second in which the run began.
    """

    benchmark: str
    contender: str
    base: str
    direction: str
    shape: str
    window: str
    dtype: str
    layout: str
    rounds: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    gflops: float
    gbytes_per_second: float
    peak_mib: float | None
    threads: int
    device: str
    implementation: str
    torch: str
    commit: str
    date: str


def figures(
    times: Sequence[float], megaflops: float, megabytes: float = 0.0, peak_mib: float | None = None
) -> dict[str, Any]:
    """The fields of a row that are measured, to five digits: from milliseconds and the work done in each of them."""
    p20, p50, p80 = cost.percentiles(times)
    numbers = {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "gflops": megaflops / p50,
        "gbytes_per_second": megabytes / p50,
        "peak_mib": peak_mib,
    }
    rounded = {name: None if n is None else float(f"{n:.5g}") for name, n in numbers.items()}
    return {"rounds": len(times), **rounded}


def here(device: str = "cpu") -> dict[str, Any]:
    """The fields of a row that tell what a time depends on besides the code that is timed, and when it was taken.

    Args:
        device: type of the device that is timed, "cpu" or "cuda".
    """
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "implementation": implementations()[device],
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "no repository",
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def check(path: Path) -> None:
    """Make sure that rows can be added to the CSV file, which need not exist.

    Raises:
        ValueError: if the file has other columns.
    """
    if path.exists():
        with path.open(newline="") as file:
            if next(csv.reader(file), []) != [field.name for field in fields(Row)]:
                raise ValueError(f"`out` holds {path}, whose columns are not those of today; give another folder.")


def add(rows: Iterable[Row], path: Path) -> None:
    """Add the rows to the CSV file, which is made if need be."""
    append([asdict(row) for row in rows], path)


def append(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Add rows of any columns, the same as those before, to a CSV file, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        ValueError: if the file has other columns.
    """
    check(path)
    types = get_type_hints(Row)
    with path.open(newline="") as file:
        return [Row(**{name: _parse(text, types[name]) for name, text in row.items()}) for row in csv.DictReader(file)]


def _parse(text: str, kind: Any) -> Any:
    if kind == float | None:
        return float(text) if text else None
    return kind(text)


def newest(rows: Iterable[Row]) -> list[Row]:
    """The rows of the last run in each situation: what compares with one another was measured in turns."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        situation = (row.benchmark, row.base, row.direction, row.shape, row.window, row.dtype, row.layout)
        run = runs.setdefault(situation, [])
        if run and run[0].date != row.date:
            run.clear()
        run.append(row)
    return [row for run in runs.values() for row in run]
