"""Importing the library costs torch and nothing else, and its public names do not change unnoticed."""

import subprocess
import sys

import involution

_HEAVY = ("timm", "lightning", "triton", "matplotlib", "torchvision", "sklearn")


def test_importing_loads_nothing_heavy() -> None:
    script = f"import sys, involution; print(sorted(set({_HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    assert involution.__all__ == [
        "BottleneckGenerator",
        "Involution1d",
        "Involution2d",
        "Involution3d",
        "implementations",
        "involution",
        "replace_convs",
    ]
    assert all(hasattr(involution, name) for name in involution.__all__)


def test_implementations_names_what_serves_each_device() -> None:
    served = involution.implementations()
    assert set(served) >= {"cpu", "any other"}
    assert served["any other"] == "reference"
