"""Checkpoints of the official code: read them safely, load them into our RedNets, and write ours under their names."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from os import PathLike

import timm
import torch
from torch import Tensor

from involution.models.rednet import BLOCKS, OFFICIAL_NAMES, RedNet, checkpoint_filter_fn

_SHOWN = 3
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)  # int64: batches counted by norms
_INVOLUTIONS = ("layer1.0.conv2", "stem.conv2")  # the first of the blocks, and that of the stem


def load_official(path: str | PathLike[str], model: RedNet) -> None:
    """Load a checkpoint of the official classification, detection or segmentation code into `model`.

    Every entry of the backbone and the classifier is loaded; the necks and heads of detection and segmentation, which
    a RedNet does not have, are left alone. A model without classifier (`num_classes=0`) leaves the checkpoint's
    classifier alone too.

    Args:
        path: the file, as the official training wrote it.
        model: a RedNet of the same depth and widths, whose parameters and buffers are overwritten.

    Raises:
        ValueError: if the file cannot be read safely, or is the checkpoint of another model; `model` is then unchanged.

    Example:
        model = timm.create_model("rednet50", stem_kernel=7, num_classes=0)
        load_official("rednet50.pth", model)
    """
    _load(checkpoint_filter_fn(read(path)), str(path), model)


def _load(given: dict[str, Tensor], path: str, model: RedNet) -> None:
    expected = model.state_dict()
    if model.num_classes == 0:
        given = {key: value for key, value in given.items() if not key.startswith("fc.")}
    problem = mismatch(expected, given)
    if problem:
        raise ValueError(f"{path} does not fit the model: {problem}.{_repair(expected, given)}")
    broken = [key for key, value in given.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{path} holds values that are not finite, in {len(broken)} entries ({_some(broken)}).")
    model.load_state_dict(given)


def rednet_of(state_dict: Mapping[str, Tensor], path: str | PathLike[str]) -> RedNet:
    """The RedNet of an official state dict, with its weights: depth, widths, kernel sizes, classes told from shapes.

    Args:
        state_dict: what `read` gives.
        path: where it was read, for errors.

    Raises:
        ValueError: if no RedNet has its blocks or shapes.
    """
    state = checkpoint_filter_fn(dict(state_dict))
    blocks = {key.rsplit(".", 2)[0] for key in state if key.endswith(".conv3.weight") and key.startswith("layer")}
    layers = tuple(sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in (1, 2, 3, 4))
    depths = [depth for depth, of in BLOCKS.items() if of == layers]
    if not depths:
        known = ", ".join(f"{depth} {of}" for depth, of in BLOCKS.items())
        raise ValueError(f"{path} has {layers} blocks in its stages, which no RedNet has. There is: {known}.")
    axes = {"layer1.0.conv1.weight": 4, "stem.conv3.weight": 4}
    for place in _INVOLUTIONS:
        axes |= {f"{place}.generator.span.bias": 1, f"{place}.generator.reduce.weight": 4}
    missing = [key for key in axes if key not in state]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} entries that every RedNet has ({_some(missing)}).")
    if "fc.weight" in state:
        axes["fc.weight"] = 2
    for key, dimensions in axes.items():
        shape = tuple(state[key].shape)
        if len(shape) != dimensions or 0 in shape:
            raise ValueError(f"{path} is of no RedNet: {key} must have {dimensions} axes, none empty; it is {shape}.")
    settings = {
        "num_classes": len(state["fc.weight"]) if "fc.weight" in state else 0,
        "base_width": len(state["layer1.0.conv1.weight"]),
        "stem_width": len(state["stem.conv3.weight"]),
    }
    for setting, place in zip(("kernel_size", "stem_kernel"), _INVOLUTIONS, strict=True):
        bias, reduce = (state[f"{place}.generator.{part}"] for part in ("span.bias", "reduce.weight"))
        settings[setting] = isqrt(4 * len(bias) // len(reduce))  # 16 channels a group, reduced by 4
    try:
        model: RedNet = timm.create_model(f"rednet{depths[0]}", **settings)
    except ValueError as error:
        told = ", ".join(f"{name} {value}" for name, value in settings.items())
        raise ValueError(f"{path} is of no RedNet: its shapes tell {told}, and {error}") from error
    _load(state, str(path), model)
    return model


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a RedNet under the names of the official classification code, in its order."""
    renamed = {}
    for key, value in state_dict.items():
        for official, ours in OFFICIAL_NAMES:
            key = key.replace(ours, official)
        renamed[("head." if key.startswith("fc.") else "backbone.") + key] = value
    return renamed


def read(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a torch checkpoint, bare or under "state_dict", on the CPU; nothing in the file is executed.

    Raises:
        ValueError: if the file is no checkpoint, or holds more than tensors and plain values.
    """
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or malicious file can make the parser raise anything
            raise ValueError(
                f"{path} cannot be read safely: it is no torch checkpoint, or holds more than tensors and plain values."
            ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{path} holds no state dict, neither bare nor under the key 'state_dict'.")
    strange = [key for key, value in state.items() if value.layout != torch.strided or value.dtype not in _DTYPES]
    if strange:
        value = state[strange[0]]
        raise ValueError(
            f"{path} holds values that are not dense or not real, in {len(strange)} entries ({_some(strange)}): the "
            f"first has layout {value.layout} and dtype {value.dtype}."
        )
    return state


def mismatch(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What keeps the state dict `given` from filling the state dict `expected`, in words; empty if nothing does.

    Example:
        >>> mismatch({"a": torch.ones(2), "b": torch.ones(3)}, {"b": torch.ones(4), "c": torch.ones(5)})
        '1 of 2 entries missing (a); 1 unknown (c); 1 of another shape (b is (4,), not (3,))'
    """
    missing = [key for key in expected if key not in given]
    unknown = [key for key in given if key not in expected]
    misshapen = [
        f"{key} is {tuple(given[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in given and given[key].shape != value.shape
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(expected)} entries missing ({_some(missing)})")
    if unknown:
        parts.append(f"{len(unknown)} unknown ({_some(unknown)})")
    if misshapen:
        parts.append(f"{len(misshapen)} of another shape ({_some(misshapen)})")
    return "; ".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _repair(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    stem, head = "stem.conv2.generator.span.bias", "fc.weight"
    if head in expected and head not in given:
        return " It holds no classifier: build the model with `num_classes=0`, and reset_classifier after loading."
    if stem in expected and stem in given and expected[stem].shape != given[stem].shape:
        return (
            " The stem's involution is 3x3 in the official classification code, 7x7 in the others: see `stem_kernel`."
        )
    return ""
