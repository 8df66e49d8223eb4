"""Studies: what is run, what is chosen, and what is told of it."""

import csv
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from involution.analysis.record import append
from involution.cli import main
from involution.studies import command
from involution.studies.results import chosen, results, table, told
from involution.studies.study import read, studies
from involution.tasks.report import Row

TINY = {
    "question": "Does it run?",
    "claim": "It does.",
    "hypothesis": "It runs.",
    "recipe": "digits",
    "measures": ["accuracy"],
    "rates": [0.002, 0.004],
    "seeds": [0, 1],
    "settings": {
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
        "trainer.callbacks": [],
        "trainer.enable_checkpointing": False,
        "trainer.enable_progress_bar": False,
        "trainer.accelerator": "cpu",
        "model.options.base_width": 16,
    },
    "variants": {"K = 3": {"model.options.kernel_size": 3}},
    "panels": [{"x": "macs", "lines": {"RedNet": ["K = 3"]}}],
}
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "studies"
TEXT = Path(__file__).parents[2] / "docs" / "results.md"


@pytest.fixture(autouse=True)
def _at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(tmp_path):
    def write(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**TINY, **changes}))
        return str(path)

    return write


def row(study, variant, seed, rate, validation, test):
    return {
        **{"variant": variant, "seed": seed, "rate": rate, "validation_accuracy": validation, "test_accuracy": test},
        **{"parameters": 1e6, "macs": 2e6, "ms": 3.0, "minutes": 1.0, "peak_mib": 50, "device": "a processor"},
        **{"threads": 1, "torch": "2", "commit": "abc", "configuration": study.run(variant, seed, rate).configuration},
    }


def test_the_rate_is_chosen_by_validation_at_the_first_seed_and_all_seeds_are_compared(tiny):
    study = read(tiny())
    rows = [row(study, "K = 3", 0, 0.002, 0.6, 0.1), row(study, "K = 3", 0, 0.004, 0.5, 0.9)]
    assert chosen(study, rows) == {"K = 3": 0.002}
    assert results(study, rows) == []  # a seed is missing
    rows += [row(study, "K = 3", 1, 0.002, 0.4, 0.3)]
    (result,) = results(study, rows)
    assert (result.rate, result.mean("accuracy")) == (0.002, pytest.approx(0.2))
    assert result.deviation("accuracy") == pytest.approx(0.1 * 2**0.5)
    assert "20.0% ± 14.1" in table(study, [result])


def test_a_rate_that_is_not_tried_yet_chooses_nothing(tiny):
    study = read(tiny())
    assert chosen(study, [row(study, "K = 3", 0, 0.002, 0.6, 0.1)]) == {}


