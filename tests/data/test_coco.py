"""COCO's files, read in their real layout; and every way they can be bad."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from involution.data.coco import Coco, CocoItems
from involution.data.items import BadItemError, lists
from involution.data.order import DataError


def annotation(number: int, image: int, box: list[float], category: int = 18, **more: object) -> dict[str, object]:
    left, top, width, height = box
    outline = [left, top, left + width, top, left + width, top + height, left, top + height]
    return {
        **{"id": number, "image_id": image, "category_id": category, "bbox": box, "area": width * height},
        **{"iscrowd": 0, "segmentation": [outline]} | more,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images: one with two dogs and a crowd, one empty, one with a cat."""
    sizes = {7: (40, 30), 8: (20, 20), 9: (31, 17)}
    crowd = {"iscrowd": 1, "segmentation": {"size": [30, 40], "counts": [600, 300, 300]}}
    content = {
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "width": w, "height": h} for n, (w, h) in sizes.items()],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
        "annotations": [
            annotation(1, 7, [2, 3, 10, 20]),
            annotation(2, 7, [20.5, 5, 19.9, 8]),
            annotation(3, 7, [20, 0, 10, 30], **crowd),
            annotation(4, 9, [0, 0, 31, 17], category=17),
            annotation(5, 9, [3, 3, 0.2, 5]),
        ],
    }
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        for number, size in sizes.items():
            Image.effect_noise(size, 50).convert("RGB").save(tmp_path / f"{split}2017" / f"{number:012d}.jpg")
    return tmp_path


def items(root: Path, **settings: bool) -> CocoItems:
    return CocoItems(root / "val2017", root / "annotations" / "instances_val2017.json", **settings)


def change(root: Path, index: int, **values: object) -> None:
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][index] |= values
    path.write_text(json.dumps(content))


def test_boxes_labels_and_masks(root: Path) -> None:
    data = items(root)
    assert data.classes == ("cat", "dog")
    assert data.category_ids == (17, 18)
    image, target = data[0]
    assert image.shape == (3, 30, 40)
    assert target["boxes"].tolist() == [[2, 3, 12, 23], [20.5, 5, 40, 13], [20, 0, 30, 30]]
    assert target["labels"].tolist() == [2, 2, 2]
    assert target["iscrowd"].tolist() == [0, 0, 1]
    assert target["masks"][0].sum() == 200
    assert target["masks"][0, 3:23, 2:12].all()
    assert target["masks"][2].sum() == 300
    assert data[1][1]["boxes"].shape == (0, 4)
    assert data[1][1]["masks"].shape == (0, 20, 20)
    assert data[2][1]["labels"].tolist() == [1]  # the sliver is left out


def test_training_leaves_out_crowds_and_empty_images_and_flips(root: Path) -> None:
    data = items(root, train=True)
    assert len(data) == 2
    torch.manual_seed(0)
    seen = {tuple(data[0][1]["boxes"][0].tolist()): data[0] for _ in range(20)}
    boxes = {tuple(data[0][1]["boxes"][0].tolist()) for _ in range(20)}
    assert boxes == {(2, 3, 12, 23), (28, 3, 38, 23)}
    for image, target in seen.values():
        left, top, right, bottom = target["boxes"][0].int().tolist()
        assert len(target["labels"]) == 2
        assert image.shape == (3, 30, 40)
        assert target["masks"][0, top:bottom, left:right].all()


def test_the_module_loads_both_splits(root: Path) -> None:
    data = Coco(root, batch_size=2, workers=0)
    data.setup("fit")
    assert data.classes == ("cat", "dog")
    images, targets = next(iter(data.train_dataloader()))
    assert len(images) == len(targets) == 2
    assert sum(len(images) for images, _ in data.val_dataloader()) == 3


@pytest.mark.parametrize(
    ("index", "values", "told"),
    [
        (
            0,
            {"bbox": [30, 3, 20, 20]},
            r"annotation 1 of image 7 in .*val2017\.json has the box .*, outside its image of",
        ),
        (0, {"category_id": 99}, "annotation 1 of image 7 in .* has the unknown category 99"),
        (
            0,
            {"segmentation": {"size": [10, 10], "counts": [50, 50]}},
            "annotation 1 of image 7 in .* has a mask of .* its image is",
        ),
        (0, {"segmentation": [[1, 2]]}, "annotation 1 of image 7 in .* has a mask that cannot be read"),
    ],
)
def test_bad_annotations_are_named_or_skipped(root: Path, index: int, values: dict[str, object], told: str) -> None:
    change(root, index, **values)
    with pytest.raises(BadItemError, match=told):
        items(root)[0]
    data = items(root, skip_bad=True)
    assert len(lists([data[number] for number in range(3)])[0]) == 2
    assert data.skipped == 1


@pytest.mark.parametrize("name", ["bbox", "area"])
def test_annotations_that_lack_something_are_named(root: Path, name: str) -> None:
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    del content["annotations"][0][name]
    path.write_text(json.dumps(content))
    for train in (False, True):
        with pytest.raises(BadItemError, match=rf"annotation 1 of image 7 in .* has no `{name}`\."):
            items(root, train=train)[0]


def test_no_objects_to_train_on(root: Path) -> None:
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    assert len(items(root)) == 3
    with pytest.raises(DataError, match=r"no image in .*instances_val2017\.json has an object to train on\."):
        items(root, train=True)


def test_training_batches_stay_full(root: Path) -> None:
    (root / "val2017" / "000000000007.jpg").write_bytes(b"no image")
    data = items(root, train=True, skip_bad=True)
    assert [data[index][1]["image_id"].item() for index in range(2)] == [9, 9]
    assert data.skipped == 1
    with pytest.raises(BadItemError):
        items(root, train=True)[0]


def test_bad_images_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "val2017" / "000000000007.jpg").write_bytes(b"no image")
    (root / "val2017" / "000000000008.jpg").unlink()
    with pytest.raises(BadItemError, match=r"000000000007\.jpg cannot be read as an image: cannot identify"):
        items(root)[0]
    with pytest.raises(BadItemError, match=r"there is no image .*000000000008\.jpg"):
        items(root)[1]
    data = Coco(root, workers=0, skip_bad=True)
    data.setup("test")
    assert sum(len(images) for images, _ in data.test_dataloader()) == 1
    data.teardown("test")
    assert capsys.readouterr().out == "skipped 2 bad items of val\n"


def test_bad_annotation_files_are_named(root: Path) -> None:
    file = root / "annotations" / "instances_val2017.json"
    file.write_text("{}")
    with pytest.raises(
        ValueError, match=r"instances_val2017\.json is no annotation file of COCO's format: it has no cat"
    ):
        Coco(root)
    file.write_text("junk")
    with pytest.raises(ValueError, match=r"instances_val2017\.json is no annotation file of COCO's format"):
        Coco(root)
    shutil.rmtree(root / "annotations")
    with pytest.raises(ValueError, match=r"there is no annotation file .*instances_val2017\.json"):
        Coco(root)
