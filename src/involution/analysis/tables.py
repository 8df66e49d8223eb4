"""The paper's tables beside ours: every network built and counted when the table is made."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import timm
import torch
from torch import nn
from tqdm import tqdm

from involution import cost
from involution.analysis import paper
from involution.analysis.plot import draw_accuracy, draw_costs
from involution.analysis.table import markdown
from involution.models import mirrored_resnet
from involution.models.rednet import BLOCKS

Make = Callable[[], nn.Module]

_SIZE = 224
_ABSENT = "-"
_NOTES = "FLOPs are counted as the paper counts them: see docs/counting.md."
_BASE = "RedNet-50 (K 7, C/G 16, r 4, bottleneck generator, involution stem of K 3)"
# RedNet-50 as published, and with one setting changed at a time: the paper's table 6 and what its code offers.
ABLATIONS: Mapping[str, Mapping[str, object]] = {
    "RedNet-50": {},
    "K 3": {"kernel_size": 3},
    "K 5": {"kernel_size": 5},
    "K 9": {"kernel_size": 9},
    "C/G 1": {"group_channels": 1},
    "C/G 4": {"group_channels": 4},
    "C/G C": {"groups": 1},
    "r 1": {"reduction": 1},
    "r 16": {"reduction": 16},
    "linear generator": {"generator": "linear"},
    "neighbourhood generator": {"generator": "neighbourhood"},
    "attention generator": {"generator": "attention"},
    "convolution stem": {"stem": "convolution"},
    "involution stem of K 7": {"stem_kernel": 7},
}


@dataclass(frozen=True)
class Line:
    """A network: `base` names the one it is compared with, `published` is what its authors say, if anything.

    Parameters, multiply-adds and FLOPs as the paper counts them (see `cost.counts`); milliseconds for an image
    of 224 x 224 on this machine, None unless measured.
    """

    name: str
    base: str
    parameters: int
    macs: int
    flops: int
    published: paper.Published | None
    latency: float | None = None


def table(
    name: Literal["imagenet", "ablation"],
    latency: bool = False,
    format: Literal["md", "csv", "png"] = "md",
    out: Path = Path("runs/tables"),
) -> list[Line]:
    """Build and count the networks of one of the paper's tables, and print them beside what was published.

    Args:
        name: imagenet, the five RedNets with both stems and the ResNets they mirror; or ablation, RedNet-50 with one
            setting changed at a time.
        latency: also measure the time of an image on this machine, in turns, eager, channels last.
        format: md and csv are printed; png is drawn.
        out: folder for the picture.
    """
    makers, bases, published = _imagenet() if name == "imagenet" else _ablation()
    times = _latencies(makers) if latency else {}
    lines = []
    for label, make in tqdm(makers.items(), "building and counting", file=sys.stderr, leave=False, disable=None):
        with torch.device("meta"):
            network, image = make().eval(), torch.empty(1, 3, _SIZE, _SIZE)
            parameters, counts = cost.parameters(network), cost.counts(network, image)
        lines.append(Line(label, bases[label], parameters, *counts, published.get(label), times.get(label)))
    if format == "png":
        picture = out / f"{name}.png"
        if name == "imagenet":
            draw_accuracy(_families(lines), picture)
        else:
            draw_costs([(line.name, line.parameters, line.flops) for line in lines], picture)
        print(f"drawn to {picture}")
    else:
        print(text(lines, format))
        if format == "md":
            print(f"\n{_NOTES}")
            print(paper.SOURCES if name == "imagenet" else f"All but the first row change one setting of {_BASE}.")
    return lines


def text(lines: Sequence[Line], format: Literal["md", "csv"] = "md") -> str:
    """The lines as a table in Markdown, or as CSV."""
    known = {line.name: line for line in lines}
    head = ["network", "parameters", "paper, M", "more, M", "MACs, G", "FLOPs, G", "paper, G", "more, G"]
    head += ["fewer parameters", "paper, fewer parameters", "fewer FLOPs", "paper, fewer FLOPs"]
    head += ["top-1, paper", "top-5, paper", "source", "ms"]
    rows = []
    for line in lines:
        base, said = known[line.base], line.published
        rows.append(
            [
                *(line.name, f"{line.parameters:,}"),
                *_beside(line.parameters / 1e6, said and said.parameters),
                *(f"{line.macs / 1e9:.3f}", f"{line.flops / 1e9:.3f}"),
                *_beside(line.flops / 1e9, said and said.flops),
                *(_fewer(line.parameters, base.parameters), _given(said and said.fewer_parameters, "{:.1f}%")),
                *(_fewer(line.flops, base.flops), _given(said and said.fewer_flops, "{:.1f}%")),
                *(_given(said and said.top1), _given(said and said.top5)),
                *(said.source if said else _ABSENT, _given(line.latency, "{:.1f}")),
            ]
        )
    used = [i for i in range(len(head)) if any(row[i] != _ABSENT for row in rows)]
    chosen = [[row[i] for i in used] for row in (head, *rows)]
    if format == "md":
        return markdown(chosen)
    written = io.StringIO()
    csv.writer(written).writerows(chosen)
    return written.getvalue().rstrip()


def _imagenet() -> tuple[dict[str, Make], dict[str, str], dict[str, paper.Published]]:
    makers: dict[str, Make] = {}
    bases: dict[str, str] = {}
    published: dict[str, paper.Published] = {}
    for depth in BLOCKS:
        mirror, ours, wide = f"ResNet-{depth}", f"RedNet-{depth}", f"RedNet-{depth}, stem of K 7"
        makers[mirror] = partial(mirrored_resnet, depth)
        makers[ours] = partial(timm.create_model, f"rednet{depth}")
        makers[wide] = partial(timm.create_model, f"rednet{depth}", stem_kernel=7)
        bases |= {mirror: mirror, ours: mirror, wide: mirror}
        published |= {mirror: paper.RESNET[depth], ours: paper.REDNET[depth], wide: paper.REDNET[depth]}
    return makers, bases, published


def _ablation() -> tuple[dict[str, Make], dict[str, str], dict[str, paper.Published]]:
    makers: dict[str, Make] = {
        label: partial(timm.create_model, "rednet50", **settings) for label, settings in ABLATIONS.items()
    }
    base = next(iter(ABLATIONS))
    return makers, dict.fromkeys(ABLATIONS, base), {}


def _families(lines: Sequence[Line]) -> dict[str, list[tuple[float, float, float]]]:
    """The points of the paper's plots: RedNets and ResNets where we count them, the others as published."""
    families = {name: list(points) for name, points in paper.RIVALS.items()}
    for line in lines:
        if line.published and "stem" not in line.name:  # one stem, as the accuracy is of one network
            point = (line.published.top1, line.parameters / 1e6, line.flops / 1e9)
            families.setdefault(line.name.partition("-")[0], []).append(point)
    return families


def _latencies(makers: Mapping[str, Make]) -> dict[str, float]:
    print(f"timing {len(makers)} networks ...", file=sys.stderr, flush=True)
    image = torch.randn(1, 3, _SIZE, _SIZE).to(memory_format=torch.channels_last)
    networks = {name: make().eval().to(memory_format=torch.channels_last) for name, make in makers.items()}
    with torch.inference_mode():
        runs = {name: partial(network, image) for name, network in networks.items()}
        return {name: median(times) for name, times in cost.interleaved(runs, rounds=20, warm_up=2).items()}


def _beside(counted: float, published: float | None) -> tuple[str, str]:
    """What was published, and by how much ours is more."""
    return (_ABSENT, _ABSENT) if published is None else (f"{published:g}", f"{counted - published:+.3f}")


def _fewer(value: int, base: int) -> str:
    return _ABSENT if value == base else f"{1 - value / base:.1%}"


def _given(value: float | None, shape: str = "{:.2f}") -> str:
    return _ABSENT if value is None else shape.format(value)
