"""The notebook: every cell runs, and prints what is stored in it."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_and_prints_what_is_stored(path: Path) -> None:
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        told = StringIO()
        with redirect_stdout(told):
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
        stored = [output for output in cell["outputs"] if output["output_type"] == "stream"]
        assert told.getvalue() == "".join("".join(output["text"]) for output in stored)
        pictures = [output for output in cell["outputs"] if output["output_type"] == "display_data"]
        assert len(pictures) == len(plt.get_fignums())
        plt.close("all")


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS
