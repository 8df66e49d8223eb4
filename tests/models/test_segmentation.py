"""Segmentors: their maps, their auxiliary head, and what is refused."""

import pytest
import torch

from involution import Involution2d
from involution.models.segmentation import segmentor
from involution.models.stages import Stages, build

SMALL = {"base_width": 16, "stem_width": 32}


def make(name: str, **settings: object) -> torch.nn.Module:
    return segmentor(name, Stages(build("rednet26", SMALL)), 5, channels=32, **settings)


@pytest.mark.parametrize("name", ["semantic_fpn", "upernet"])
@pytest.mark.parametrize("neck", ["convolution", "involution"])
@pytest.mark.parametrize("size", [(64, 64), (61, 97)])
def test_maps_have_the_size_of_the_image(name: str, neck: str, size: tuple[int, int]) -> None:
    model = make(name, neck=neck)
    x = torch.rand(2, 3, *size)
    logits = model.train()(x)
    assert set(logits) == ({"out", "aux"} if name == "upernet" else {"out"})
    sum(each.square().mean() for each in logits.values()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "fc" not in name)
    with torch.no_grad():
        assert {key: each.shape for key, each in model.eval()(x).items()} == {"out": (2, 5, *size)}


def test_the_neck_alone_has_the_involutions() -> None:
    for name, place, count in (("semantic_fpn", "pyramid.fpn.layer_blocks", 4), ("upernet", "head.fpn_convs", 3)):
        found = [key for key, layer in make(name, neck="involution").named_modules() if isinstance(layer, Involution2d)]
        assert sum(key.startswith(place) for key in found) == count
        assert all(key.startswith(place) or "stages" in key for key in found)


def test_every_level_reaches_the_map() -> None:
    model = make("semantic_fpn").eval()
    levels = model.pyramid(torch.rand(1, 3, 64, 64))
    for index, (level, each) in enumerate(zip(model.levels, levels.values(), strict=True)):
        assert level(each).shape[2:] == (16, 16)
        assert len(level) == {0: 3, 1: 4, 2: 8, 3: 12}[index]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"name": "upernett"}, "unknown segmentor 'upernett'; did you mean 'upernet'"),
        ({"name": "semantic_fpn", "neck": "conv"}, "`neck` must be 'convolution' or 'involution'; got 'conv'"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(**settings)
