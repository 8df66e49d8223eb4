"""What a study asks, and the runs that answer it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from involution.names import unknown
from involution.recipes import recipe


@dataclass(frozen=True)
class Panel:
    """One plot of the study's picture: measures against costs or settings.

    Args:
        x: "macs", or the label of an axis of settings.
        lines: variants by the name of their line; along an axis of settings by the label of their place on it.
        y: the measure on the upright axis; the study's first by default.
    """

    x: str
    lines: Mapping[str, Sequence[str] | Mapping[str, str]]
    y: str = ""

    def points(self, line: str) -> dict[str, str]:
        """The variants of a line by their labels."""
        found = self.lines[line]
        return dict(found) if isinstance(found, Mapping) else {name: name for name in found}


@dataclass(frozen=True)
class Run:
    """One training: a variant of a study with a seed and a learning rate."""

    variant: str
    seed: int
    rate: float
    recipe: str
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.variant} with seed {self.seed} at the learning rate {self.rate:g}"

    @property
    def configuration(self) -> str:
        """The recipe, and all settings that differ from it, as JSON: the same text, the same training."""
        return json.dumps({"recipe": self.recipe, **self.settings}, sort_keys=True)


@dataclass(frozen=True)
class Study:
    """A claim, and how it is tested.

    Every variant is trained with `seeds[0]` at each of the `rates`; that with the best `chosen_by` on validation data
    is then trained with the other seeds. All runs have the same recipe and settings but for those of their variant.

    Args:
        question: what is asked, one sentence.
        claim: what the authors say, with the place.
        hypothesis: what is expected here, written before any result.
        recipe: name of a packaged recipe, or the path of one.
        measures: of a test, that are compared; the first says most.
        rates: learning rates to search.
        seeds: of weights and order of the data.
        variants: settings by name of the variant, by name of the setting, such as model.options.kernel_size.
        settings: of all variants.
        panels: plots of the picture.

    Raises:
        ValueError: if there is nothing to run, a rate or seed is no number, or a panel shows a variant or measure that
            there is not.
    """

    question: str
    claim: str
    hypothesis: str
    recipe: str
    measures: Sequence[str]
    rates: Sequence[float]
    seeds: Sequence[int]
    variants: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    panels: Sequence[Panel]

    def __post_init__(self) -> None:
        for name in ("measures", "rates", "seeds", "variants"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` of a study must not be empty.")
        for name, kind in (("rates", (int, float)), ("seeds", int)):
            for value in getattr(self, name):
                if not isinstance(value, kind):  # to YAML 2e-3 is a text
                    raise ValueError(f"`{name}` of a study must be numbers, such as 0.002 or 1; got {value!r}.")
        for panel in self.panels:
            if panel.y and panel.y not in self.measures:
                raise ValueError(unknown("measure", panel.y, self.measures))
            for variant in (name for line in panel.lines for name in panel.points(line).values()):
                if variant not in self.variants:
                    raise ValueError(unknown("variant", variant, self.variants))

    @property
    def chosen_by(self) -> str:
        """The measure of validation data that chooses a learning rate."""
        return f"validation_{self.measures[0]}"

    def run(self, variant: str, seed: int, rate: float) -> Run:
        """One training of the study."""
        settings = {**self.settings, **self.variants[variant], "model.lr": rate, "seed_everything": seed}
        return Run(variant, seed, rate, self.recipe, settings)

    def search(self) -> list[Run]:
        """The runs that find each variant its learning rate."""
        return [self.run(variant, self.seeds[0], rate) for variant in self.variants for rate in self.rates]

    def repeats(self, rates: Mapping[str, float]) -> list[Run]:
        """The runs with further seeds, given the learning rate of each variant."""
        return [self.run(variant, seed, rates[variant]) for seed in self.seeds[1:] for variant in self.variants]


_KINDS: dict[str, type] = {
    **dict.fromkeys(("measures", "rates", "seeds", "panels"), list),
    **dict.fromkeys(("variants", "settings", "grid"), dict),
}


def studies() -> dict[str, Path]:
    """The files of the packaged studies by name."""
    return {path.stem: path for path in sorted(Path(str(files(__package__))).glob("*.yaml"))}


def read(name: str) -> Study:
    """A study from its file.

    Args:
        name: of a packaged one, or the path of a file.

    Raises:
        ValueError: if there is no such study, or its file does not describe one.
    """
    packaged = studies()
    path = packaged.get(name, Path(name))
    if not path.is_file():
        raise ValueError(unknown("study", name, packaged) + " One of your own is given by the path of its file.")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not describe a study; it must hold settings by name.")
    for name, kind in _KINDS.items():
        if not isinstance(content.get(name, kind()), kind):
            what = "a list" if kind is list else "settings by name"
            raise ValueError(f"`{name}` in {path} must be {what}; got {content[name]!r}.")
    if "grid" in content:
        content |= _grid(**content.pop("grid"))
    known = [field.name for field in fields(Study)]
    missing = [key for key in known if key not in content]
    if missing:
        raise ValueError(f"{path} does not describe a study; it lacks `{missing[0]}`.")
    for key in content:
        if key not in known:
            raise ValueError(unknown("part of a study", key, known))
    study = Study(**{**content, "panels": [Panel(**panel) for panel in content["panels"]]})
    recipe(study.recipe)  # an unknown one is refused here
    return study


def _grid(x: str, lines: Mapping[str, Mapping[str, Any]], places: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A variant for each line at each place on the axis `x`, and the panel that shows them."""
    return {
        "variants": {
            f"{line} at {place}": {**own, **there} for line, own in lines.items() for place, there in places.items()
        },
        "panels": [{"x": x, "lines": {line: {place: f"{line} at {place}" for place in places} for line in lines}}],
    }