@pytest.mark.slow
def test_a_study_runs_goes_on_and_repeats_a_run(tiny, capsys):
    name = tiny()
    assert main(["study", name, "--lanes", "1", "--out", "out"]) == 0
    shown = capsys.readouterr().out
    assert "| K = 3" in shown
    assert "runs     out/tiny.csv\npicture  out/tiny.png" in shown
    with open("out/tiny.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["rate"]) for row in rows[:2]] == [("0", "0.002"), ("0", "0.004")]
    assert len(rows) == 3
    assert Path("out/tiny.png").stat().st_size > 5000
    # without its last row a study takes up that run alone, and finds the same
    Path("out/tiny.csv").write_text("".join(Path("out/tiny.csv").read_text().splitlines(keepends=True)[:3]))
    assert main(["study", name, "--lanes", "1", "--out", "out"]) == 0
    with open("out/tiny.csv", newline="") as file:
        again = list(csv.DictReader(file))
    names = ("variant", "seed", "rate", "validation_accuracy", "test_accuracy", "configuration")
    assert [[row[name] for name in names] for row in again] == [[row[name] for name in names] for row in rows]
    capsys.readouterr()
    assert main(["study", name, "--lanes", "1", "--out", "out", "--again", "K = 3"]) == 0
    accuracy = f"{float(rows[0]['test_accuracy']):.4f}"
    assert f"accuracy: {accuracy} then, {accuracy} now" in capsys.readouterr().out


def test_rows_of_another_version_are_refused(tiny, capsys):
    Path("out").mkdir()
    study = read(tiny())
    old = row(study, "K = 3", 0, 0.002, 0.6, 0.1)
    with open("out/tiny.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(old))
        writer.writeheader()
        writer.writerow(old)
    name = tiny(settings={**TINY["settings"], "trainer.max_epochs": 2})
    assert main(["study", name, "--out", "out"]) == 2
    assert "out/tiny.csv has a row of another version of the study, K = 3 with seed 0" in capsys.readouterr().err


def test_rows_of_another_recipe_or_with_other_measures_are_refused(tiny, capsys):
    study = read(tiny())
    append([row(study, "K = 3", 0, 0.002, 0.6, 0.1)], Path("out/tiny.csv"))
    assert main(["study", tiny(recipe="scenes/largest"), "--out", "out"]) == 2
    assert "out/tiny.csv has a row of another version of the study, K = 3 with seed 0" in capsys.readouterr().err
    assert main(["study", tiny(measures=["accuracy", "loss"]), "--out", "out"]) == 2
    assert "out/tiny.csv lacks the measure loss of the study; move it away" in capsys.readouterr().err


def test_a_run_that_fails_is_told_when_the_others_are_done(tiny, capsys, monkeypatch):
    def train(study, run, folder):
        if run.rate == 0.002:
            raise ValueError("the loss is nan")
        return {key: value for key, value in row(study, "K = 3", 0, run.rate, 0.5, 0.6).items() if key in measured}

    measured = ("minutes", "peak_mib", "validation_accuracy", "test_accuracy", "device", "threads", "torch", "commit")
    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "costs", lambda *_: {"K = 3": Row("K = 3", 1, 2, 3.0, 3.0, 1, {})})
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda count, mp_context, **_: ThreadPoolExecutor(count))
    assert main(["study", tiny(rates=[0.002, 0.004, 0.008]), "--out", "out"]) == 2
    told = "1 of 3 runs failed; the first, K = 3 with seed 0 at the learning rate 0.002: the loss is nan"
    assert told in capsys.readouterr().err
    with open("out/tiny.csv", newline="") as file:
        assert sorted(row["rate"] for row in csv.DictReader(file)) == ["0.004", "0.008"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rates": ["2e-3"]}, "`rates` of a study must be numbers, such as 0.002 or 1; got '2e-3'."),
        ({"seeds": 3}, "must be a list; got 3."),
        ({"settings": None}, "must be settings by name; got None."),
        ({"variants": {}}, "`variants` of a study must not be empty."),
        ({"recipe": "digit"}, "unknown recipe 'digit'; did you mean 'digits'?"),
        ({"seed": 3}, "unknown part of a study 'seed'; did you mean 'seeds'?"),
        ({"panels": [{"x": "macs", "lines": {"RedNet": ["K = 5"]}}]}, "unknown variant 'K = 5'; did you mean 'K = 3'?"),
        ({"panels": [{"x": "macs", "y": "AP", "lines": {}}]}, "unknown measure 'AP'."),
    ],
)
def test_what_a_study_cannot_be_is_told(tiny, capsys, changes, told):
    assert main(["study", tiny(**changes)]) == 2
    assert told in capsys.readouterr().err


def test_unknown_studies_and_incomplete_files_are_told(capsys):
    assert main(["study", "costs"]) == 2
    assert "unknown study 'costs'; did you mean 'cost'?" in capsys.readouterr().err
    Path("empty.yaml").write_text("question: What?\n")
    assert main(["study", "empty.yaml"]) == 2
    assert "empty.yaml does not describe a study; it lacks `claim`." in capsys.readouterr().err
    Path("broken.yaml").write_text("question: [")
    assert main(["study", "broken.yaml"]) == 2
    assert "broken.yaml is no YAML file: " in capsys.readouterr().err
    assert main(["study", "cost", "--lanes", "0"]) == 2
    assert "`lanes` must be at least 1; got 0." in capsys.readouterr().err


@pytest.mark.parametrize("name", studies())
def test_packaged_studies_are_searched_alike_and_shown_whole(name):
    study = read(name)
    assert len(study.rates) > 1
    assert len(study.seeds) >= 3
    shown = {variant for panel in study.panels for line in panel.lines for variant in panel.points(line).values()}
    assert shown == set(study.variants)


@pytest.mark.parametrize("name", re.findall("<!-- study (.+) -->", TEXT.read_text()))
def test_what_the_text_tells_is_what_the_committed_rows_say(name):
    study = read(name)
    with (COMMITTED / f"{name}.csv").open(newline="") as file:
        found = results(study, list(csv.DictReader(file)))
    assert [result.variant for result in found] == list(study.variants)
    rest = TEXT.read_text().partition(f"<!-- study {name} -->\n\n")[2]
    place = Path("benchmarks/studies") / f"{name}.csv"
    assert rest.partition(f"\n\n<!-- end of {name} -->")[0] == told(study, name, found, place)
