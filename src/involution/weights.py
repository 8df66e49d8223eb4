"""Checkpoints of the official code: read them safely, and load them into our networks."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TypeVar

import torch
from torch import Tensor, nn

from involution.models import official
from involution.models.rednet import RedNet

Value = TypeVar("Value")

_SHOWN = 3
STEM = "stem.conv1.weight"  # found in every RedNet, wherever it sits
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)  # int64: batches counted by norms


def load_official(path: str | PathLike[str], model: nn.Module) -> None:
    """Load a checkpoint of the official classification, detection or segmentation code into `model`.

    A RedNet takes the backbone and the classifier, and leaves the necks and heads of detection and segmentation alone;
    without classifier (`num_classes=0`) it leaves the checkpoint's classifier alone too. A detector of
    `involution.models.detection` or segmentor of `involution.models.segmentation` takes everything.

    Args:
        path: the file, as the official training wrote it.
        model: a RedNet, or what is built on one, of the same depth and widths; its weights are overwritten.

    Raises:
        ValueError: if the file cannot be read safely, or is the checkpoint of another model; `model` is then unchanged.

    Example:
        model = timm.create_model("rednet50", stem_kernel=7, num_classes=0)
        load_official("rednet50.pth", model)
    """
    fill(model, read(path), path)


def renamed(given: Mapping[str, Value], model: nn.Module) -> dict[str, Value]:
    """What `read` gave, under the names of `model`; a RedNet has none for necks and heads, and they are left out.

    Raises:
        ValueError: if `model` is no RedNet, and holds none.
    """
    if isinstance(model, RedNet):
        ours = official.backbone(given)
        return ours if model.num_classes else {key: each for key, each in ours.items() if not key.startswith("fc.")}
    for name in model.state_dict():
        if name.endswith(STEM):
            return official.whole(given, name.removesuffix(STEM))
    raise ValueError(f"`model` must be a RedNet, or hold one; got a {type(model).__name__}.")


def fill(model: nn.Module, given: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    """Load what `read` gave into `model`; see `load_official`. `path` is where it was read, for errors.

    A model on the meta device takes the tensors themselves.
    """
    expected, given = model.state_dict(), renamed(given, model)
    problem = mismatch(expected, given)
    if problem:
        raise ValueError(f"{path} does not fit the model: {problem}.{_repair(expected, given)}")
    broken = [key for key, value in given.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{path} holds values that are not finite, in {len(broken)} entries ({some(broken)}).")
    ours = {key: value.to(expected[key].dtype) for key, value in given.items()}
    ours |= {key: value.roll(1, 0) for key, value in ours.items() if key.startswith(official.BACKGROUND_LAST)}
    model.load_state_dict(ours, assign=all(value.is_meta for value in expected.values()))


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
            f"{path} holds values that are not dense or not real, in {len(strange)} entries ({some(strange)}): the "
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
        parts.append(f"{len(missing)} of {len(expected)} entries missing ({some(missing)})")
    if unknown:
        parts.append(f"{len(unknown)} unknown ({some(unknown)})")
    if misshapen:
        parts.append(f"{len(misshapen)} of another shape ({some(misshapen)})")
    return "; ".join(parts)


def some(names: list[str]) -> str:
    """The first few names, in a sentence."""
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
