"""The kernels of the convolutions that mirror a RedNet's involutions."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from involution.models.rednet import RedNet, mirrored_resnet
from involution.nn import Involution2d
from involution.show.subject import Subject, depth
from involution.weights import read


def mirror_kernels(shown: Subject, checkpoint: Path | None = None) -> tuple[dict[str, Tensor], str]:
    """A k x k kernel of the mirrored ResNet for every group of every layer; see `slices`.

    Args:
        shown: the RedNet.
        checkpoint: of the ResNet that `involution compare` trained as its mirror. Default: what comes with the packaged
            network; for others, random weights.

    Returns:
        The kernels, (G, k, k) for each layer; and what they are, for people.

    Raises:
        ValueError: if the checkpoint is of another network.
    """
    if checkpoint is not None:
        return slices(shown.network, read(checkpoint), checkpoint), f"weights of {checkpoint.name}"
    if shown.mirror:
        return shown.mirror, "trained in the same way"
    # The weights are as random as the caller's generator; one of ours keeps pages the same.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = (len(shown.network.get_parameter(name)) for name in ("layer1.0.conv1.weight", "stem.conv3.weight"))
        state = mirrored_resnet(depth(shown.network), *widths).state_dict()
    return slices(shown.network, state, "the mirror"), "random weights"


def slices(network: RedNet, state: Mapping[str, Tensor], path: str | PathLike[str]) -> dict[str, Tensor]:
    """Of each convolution that an involution replaces, the kernels from the first channel of every group to itself.

    Those of the stem read the image's first channel. `state` is the ResNet's, bare or of a fit; `path` its place, for
    errors.

    Raises:
        ValueError: if a convolution is missing or of another width.
    """
    plain = {key.removeprefix("net."): value for key, value in state.items()}
    plain |= {key.partition("stages.body.")[2]: value for key, value in state.items() if "stages.body." in key}
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, Involution2d):
            weight = plain.get("conv1.weight" if name.startswith("stem.") else f"{name}.weight")
            if weight is None or weight.dim() != 4 or len(weight) < layer.channels:
                raise ValueError(f"`mirror` {path} is not of the ResNet that mirrors this RedNet: it lacks {name}.")
            firsts = range(0, layer.channels, layer.channels // layer.groups)
            sources = [0] * layer.groups if name.startswith("stem.") else firsts
            found[name] = torch.stack([weight[to, source] for to, source in zip(firsts, sources, strict=True)])
    return found
