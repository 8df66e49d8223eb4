"""What only the compiler's sanitizers see in the compiled library: run by `make sanitize`, and by nothing else."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from involution.ops import cpu

from ..cases import CASES, DTYPES, LAYOUTS, OPS, Case, run_served


@pytest.fixture(autouse=True)
def libraries(pytestconfig: pytest.Config) -> Path:
    folder = pytestconfig.getoption("--libraries")
    if folder is None:
        pytest.skip("needs the library that the sanitizers watch, and their runtime: run `make sanitize`")
    return folder


def _calls(case: Case, dtype: torch.dtype, layout: str) -> list[partial[torch.Tensor]]:
    """Each of the ops on a case, ready to be called."""
    tensors = [lay(t, len(case.size)) for lay, t in zip(LAYOUTS[layout], case.tensors(dtype), strict=True)]
    x, _, grad = tensors
    w, taps = case.window, case.groups * prod(case.window.kernel_size)
    features = LAYOUTS[layout][0](torch.randn(case.batch, 5, *grad.shape[2:]).to(dtype), len(case.size))
    generator = (features, torch.randn(taps, 5).to(dtype), torch.randn(taps).to(dtype))
    settings = (w.kernel_size, w.stride, w.padding, w.dilation)
    norms = [torch.rand(n).to(dtype) for n in (*(5,) * 4, *(x.shape[1],) * 4)]
    whole = [torch.randn(5, x.shape[1]).to(dtype), torch.randn(5).to(dtype), *generator[1:], *norms]
    return [
        *(partial(run_served, op, *tensors, w) for op in OPS),
        partial(torch.ops.involution.generated, x, *generator, *settings),
        partial(torch.ops.involution.generated_grad_x, grad, *generator, x.shape[2:], *settings),
        *(partial(_gradient, which, grad, x, *generator[:2], *settings) for which in range(3)),
        *([partial(_layer, x, grad, whole, settings)] if dtype in (torch.float32, torch.float64) else []),
    ]


def _layer(x: torch.Tensor, grad: torch.Tensor, parameters: list[torch.Tensor], settings: Any) -> torch.Tensor:
    """The outputs that one call fills, of the shape of `grad`, which stands for what features are made from."""
    out = torch.empty_like(grad)
    if out.numel():
        cpu.layer(out, x, grad, parameters, (0.1, 0.2), (True, False), *settings)
    return out


def _gradient(which: int, *arguments: Any) -> torch.Tensor:
    gradient: torch.Tensor = torch.ops.involution.grad_span(*arguments)[which]
    return gradient


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("variant")
def test_new_scratch_changes_no_bit(dtype: torch.dtype, layout: str) -> None:
    """A new thread's scratch is no larger than its one call needs, and full of NaN: `make sanitize` fills it so."""
    for case in CASES:
        for call in _calls(case, dtype, layout):
            with ThreadPoolExecutor(1) as new:
                assert torch.equal(new.submit(call).result(), call()), f"{case}: {call}"


_SHORT = """
from pathlib import Path
import torch
from involution.ops import cpu

cpu._library, description = cpu._load({variant!r}, Path({folder!r}))
assert cpu._library is not None, description
x, kernel = torch.randn(1, 4, 5, 6), torch.randn(1, 1, 3, 3, 5, 6)
whole, short = torch.zeros(1, 4, 5, 6), torch.zeros(1, 4, 4, 6)
window = ([1, 1], [1, 1], [1, 1])
for y in (whole, short):
    if {access!r} == "WRITE":
        cpu.forward(y, x, kernel, *window)
    else:
        cpu.grad_x(x, y, kernel, *window)
    print("returned", flush=True)
"""


@pytest.mark.parametrize("access", ["READ", "WRITE"])
def test_the_sanitizer_sees_an_overrun_of_a_tensor(libraries: Path, access: str) -> None:
    """Called beneath every check, with an output (or its gradient) one row too short: the process must end there."""
    code = _SHORT.format(access=access, variant="baseline", folder=str(libraries.resolve()))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["returned"], ran.stderr  # with the whole tensor, and only with that
    assert ran.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in ran.stderr
    assert f"{access} of size" in ran.stderr
