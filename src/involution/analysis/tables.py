"""The paper's tables beside ours: every network built and counted when the table is made."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from involution import cost
from involution.analysis import paper
from involution.analysis.networks import IMAGE, TABLES, Network
from involution.analysis.plot import draw_accuracy, draw_costs
from involution.analysis.table import markdown

_ABSENT = "-"
_NOTES = "FLOPs are counted as the paper counts them: see docs/counting.md."
_BASE = "RedNet-50 (K 7, C/G 16, r 4, bottleneck generator, involution stem of K 3)"
_CAPTIONS = {
    "imagenet": paper.SOURCES,
    "ablation": f"All but the first row change one setting of {_BASE}.",
    "coco": f"Neck / head. What is trained: all but stem and first stage. {paper.DENSE_SOURCES}",
    "cityscapes": paper.DENSE_SOURCES,
}


@dataclass(frozen=True)
class Line:
    """A network: `base` names the one it is compared with, `published` is what its authors say, if anything.

    Parameters, those of them that are trained, multiply-adds, and FLOPs as the paper counts them (see `cost.counts`);
    milliseconds for an image of 224 x 224 on this machine, None unless measured.
    """

    name: str
    base: str
    parameters: int
    trained: int
    macs: int
    flops: int
    published: paper.Published | None
    latency: float | None = None


def table(
    name: Literal["imagenet", "ablation", "coco", "cityscapes"],
    latency: bool = False,
    format: Literal["md", "csv", "png"] = "md",
    out: Path = Path("runs/tables"),
) -> list[Line]:
    """Build and count the networks of one of the paper's tables, and print them beside what was published.

    Args:
        name: imagenet, the five RedNets with both stems and the ResNets they mirror; ablation, RedNet-50 with one
            setting changed at a time; coco, the detectors; or cityscapes, the segmentors.
        latency: also measure the time of an image on this machine, in turns, eager, channels last; of the first two
            tables only.
        format: md and csv are printed; png is drawn.
        out: folder for the picture.

    Raises:
        ValueError: if `latency` is asked for in the tables of detectors and segmentors.
    """
    if latency and name not in ("imagenet", "ablation"):
        raise ValueError(f"`latency` is measured in the tables imagenet and ablation; got {name}. Leave it out.")
    networks = list(TABLES[name]())
    times = _latencies(networks) if latency else {}
    lines = []
    for each in tqdm(networks, "building and counting", file=sys.stderr, leave=False, disable=None):
        with torch.device("meta"):
            network = each.make().eval()
            for norm in network.modules():
                if isinstance(norm, _BatchNorm):
                    # What comes out is as large, and norms take half the time on this device.
                    norm.forward = nn.Identity().forward  # type: ignore[method-assign]
            counts = each.count(network)
        size, trained = cost.parameters(network), sum(p.numel() for p in network.parameters() if p.requires_grad)
        work = (counts.macs, counts.flops)
        lines.append(Line(each.name, each.base, size, trained, *work, each.published, times.get(each.name)))
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
            print(_CAPTIONS[name])
    return lines


def text(lines: Sequence[Line], format: Literal["md", "csv"] = "md") -> str:
    """The lines as a table in Markdown, or as CSV."""
    known = {line.name: line for line in lines}
    measures = list(dict.fromkeys(name for line in lines if line.published for name in line.published.measures))
    head = ["network", "parameters", "trained", "paper, M", "more, M", "MACs, G", "FLOPs, G", "paper, G", "more, G"]
    head += ["fewer parameters", "paper, fewer parameters", "fewer FLOPs", "paper, fewer FLOPs"]
    head += [*(f"{name}, paper" for name in measures), "source", "ms"]
    partly = any(line.trained != line.parameters for line in lines)
    rows = []
    for line in lines:
        base, said = known[line.base], line.published
        rows.append(
            [
                *(line.name, f"{line.parameters:,}", f"{line.trained:,}" if partly else _ABSENT),
                *_beside(line.trained / 1e6, said and said.parameters),
                *(f"{line.macs / 1e9:.3f}", f"{line.flops / 1e9:.3f}"),
                *_beside(line.flops / 1e9, said and said.flops),
                *(_fewer(line.trained, base.trained), _given(said and said.fewer_parameters, "{:.1f}%")),
                *(_fewer(line.flops, base.flops), _given(said and said.fewer_flops, "{:.1f}%")),
                *(_given(said.measures.get(name) if said else None) for name in measures),
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


def _families(lines: Sequence[Line]) -> dict[str, list[tuple[float, float, float]]]:
    """The points of the paper's plots: RedNets and ResNets where we count them, the others as published."""
    families = {name: list(points) for name, points in paper.RIVALS.items()}
    for line in lines:
        if line.published and "stem" not in line.name:  # one stem, as the accuracy is of one network
            point = (line.published.measures["top-1"], line.parameters / 1e6, line.flops / 1e9)
            families.setdefault(line.name.partition("-")[0], []).append(point)
    return families


def _latencies(networks: Sequence[Network]) -> dict[str, float]:
    print(f"timing {len(networks)} networks ...", file=sys.stderr, flush=True)
    image = torch.randn(1, 3, *IMAGE).to(memory_format=torch.channels_last)
    made = {each.name: each.make().eval().to(memory_format=torch.channels_last) for each in networks}
    with torch.inference_mode():
        runs = {name: partial(network, image) for name, network in made.items()}
        return {name: median(times) for name, times in cost.interleaved(runs, rounds=20, warm_up=2).items()}


def _beside(counted: float, published: float | None) -> tuple[str, str]:
    """What was published, and by how much ours is more."""
    return (_ABSENT, _ABSENT) if published is None else (f"{published:g}", f"{counted - published:+.3f}")


def _fewer(value: int, base: int) -> str:
    return _ABSENT if value == base else f"{1 - value / base:.1%}"


def _given(value: float | None, shape: str = "{:.2f}") -> str:
    return _ABSENT if value is None else shape.format(value)
