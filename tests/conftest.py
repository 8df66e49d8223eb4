"""What every test runs under: fixed seeds, bounded draws, and NaN in all memory nobody has written yet."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from involution.ops import cpu

# Without it cuBLAS refuses to run in the deterministic mode below.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

settings.register_profile("bounded", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("bounded")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--libraries", type=Path, help="test the compiled libraries in this folder, not the package's")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--libraries", None)
    if folder is not None:
        cpu._load = partial(cpu._load, folder=folder)
        cpu._library, cpu._description = cpu._load()
        if cpu._library is None:
            raise pytest.UsageError(f"--libraries {folder}: {cpu._description}")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """In deterministic mode torch fills what `empty` and its kin return with NaN, so an unwritten output is seen."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled yet: what has been compiled for one size would be compiled for all sizes next, and slowly."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
