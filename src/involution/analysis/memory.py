"""Peak memory of one step, measured in a process of its own, so that all of it counts and nothing else does."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Step = Callable[[], object]

_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 17  # see mallopt(3); torch's large tensors are far larger
_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def peak_mib(prepare: Callable[..., tuple[Step, Step]], *args: Any) -> float | None:
    """MiB by which one step raises the resident memory of a fresh process, at its highest.

    That is what the step allocates in any way, torch's allocator or not, and holds at once: outputs, what the backward
    pass needs, gradients, and the scratch that code keeps for its next call. What there was before does not count:
    inputs, weights, the optimiser's state, and the libraries and threads that the warm-up loads and starts.

    Args:
        prepare: a function that can be pickled. Called with `args` in the new process, it gives a warm-up, the same
            step on a problem so small that the memory it keeps is nothing, and the step to measure.
        args: anything that can be pickled.

    Returns:
        The peak in MiB, or None where the system cannot tell (it takes Linux's /proc).
    """
    if not (_RESET.exists() and _STATUS.exists()):
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, prepare, *args).result()


def _measure(prepare: Callable[..., tuple[Step, Step]], *args: Any) -> float:
    libc = ctypes.CDLL(None)
    # Set once, the threshold stays, and freed tensors leave at once. Else it grows, and how much of the heap stays
    # resident depends on the order of what is freed: 100 MiB and more beyond what is alive, in a training step.
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    warm_up, step = prepare(*args)
    warm_up()
    return rise_mib(step) or 0.0


def rise_mib(step: Step) -> float | None:
    """Run `step`; the MiB by which it raises the resident memory of this process, at its highest.

    None where the system cannot tell, without Linux's /proc.
    """
    if not (_RESET.exists() and _STATUS.exists()):
        step()
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the step would reuse freed memory that still counts as resident
    before = _kib("VmRSS")
    _RESET.write_text("5")  # sets the highest resident size so far to the present one
    step()
    return (_kib("VmHWM") - before) / 1024


def _kib(field: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])
