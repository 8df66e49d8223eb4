"""Work beside other processes: they do theirs at the same time, and end with it."""

import subprocess
import sys
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from time import sleep

import pytest

from involution.analysis.beside import Beside


def steps(folder: Path):
    """Each adds a letter to a file of its own, slowly."""
    return [partial(add, folder / name) for name in ("a", "b")]


def add(path: Path) -> None:
    with path.open("a") as file:
        file.write("x")
    sleep(0.001)


def failing_once(path: Path):
    """The first of the processes to come here fails."""
    try:
        path.mkdir()
    except FileExistsError:
        return [partial(sleep, 0.001)]
    raise OSError("no such problem")


def failing_later():
    return [iter([None]).__next__]


def test_others_do_the_step_that_is_run_and_are_waited_for(tmp_path):
    with Beside(1, steps, tmp_path) as others:
        sleep(0.1)
        assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["x", "x"]  # once, before anything is run
        for count in range(2, 5):
            others.run(1, int)
            assert (tmp_path / "b").read_text() == count * "x"
        sleep(0.1)
        others.run(0, int)
        assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["xx", "xxxx"]
    assert not active_children()


def test_a_process_that_fails_is_told(tmp_path):
    told = pytest.raises(RuntimeError, match=r"a process beside this one ended with exit code 1\.")
    with told, Beside(2, failing_once, tmp_path / "first"):
        pass
    assert not active_children()


def test_a_process_that_fails_later_is_told():
    with pytest.raises(RuntimeError, match="ended with exit code 1"), Beside(1, failing_later) as others:
        others.run(0, int)


def test_others_end_where_this_process_is_killed():
    """They hold its output open, so that it ends only when they do."""
    script = """
import time
from involution.analysis.beside import Beside
if __name__ == "__main__":
    with Beside(1, list):
        print("ready", flush=True)
        time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.communicate(timeout=30) == ("", None)
