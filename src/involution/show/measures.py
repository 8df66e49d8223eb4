"""Numbers about generated kernels: how they differ from place to place, and how far they reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EDGES = torch.tensor([0.02, 0.98], dtype=torch.float64)  # of each colour's values, between which it runs


@dataclass(frozen=True)
class Group:
    """The kernels of one group over all positions of an image.

    Attributes:
        group: its number, from 0.
        mean_sum: mean over positions of the sum of the kernel.
        sum_deviation: deviation of these sums.
        variation: root mean square of what differs from the mean kernel, as a share of that of the mean kernel; a
            convolution has 0.
        reach: mean distance of a tap from the centre, weighted by magnitude, in pixels of the layer's input.
    """

    group: int
    mean_sum: float
    sum_deviation: float
    variation: float
    reach: float


def groups(kernel: Tensor, dilation: tuple[int, ...] = (1, 1)) -> list[Group]:
    """Statistics of every group.

    Args:
        kernel: of one image, (G, K, K, H, W).
        dilation: of the layer.
    """
    kernel = kernel.double().flatten(3)
    sums, mean = kernel.sum((1, 2)), kernel.mean(3, keepdim=True)
    variation = (kernel - mean).square().mean((1, 2, 3)).sqrt() / mean.square().mean((1, 2, 3)).sqrt()
    offsets = [d * (torch.arange(k) - (k - 1) / 2) for d, k in zip(dilation, kernel.shape[1:3], strict=True)]
    distance = (offsets[0][:, None].square() + offsets[1].square()).sqrt()
    magnitude = kernel.abs().sum(3)
    reach = (magnitude * distance).sum((1, 2)) / magnitude.sum((1, 2))
    columns = (sums.mean(1), sums.std(1, correction=0), variation, reach)
    return [Group(i, *row) for i, row in enumerate(torch.stack(columns, 1).tolist())]


def colours(kernel: Tensor) -> tuple[Tensor, list[float]]:
    """Kernels as colours: positions with like kernels have like colours.

    The first three principal components of all kernels of a position, each from black to full, are red, green and blue.

    Args:
        kernel: of one image, (G, K, K, H, W).

    Returns:
        (H, W, 3) from 0 to 1, and the share of the variance that each component holds.
    """
    vectors = kernel.double().flatten(0, 2).flatten(1).T
    centred = vectors - vectors.mean(0)
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    rounding = values[0] * max(centred.shape) * torch.finfo(values.dtype).eps
    count = min(3, int((values > rounding).sum()))
    # The sign of a component is arbitrary; this makes pictures repeat on every machine.
    signs = right[:count].gather(1, right[:count].abs().argmax(1, keepdim=True)).sign().T
    parts = left[:, :count] * values[:count] * signs
    found = torch.zeros(len(vectors), 3, dtype=vectors.dtype)
    if count:
        low, high = torch.quantile(parts, _EDGES, dim=0)
        found[:, :count] = ((parts - low) / (high - low).clamp_min(torch.finfo(parts.dtype).tiny)).clamp(0, 1)
    shares = values.square() / values.square().sum()
    return found.view(*kernel.shape[3:], 3), shares[:count].tolist()
