"""Cityscapes' files, read in their real layout; and every way they can be bad."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from involution.data.cityscapes import Cityscapes, CityscapesItems
from involution.data.items import BadItemError

ROAD, SKY, PARKING = 7, 23, 9


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two cities; road below, sky above, some parking; the image is red where there is road."""
    for split in ("train", "val"):
        for city in ("aachen", "bochum"):
            images, targets = (tmp_path / kind / split / city for kind in ("leftImg8bit", "gtFine"))
            labels = np.full((64, 128), SKY, np.uint8)
            labels[32:] = ROAD
            labels[40:, 100:] = PARKING
            image = np.zeros((64, 128, 3), np.uint8)
            image[labels == ROAD] = (255, 0, 0)
            for folder, content, kind in ((images, image, "leftImg8bit"), (targets, labels, "gtFine_labelIds")):
                folder.mkdir(parents=True)
                Image.fromarray(content).save(folder / f"{city}_000000_000019_{kind}.png")
    return tmp_path


def test_maps_hold_the_scored_classes(root: Path) -> None:
    data = CityscapesItems(root, "val")
    assert len(data) == 2
    image, target = data[0]
    assert image.shape == (3, 64, 128)
    classes = target["map"]
    assert classes.dtype == torch.int64
    assert sorted(classes.unique().tolist()) == [0, 10, 255]
    assert torch.equal(classes == 0, image[0] == 1)
    assert (classes[40:, 100:] == 255).all()
    assert len(Cityscapes.map_classes) == 19
    assert Cityscapes.map_classes[0] == "road"
    assert Cityscapes.map_classes[18] == "bicycle"


def test_training_crops_and_keeps_image_and_map_together(root: Path) -> None:
    data = CityscapesItems(root, "train")
    data._distort = torch.nn.Identity()  # else the colours tell nothing
    for _ in range(6):
        image, target = data[0]
        assert image.shape == (3, 512, 1024)
        assert target["map"].shape == (512, 1024)
        agree = (image[0] > 0.5) == (target["map"] == 0)
        assert agree.float().mean() > 0.99  # edges are resampled differently
        assert (target["map"] == 255).any()  # what was filled up


def test_the_module_loads_both_splits(root: Path) -> None:
    data = Cityscapes(root, batch_size=2, workers=0)
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert len(images) == 2
    assert sum(len(images) for images, _ in data.test_dataloader()) == 2


def test_bad_files_are_named(root: Path) -> None:
    target = root / "gtFine" / "val" / "aachen" / "aachen_000000_000019_gtFine_labelIds.png"
    for content, told in (
        (np.zeros((10, 20), np.uint8), r"labelIds\.png has 20 x 10 pixels, its image aachen.* has 128 x 64"),
        (np.full((64, 128), 77, np.uint8), r"labelIds\.png holds the unknown label 77"),
    ):
        Image.fromarray(content).save(target)
        with pytest.raises(BadItemError, match=told):
            CityscapesItems(root, "val")[0]
    skipping = CityscapesItems(root, "val", skip_bad=True)
    assert skipping[0] is None
    assert skipping[1] is not None
    assert skipping.skipped == 1
    target.unlink()
    with pytest.raises(BadItemError, match=r"there is no image .*labelIds\.png"):
        CityscapesItems(root, "val")[0]
    with pytest.raises(ValueError, match=r"there are no images .*leftImg8bit/train/CITY"):
        CityscapesItems(root / "nowhere", "train")
