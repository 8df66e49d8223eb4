"""The explorer: one HTML file in which the pointer generates kernels."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from involution.generators import BottleneckGenerator
from involution.show.capture import Captured
from involution.show.subject import Subject

_TEMPLATE = files("involution.show") / "page.html"
_DATA = "null /* page.py puts the data here */"


def write_page(
    shown: Subject, captured: Mapping[str, Captured], mirror: Mapping[str, Tensor], told: str, path: Path
) -> None:
    """Write the page: it needs no network and no other file.

    It holds what the layers reduced their input to, and the spans that turn this into kernels, so a kernel is generated
    when it is looked at, from numbers of 16 bits.

    Args:
        shown: the network and image.
        captured: what every involution layer did with it.
        mirror: by layer, the kernels of the mirrored convolution that are shown beside, (G, k, k).
        told: what these are, for people.
        path: the file.

    Raises:
        ValueError: if a layer generates its kernels in a way that the page cannot show.
    """
    picture = io.BytesIO()
    shown.picture.save(picture, "PNG")
    data = {
        "image": f"data:image/png;base64,{_text(picture.getvalue())}",
        "width": shown.picture.width,
        "height": shown.picture.height,
        "weights": shown.weights,
        "mirror": told,
        "layers": [
            _layer(each, reduced, mirror[each.name])
            for each, reduced in zip(captured.values(), _reduced(shown, captured), strict=True)
        ],
    }
    page = _TEMPLATE.read_text().replace(_DATA, json.dumps(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def _reduced(shown: Subject, captured: Mapping[str, Captured]) -> list[Tensor]:
    """What the first convolution of every layer's generator gives, (R, H', W') each."""
    found: list[Tensor] = []
    with ExitStack() as undo, torch.inference_mode():
        for each in captured.values():
            reduce = _generator(each).reduce
            hook = reduce.register_forward_hook(lambda module, args, output: found.append(output[0]))
            undo.callback(hook.remove)
        shown.network(shown.x)
    return found


def _generator(captured: Captured) -> BottleneckGenerator:
    generator = captured.layer.generator
    if type(generator) is BottleneckGenerator:
        parts = (generator.norm, generator.act)
        if isinstance(parts[0], nn.BatchNorm2d) and isinstance(parts[1], nn.ReLU):
            return generator
    raise ValueError(
        f"the page shows layers whose kernel comes from a bottleneck with batch norm and ReLU; {captured.name} has "
        f"another generator: {generator}."
    )


def _layer(captured: Captured, reduced: Tensor, mirror: Tensor) -> dict[str, Any]:
    generator, window = _generator(captured), captured.layer.window
    norm: Any = generator.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    shares = captured.layer.channels // captured.layer.groups
    return {
        "name": captured.name,
        "channels": captured.layer.channels,
        "groups": captured.layer.groups,
        "kernel": window.kernel_size,
        "stride": window.stride,
        "padding": window.padding,
        "dilation": window.dilation,
        "input": captured.input.shape[2:],
        "output": captured.kernel.shape[4:],
        "hidden": len(reduced),
        "reduced": _numbers(reduced),
        "scale": _numbers(scale),
        "shift": _numbers(shift),
        "span": _numbers(generator.span.weight.flatten(1)),
        "bias": _numbers(cast(Tensor, generator.span.bias)),
        "x": _numbers(captured.input[0, ::shares]),  # the first channel of every group
        "mirror": _numbers(mirror),
        "mirrorKernel": mirror.shape[1:],
    }


def _numbers(values: Tensor) -> tuple[float, str]:
    """The largest magnitude, and the values as shares of it: 16-bit floats, little-endian, as base64."""
    values = values.detach().cpu()
    most = float(values.abs().max()) or 1.0
    return most, _text((values / most).half().contiguous().numpy().astype("<f2").tobytes())


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
