"""The small RedNet that comes with the library: `python -m involution.show.packaged FOLDER` packs one anew.

FOLDER is where `involution compare --config scenes/semantic_fpn` left its files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from involution.models.rednet import RedNet
from involution.recognition import rednet_of
from involution.weights import STEM, read

TOLD = "trained on scenes of digits by the recipe scenes/semantic_fpn"
_WEIGHTS = files("involution.show") / "rednet26_scenes.safetensors"
_MIRROR = "mirror."


def packaged() -> tuple[RedNet, dict[str, Tensor]]:
    """The RedNet, and the convolutions of the ResNet trained in the same way that its involutions replace."""
    with as_file(_WEIGHTS) as path:
        state = {key: _float(value) for key, value in load_file(path).items()}
    mirror = {key.removeprefix(_MIRROR): value for key, value in state.items() if key.startswith(_MIRROR)}
    return rednet_of({key: value for key, value in state.items() if not key.startswith(_MIRROR)}, _WEIGHTS.name), mirror


def rednet_in(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict that is a RedNet's, wherever it sits; all of it if there is none, to be refused."""
    places = [key.removesuffix(STEM) for key in state if key.endswith(STEM)]
    if not places:
        return dict(state)
    found = {key.removeprefix(places[0]): _float(each) for key, each in state.items() if key.startswith(places[0])}
    return {key: value for key, value in found.items() if key.startswith(("stem.", "layer", "fc."))}


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _pack(folder: Path, out: Path) -> None:
    """Write a comparison's RedNet with 16 bits a number, and of its mirror the few kernels that pages show."""
    from involution.show.mirror import slices

    state = rednet_in(read(folder / "checkpoints" / "last.ckpt"))
    network = rednet_of(state, folder)
    kernels = slices(network, read(folder / "mirror" / "checkpoints" / "last.ckpt"), folder)
    state |= {f"{_MIRROR}{name}": kernel for name, kernel in kernels.items()}
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    save_file({key: value.contiguous() for key, value in halves.items()}, out)
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    _pack(Path(sys.argv[1]), Path(str(_WEIGHTS)))
