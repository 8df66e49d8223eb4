"""The compiled library in every variant that this processor runs."""

import pytest
import torch

from involution.ops import cpu

_RUNS = {"AVX2": ("baseline", "avx2"), "AVX512": ("baseline", "avx2", "avx512")}


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a variant, which serves the CPU during the test."""
    capability = torch.backends.cpu.get_cpu_capability()
    if request.param not in _RUNS.get(capability, ("baseline",)):
        pytest.skip(f"no processor for {request.param}: this one has {capability}")
    library, description = cpu._load(request.param)
    if library is None:
        pytest.skip(description)
    monkeypatch.setattr(cpu, "_library", library)
    return str(request.param)
