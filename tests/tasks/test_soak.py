"""A training gives back what it takes."""

import csv

import pytest

from involution.cli import main
from involution.tasks.soak import soak


def test_a_soak_is_written_and_drawn(tmp_path, capsys):
    assert main(["bench", "soak", "--minutes", "0.02", "--out", str(tmp_path)]) == 0
    with (tmp_path / "soak.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["minutes"]) >= 0.02
    assert int(rows[-1]["steps"]) == 8 * int(rows[-1]["epochs"])  # 64 images, 8 in a step
    assert int(rows[-1]["workers"]) >= 4  # two to train, two to measure; and what tests before left to be collected
    assert float(rows[-1]["process_mib"]) > 100
    assert int(rows[-1]["files"]) > 3
    assert (tmp_path / "soak.png").stat().st_size > 5000
    assert "process_mib" in capsys.readouterr().out
    assert main(["bench", "soak", "--minutes", "0"]) == 2
    assert "`minutes` must be above 0; got 0.0." in capsys.readouterr().err


@pytest.mark.slow
def test_memory_and_open_files_stay_where_they_are(tmp_path):
    rows = soak(3, tmp_path)
    before, after = rows[len(rows) // 3], rows[-1]
    assert after["files"] == before["files"]
    assert after["workers_mib"] < 1.01 * before["workers_mib"]
    assert after["process_mib"] < 1.01 * before["process_mib"]


@pytest.mark.slow
def test_memory_that_is_not_given_back_is_seen(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr("involution.tasks.soak.gc.collect", lambda: held.append(bytearray(2**24)))
    rows = soak(1, tmp_path)
    assert rows[-1]["process_mib"] > 1.01 * rows[len(rows) // 3]["process_mib"]
