"""What the official code computes, reproduced: see golden/README.md for how its numbers were made."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import involution.models  # noqa: F401  # registers the RedNets with timm
from involution import Involution2d
from involution.models.official import to_official
from involution.models.rednet import RedNet, checkpoint_filter_fn
from involution.weights import load_official

GOLDEN = Path(__file__).parent / "golden"
LAYERS = sorted(GOLDEN.glob("module_*.safetensors"))


def slim_rednet(**kwargs: int) -> RedNet:
    return timm.create_model("rednet26", base_width=16, stem_width=32, **kwargs).double().eval()


def ours(official: str) -> str:
    """The name in our layer of an official layer's parameter."""
    renamed = checkpoint_filter_fn({f"layer1.0.conv2.{official}": torch.empty(0)})
    return next(iter(renamed)).removeprefix("layer1.0.conv2.")


def assert_rounding(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of sums in float64, relative to the largest entry."""
    assert actual.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13 * max(1.0, expected.abs().max().item()))


def test_all_layers_are_here() -> None:
    assert len(LAYERS) == 5


@pytest.mark.parametrize("path", LAYERS, ids=lambda path: path.stem)
def test_layer(path: Path) -> None:
    channels, kernel_size, stride, mode = re.fullmatch(r"module_c(\d+)_k(\d)_s(\d)_(\w+)", path.stem).groups()
    case = load_file(path)
    layer = Involution2d(int(channels), int(kernel_size), int(stride)).double().train(mode == "train")
    layer.load_state_dict({ours(k.removeprefix("param.")): v for k, v in case.items() if k.startswith("param.")})
    x = case["input"].double().requires_grad_()
    y = layer(x)
    y.backward(case["grad_output"])
    assert_rounding(y, case["output"])
    assert_rounding(x.grad, case["grad_input"])
    gradients = {ours(k.removeprefix("grad.")): v for k, v in case.items() if k.startswith("grad.")}
    assert gradients.keys() == dict(layer.named_parameters()).keys()
    for name, parameter in layer.named_parameters():
        assert_rounding(parameter.grad, gradients[name])


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("cls", {"num_classes": 10, "stem_kernel": 3}), ("det", {"num_classes": 0, "stem_kernel": 7})],
)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_network(name: str, kwargs: dict[str, int], dtype: torch.dtype, error: float) -> None:
    model, expected = slim_rednet(**kwargs), load_file(GOLDEN / f"rednet26_slim_{name}_expected.safetensors")
    load_official(GOLDEN / f"rednet26_slim_{name}.pth", model)
    model.to(dtype)
    with torch.no_grad():
        last, stages = model.forward_intermediates(expected["input"].to(dtype), indices=4)
        head = model.forward_head(last)
    actual = {f"stage{index}": stage for index, stage in enumerate(stages, start=1)}
    if name == "cls":
        actual["logits"] = head
    assert actual.keys() == expected.keys() - {"input"}
    for key, value in actual.items():
        torch.testing.assert_close(
            value.double(), expected[key], rtol=0, atol=error, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_every_official_key_of_rednet50() -> None:
    with torch.device("meta"):
        state = timm.create_model("rednet50").state_dict()
    assert [[key, list(value.shape)] for key, value in to_official(state).items()] == json.loads(
        (GOLDEN / "rednet50_keys.json").read_text()
    )
