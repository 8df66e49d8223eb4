import ctypes

import pytest
import torch

from involution.analysis import memory

SIZE = 1 << 26


def allocate(function):
    """A step that holds 64 MiB for a moment, by torch or past it."""

    def by_torch():
        torch.ones(SIZE // 4)

    def by_malloc():
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        address = libc.malloc(ctypes.c_size_t(SIZE))
        ctypes.memset(address, 1, SIZE)
        libc.free(address)

    return (lambda: torch.ones(4)), {"torch": by_torch, "malloc": by_malloc}[function]


def held():
    """A step that works in what the preparation holds, after a warm-up that used and freed as much."""
    before = torch.zeros(SIZE // 4)
    return (lambda: torch.ones(SIZE // 4)), (lambda: before.add_(1))


needs_proc = pytest.mark.skipif(not memory._RESET.exists(), reason="no /proc/self/clear_refs")


@needs_proc
@pytest.mark.parametrize("function", ["torch", "malloc"])
def test_what_a_step_allocates_is_its_peak(function):
    assert 60 < memory.peak_mib(allocate, function) < 80


@needs_proc
def test_what_there_was_before_the_step_does_not_count():
    assert memory.peak_mib(held) < 8


def test_none_where_the_system_cannot_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_RESET", tmp_path / "missing")
    assert memory.peak_mib(allocate, "torch") is None
