"""Scenes of digits: the same everywhere, their targets right, and what is refused."""

import hashlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.ops import masks_to_boxes

from involution.data.digits import split
from involution.data.scenes import DigitScenes, Look, Scenes, compose


def test_a_seed_gives_the_same_scenes_on_every_machine() -> None:
    digest = hashlib.sha256()
    for image, target in (Scenes("train", 5, Look())[index] for index in range(5)):
        digest.update((image * 255).round().byte().numpy().tobytes())
        digest.update(target["map"].numpy().tobytes())
    assert digest.hexdigest() == "da586d348ad96a29341b0810f224e8800761e06ecbfa6e281ad71efcbce6fd3d"
    first, other = (Scenes("train", 1, Look(), seed)[0][0] for seed in (0, 1))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("look", [Look(), Look(height=61, width=97, most=4), Look(overlap=0.8, fewest=4)])
def test_targets_agree_with_one_another(look: Look) -> None:
    scenes = Scenes("test", 12, look)
    assert len(scenes) == 12
    for image, target in (scenes[index] for index in range(12)):
        assert image.shape == (3, look.height, look.width)
        assert image.min() >= 0
        assert image.max() <= 1
        labels, masks = target["labels"], target["masks"]
        assert len(labels) == len(masks) <= look.most
        assert (masks.sum(0) <= 1).all()
        assert torch.equal(target["map"], (masks * labels[:, None, None]).sum(0))
        if len(labels):
            corners = masks_to_boxes(masks)
            corners[:, 2:] += 1
            assert torch.equal(target["boxes"], corners)
            assert set(labels.tolist()) <= set(range(1, 11))


def test_no_source_digit_is_in_two_splits(monkeypatch) -> None:
    seen = {}

    def watch(random, scans, classes, look):
        seen.setdefault(len(scans), {scan.tobytes() for scan in scans})
        return compose(random, scans, classes, look)

    monkeypatch.setattr("involution.data.scenes.compose", watch)
    for name in ("train", "validation", "test"):
        Scenes(name, 1, Look())
    parts = split(load_digits().target)
    assert sorted(seen) == sorted(map(len, parts))
    assert len(set.union(*map(set, parts))) == sum(map(len, parts))


def test_many_digits_and_none() -> None:
    crowd = Look(height=300, width=400, fewest=60, most=60, smallest=16, largest=24)
    assert len(Scenes("train", 1, crowd)[0][1]["labels"]) == 60
    _, target = Scenes("train", 1, Look(fewest=0, most=0))[0]
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 128, 128)
    assert not target["map"].any()


def test_the_front_digit_hides_the_one_behind() -> None:
    scans = load_digits()
    image, owner, labels = compose(
        np.random.RandomState(3), scans.images, scans.target, Look(overlap=1.0, fewest=6, most=6, clutter=0)
    )
    assert image.dtype == owner.dtype == np.uint8
    assert sorted(set(owner.flatten())) == list(range(len(labels) + 1))


def test_batches_are_lists() -> None:
    data = DigitScenes(Look(height=64, width=64, smallest=16, largest=24), 5, 2, 3, batch_size=2)
    data.setup()
    assert len(data.train_dataloader()) == 2
    images, targets = next(iter(data.val_dataloader()))
    assert [image.shape for image in images] == [(3, 64, 64)] * 2
    assert len(targets) == 2
    assert sum(len(batch) for batch, _ in data.test_dataloader()) == 3
    assert DigitScenes.map_classes[1:] == DigitScenes.classes


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"fewest": 3, "most": 2}, "`most` must be at least `fewest`, 3; got 2"),
        ({"largest": 200}, "`largest` must be from `smallest`, 20, to 128; got 200"),
        ({"smallest": 4}, "`smallest` must be at least 8; got 4"),
        ({"overlap": 1.5}, "`overlap` must be from 0 to 1; got 1.5"),
    ],
)
def test_looks_that_cannot_be(settings, told) -> None:
    with pytest.raises(ValueError, match=told):
        Look(**settings)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got 0"):
        DigitScenes(batch_size=0)
    with pytest.raises(ValueError, match="`split_name` must be one of train, validation, test; got 'val'"):
        Scenes("val", 1, Look())
