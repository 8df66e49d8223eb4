"""What training on many devices needs of each device and of the network between them: computed, not measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from involution import cost
from involution.analysis.readme import between
from involution.analysis.table import markdown
from involution.models.stages import build

_NETWORKS = ("rednet26", "rednet38", "rednet50", "rednet101", "rednet152")
_MIB = 2**20
_BYTES = 4  # of a weight, a gradient, a momentum
_TENSORS = 3  # those
_MARKS = ("<!-- scale -->", "<!-- end of scale -->")


def scale(
    networks: Sequence[str] = _NETWORKS,
    images: int = 32,
    size: int = 224,
    devices: Sequence[int] = (8, 64),
    gigabytes_per_second: float = 25.0,
    text: Path | None = None,
) -> str:
    """Compute what training needs of each device's memory and of the network between them, and print it as a table.

    Args:
        networks: names in timm.
        images: in a step, on each device.
        size: of the images, pixels a side.
        devices: how many there are.
        gigabytes_per_second: what each device can send in a second.
        text: a Markdown file with a place for the table, to write it into.

    Raises:
        ValueError: if an argument is out of range.
    """
    for name, values in (("images", [images]), ("size", [size]), ("devices", devices)):
        if any(value < 1 for value in values):
            raise ValueError(f"`{name}` must be at least 1; got {values[0] if len(values) == 1 else values}.")
    if not gigabytes_per_second > 0:
        raise ValueError(f"`gigabytes_per_second` must be above 0; got {gigabytes_per_second}.")
    lines: list[Sequence[str]] = [
        (
            *("MiB on each device", "devices", "weights", "shared out"),
            *("features", "bfloat16", "recomputed", "sent a step", "ms", "shared out, sent", "ms"),
        )
    ]
    for name in tqdm(networks, "computing", file=sys.stderr, leave=False, disable=None):
        whole, half, again = (
            kept(name, images, size, dtype, recompute) / _MIB
            for dtype, recompute in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
        )
        with torch.device("meta"):
            weights = cost.parameters(build(name)) * _BYTES / _MIB
        for count in devices:
            ring = weights * (count - 1) / count  # all but one's own part, passed on once
            sent = (2 * ring, 3 * ring)
            lines.append(
                (
                    *(name, str(count), f"{_TENSORS * weights:.0f}", f"{_TENSORS * weights / count:.1f}"),
                    *(f"{whole:.0f}", f"{half:.0f}", f"{again:.0f}"),
                    *(f"{number:.1f}" for mib in sent for number in (mib, mib * _MIB / gigabytes_per_second / 1e6)),
                )
            )
    told = "\n\n".join(
        [
            markdown(lines),
            f"For {images} images of {size} x {size} a device. *Weights*: they, their gradients and momentum, in "
            "float32; *shared out* by `fsdp`, beside which one stage is whole at a time. *Features*: what is kept for "
            "the backward pass, in float32, in bfloat16, and with `--model.recompute true`, beside which there is one "
            "block at a time. *Sent* by each device: a ring that sums the gradients; with `fsdp`, two that gather the "
            f"weights and one that shares out the gradients. *ms* at {gigabytes_per_second:g} GB/s, most of it while "
            "the backward pass computes.",
        ]
    )
    print(told)
    if text is not None:
        between(text, *_MARKS, told)
    return told


def kept(name: str, images: int, size: int, dtype: torch.dtype = torch.float32, recompute: bool = False) -> int:
    """Bytes that the forward pass of a network keeps for its backward pass, each storage once, its weights left out.

    Args:
        name: of the network in timm.
        images: in a batch.
        size: pixels a side.
        dtype: of all features and weights.
        recompute: keep what is between blocks alone.
    """
    with torch.device("meta"):
        network = build(name).to(dtype)
        batch = torch.empty(images, 3, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    if not hasattr(network, "set_grad_checkpointing"):
        raise ValueError(f"`networks` must name networks that can recompute their features; {name} cannot.")
    network.set_grad_checkpointing(recompute)
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    found: dict[int, Any] = {}  # the storages themselves, which must live for their numbers to differ

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(batch)
    total = sum(storage.nbytes() for number, storage in found.items() if number not in weights)
    del output
    return int(total)
