"""What the rows of a study say: rates that were chosen, means over seeds, a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from involution.analysis.readme import between
from involution.analysis.table import markdown, number
from involution.studies.study import Study

Rows = Sequence[Mapping[str, Any]]

_ASIDE = 0.06  # of the distance between two labels
_COLOURS = ("#d1495b", "#30343a", "#edae49", "#00798c", "#8d96a3", "#6a4c93", "#66a182")


@dataclass(frozen=True)
class Result:
    """A variant at the learning rate chosen for it: its rows, one a seed."""

    variant: str
    rate: float
    rows: Rows

    def values(self, name: str) -> list[float]:
        """A column, a number for each seed."""
        return [float(row[name]) for row in self.rows]

    def mean(self, measure: str) -> float:
        """Mean of a test's measure over the seeds."""
        return mean(self.values(f"test_{measure}"))

    def deviation(self, measure: str) -> float:
        """Standard deviation of a test's measure over the seeds; 0 for one seed."""
        values = self.values(f"test_{measure}")
        return stdev(values) if len(values) > 1 else 0.0


def chosen(study: Study, rows: Rows) -> dict[str, float]:
    """The learning rate of each variant: that with the best validation measure at the first seed, the lower in a tie.

    Variants of which not all rates have been tried are left out.
    """
    best = {}
    for variant in study.variants:
        tried = {float(row["rate"]): row for row in _of(rows, variant) if int(row["seed"]) == study.seeds[0]}
        if set(study.rates) <= tried.keys():
            best[variant] = max(sorted(study.rates), key=lambda rate: float(tried[rate][study.chosen_by]))
    return best


def results(study: Study, rows: Rows) -> list[Result]:
    """The variants whose runs are all there."""
    found = []
    for variant, rate in chosen(study, rows).items():
        of_rate = {int(row["seed"]): row for row in _of(rows, variant) if float(row["rate"]) == rate}
        if set(study.seeds) <= of_rate.keys():
            found.append(Result(variant, rate, [of_rate[seed] for seed in study.seeds]))
    return found


def table(study: Study, found: Sequence[Result]) -> str:
    """A line for each variant, as Markdown: costs, the chosen rate, and each measure with its deviation over seeds."""
    lines: list[Sequence[str]] = [
        ("variant", "parameters", "MACs", "ms", "rate", *study.measures, "minutes", "peak MiB"),
    ]
    for result in found:
        lines.append(
            (
                result.variant,
                f"{result.values('parameters')[0] / 1e6:.3f} M",
                f"{result.values('macs')[0] / 1e6:.1f} M",
                number(median(result.values("ms"))),
                f"{result.rate:g}",
                *(f"{result.mean(name):.1%} ± {100 * result.deviation(name):.1f}" for name in study.measures),
                number(mean(result.values("minutes"))),
                number(median(result.values("peak_mib"))),  # the first run of a process takes more
            )
        )
    return markdown(lines)


def draw(study: Study, found: Sequence[Result], picture: Path) -> None:
    """Draw the panels of the study side by side: lines through means, and every seed as a point."""
    from matplotlib.figure import Figure

    known = {result.variant: result for result in found}
    figure = Figure(figsize=(max(6.0, 4.2 * len(study.panels)), 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(study.panels), squeeze=False)[0], study.panels, strict=True):
        measure = panel.y or study.measures[0]
        labels = list(dict.fromkeys(label for line in panel.lines for label in panel.points(line)))
        for index, (colour, line) in enumerate(zip(_COLOURS, panel.lines, strict=False)):
            here = {label: known[name] for label, name in panel.points(line).items() if name in known}
            aside = _ASIDE * (index - (len(panel.lines) - 1) / 2)  # else points of one line cover those of another
            if panel.x == "macs":
                places = [result.values("macs")[0] / 1e6 for result in here.values()]
            else:
                places = [labels.index(label) + aside for label in here]
            axes.plot(places, [result.mean(measure) for result in here.values()], color=colour, label=line)
            for place, result in zip(places, here.values(), strict=True):
                values = result.values(f"test_{measure}")
                axes.plot([place] * len(values), values, "o", ms=5, mec="white", mew=0.5, color=colour, alpha=0.7)
        axes.set(xlabel="multiply-adds of an image, millions" if panel.x == "macs" else panel.x, ylabel=measure)
        if panel.x != "macs":
            axes.set_xticks(range(len(labels)), labels)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.lines) > 1:
            axes.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def document(study: Study, label: str, found: Sequence[Result], path: Path, text: Path) -> None:
    """Write what the study asked and found into its place in a Markdown file.

    Args:
        study: what was run.
        label: name of the study, and of its place: the comments `<!-- study LABEL -->` and `<!-- end of LABEL -->`.
        found: what to tell.
        path: the CSV file of the rows; the picture is beside it.
        text: the Markdown file.

    Raises:
        ValueError: if the file has no such place.
    """
    between(text, f"<!-- study {label} -->", f"<!-- end of {label} -->", told(study, label, found, path))


def told(study: Study, label: str, found: Sequence[Result], path: Path) -> str:
    """The study's question, claim, hypothesis, table and picture, as Markdown for a file in docs/."""
    rows = [row for result in found for row in result.rows]
    runs = dict.fromkeys(f"{row['device']}, {row['threads']} thread(s) a run, torch {row['torch']}" for row in rows)
    commits = dict.fromkeys(str(row["commit"]) for row in rows)
    place = f"../{path.parent.as_posix()}/{path.stem}"
    return "\n\n".join(
        [
            f"**Question.** {study.question}",
            f"**Claim.** {study.claim}",
            f"**Hypothesis**, written before the runs. {study.hypothesis}",
            table(study, found),
            f"Means ± standard deviations over {len(study.seeds)} seeds. Each variant's learning rate is that of "
            f"{', '.join(f'{rate:g}' for rate in study.rates)} with the best {study.chosen_by.replace('_', ' ')} at "
            f"seed {study.seeds[0]}; test data chose nothing. All runs, those of the search included: "
            f"[{path.name}]({place}.csv). Again: `involution study {label}`. "
            f"{'; '.join(runs)}; commit {', '.join(commits)}.",
            f"![{study.question}]({place}.png)",
        ]
    )


def _of(rows: Rows, variant: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["variant"] == variant]
