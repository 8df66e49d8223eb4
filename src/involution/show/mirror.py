"""The kernels of the convolutions that mirror a RedNet's involutions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from involution.models.rednet import RedNet, mirrored_resnet
from involution.show.capture import Captured
from involution.show.subject import depth
from involution.weights import read


def mirror_kernels(
    network: RedNet, captured: Mapping[str, Captured], checkpoint: Path | None = None
) -> tuple[dict[str, Tensor], str]:
    """By layer, a k x k kernel for every group: from its first channel to itself, or from the image in the stem.

    Args:
        network: the RedNet.
        captured: its layers.
        checkpoint: of the ResNet that `involution compare` trained as its mirror. Default: random weights.

    Returns:
        The kernels, (G, k, k) for each layer; and what they are, for people.

    Raises:
        ValueError: if the checkpoint is of another network.
    """
    if checkpoint is None:
        # The weights are as random as the caller's generator; one of ours keeps pages the same.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base, stem = (len(network.get_parameter(name)) for name in ("layer1.0.conv1.weight", "stem.conv3.weight"))
            state = mirrored_resnet(depth(network), base, stem).state_dict()
    else:
        state = read(checkpoint)
    found = {}
    for name, each in captured.items():
        weight = _weight(state, "conv1.weight" if name.startswith("stem.") else f"{name}.weight")
        channels = each.layer.channels // each.layer.groups
        if weight is None or len(weight) < each.layer.channels:
            raise ValueError(
                f"`mirror` {checkpoint} is not of the ResNet that mirrors this RedNet: {name} has no like."
            )
        rows = weight[: each.layer.channels : channels]
        own = range(0, each.layer.channels, channels) if rows.shape[1] >= each.layer.channels else [0] * len(rows)
        found[name] = torch.stack([row[column] for row, column in zip(rows, own, strict=True)])
    return found, "random weights" if checkpoint is None else f"weights of {checkpoint.name}"


def _weight(state: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The convolution of this name, in a ResNet or in a fit of one."""
    found = [value for key, value in state.items() if key.removeprefix("net.") == name]
    return found[0] if found and found[0].dim() == 4 else None
