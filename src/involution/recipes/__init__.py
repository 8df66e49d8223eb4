"""Recipes: the settings of a training, packaged as YAML files."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from involution.names import unknown


def recipes() -> dict[str, Path]:
    """The packaged ones, by names such as digits and scenes/faster_rcnn."""
    folder = Path(str(files(__name__)))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def recipe(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: of a packaged one, or the path of a file.

    Raises:
        ValueError: if there is neither.
    """
    packaged = recipes()
    if name.removesuffix(".yaml") in packaged:
        return packaged[name.removesuffix(".yaml")]
    if Path(name).is_file():
        return Path(name)
    raise ValueError(
        unknown("recipe", name, packaged) + " `involution --help` lists all; one of your own is given by its path."
    )
