"""Detectors: sizes of images, targets of all kinds, frozen parts, and what is refused."""

import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from involution import Involution2d
from involution.models.detection import detector
from involution.models.detr import Detr
from involution.models.stages import Stages, build

SMALL = {"base_width": 16, "stem_width": 32}
FEW = {"channels": 32, "min_size": 64, "max_size": 128}
NAMES = ("retinanet", "faster_rcnn", "mask_rcnn", "detr")


def make(name: str, neck: str = "involution", head: str = "involution", **settings: object) -> nn.Module:
    stages = Stages(build("rednet26", SMALL), **settings)
    if name == "detr":
        return Detr(stages, 3, queries=12, width=32, layers=1, feedforward=32, heads=2, min_size=64, max_size=128)
    options = {"box_detections_per_img": 20} if name != "retinanet" else {"detections_per_img": 20}
    if name != "retinanet":
        options |= {"box_channels": 32, "box_batch_size_per_image": 16, "rpn_post_nms_top_n_train": 40}
        options |= {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20}
    return detector(name, stages, 3, neck, "convolution" if name == "retinanet" else head, **FEW, **options)


def target(height: int, width: int, count: int) -> dict[str, torch.Tensor]:
    corners = torch.rand(count, 2) * torch.tensor([width - 20.0, height - 20.0])
    boxes = torch.cat((corners, corners + 5 + 10 * torch.rand(count, 2)), 1)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return {"boxes": boxes, "labels": torch.randint(1, 4, (count,)), "masks": masks}


@pytest.mark.parametrize("name", NAMES)
def test_odd_sizes_no_objects_and_sixty_train_and_predict(name: str) -> None:
    model = make(name)
    sizes = ((61, 97), (64, 64), (50, 83))
    images = [torch.rand(3, *size) for size in sizes]
    targets = [target(*size, count) for size, count in zip(sizes, (2, 0, 60), strict=True)]
    if name == "detr":  # as many objects as it has queries
        targets[2] = target(*sizes[2], 12)
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        found = model.eval()(images)
    for each, (height, width) in zip(found, sizes, strict=True):
        assert len(each["boxes"]) == len(each["labels"]) == len(each["scores"])
        assert set(each["labels"].tolist()) <= {1, 2, 3}
        left, top, right, bottom = each["boxes"].unbind(1)
        assert (left >= 0).all()
        assert (top >= 0).all()
        assert (right <= width + 1e-3).all()
        assert (bottom <= height + 1e-3).all()
        if name == "mask_rcnn":
            assert each["masks"].shape[1:] == (1, height, width)


def test_the_image_of_an_odd_size_named_in_the_plan() -> None:
    model = make("faster_rcnn")
    model.transform.min_size, model.transform.max_size = (333,), 501
    image = torch.rand(3, 333, 501)
    losses = model.train()([image], [target(333, 501, 2)])
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        (found,) = model.eval()([image])
    assert found["boxes"].shape[1] == 4


@pytest.mark.parametrize(
    "name", ["faster_rcnn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mask_rcnn", "detr"))]
)
def test_an_object_is_learned_by_heart(name: str) -> None:
    model = make(name, "convolution", "convolution").train()
    image = torch.rand(3, 64, 64) * 0.2
    image[:, 10:40, 20:50] += 0.7
    truth = {"boxes": torch.tensor([[20.0, 10.0, 50.0, 40.0]]), "labels": torch.tensor([2])}
    truth["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
    truth["masks"][0, 10:40, 20:50] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = last = 0.0
    for step in range(40):
        losses = model([image, image], [truth, truth])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        first, last = (loss.item(), last) if step == 0 else (first, loss.item())
    assert last < 0.5 * first
    with torch.no_grad():
        (found,) = model.eval()([image])
    assert found["labels"][found["scores"].argmax()] == 2


@pytest.mark.slow
def test_detr_places_boxes_in_images_of_different_sizes() -> None:
    model = make("detr").train()
    images, targets = [], []
    for width, box, label in ((64, [20, 10, 50, 40], 2), (96, [60, 30, 90, 60], 1)):
        image = torch.rand(3, 64, width) * 0.2
        image[:, box[1] : box[3], box[0] : box[2]] += 0.7
        images.append(image)
        targets.append({"boxes": torch.tensor([box]).float(), "labels": torch.tensor([label])})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        loss = model(images, targets)["detr"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        for found, target in zip(model.eval()(images), targets, strict=True):
            best = found["scores"].argmax()
            assert found["labels"][best] == target["labels"][0]
            assert box_iou(found["boxes"][best][None], target["boxes"]) > 0.8


def test_where_involutions_sit() -> None:
    model = make("mask_rcnn")
    places = [name for name, layer in model.named_modules() if isinstance(layer, Involution2d)]
    outside = [name for name in places if "stages" not in name]
    assert outside == [
        *(f"backbone.fpn.layer_blocks.{level}.0" for level in range(4)),
        "rpn.head.conv.0.0",
        *(f"roi_heads.mask_head.{layer}.0" for layer in range(4)),
    ]
    assert all(model.get_submodule(name).window.kernel_size == (7, 7) for name in outside)


def test_a_retinanet_has_its_anchors_and_labels_from_one() -> None:
    model = make("retinanet")
    assert model.anchor_generator.sizes[0] == pytest.approx((32.0, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)))
    assert model.head.classification_head.num_classes == 3


def test_frozen_parts_stay_as_they_are() -> None:
    stages = Stages(build("rednet26", SMALL), frozen_stages=1, norm_eval=True)
    state = {key: value.clone() for key, value in stages.state_dict().items()}
    maps = stages(torch.rand(2, 3, 64, 64))
    sum(each.square().mean() for each in maps).backward()
    with torch.no_grad():
        for parameter in stages.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad.sign()
    changed = {key for key, value in stages.state_dict().items() if not torch.equal(value, state[key])}
    assert changed
    assert not any(key.startswith(("body.stem", "body.layer1")) or "running" in key for key in changed)
    moving = Stages(build("rednet26", SMALL), frozen_stages=1).eval().train()
    before = {key: value.clone() for key, value in moving.state_dict().items() if "running_mean" in key}
    moving(torch.rand(2, 3, 64, 64))
    still = {key for key, value in before.items() if torch.equal(value, moving.state_dict()[key])}
    assert still == {key for key in before if key.startswith(("body.stem", "body.layer1"))}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"name": "fastrcnn"}, "unknown detector 'fastrcnn'; did you mean 'faster_rcnn'"),
        ({"name": "retinanet", "head": "involution"}, "`head` must be 'convolution' for a RetinaNet"),
        ({"neck": "involutions"}, "`neck` must be 'convolution' or 'involution'; got 'involutions'"),
        ({"neck": "involution", "channels": 24}, "`neck` cannot be of involutions, as convolution .* divide"),
        ({"head": "involution", "channels": 24}, "`head` cannot be of involutions"),
        ({"box_chanels": 3}, "unknown setting of faster_rcnn 'box_chanels'; did you mean 'box_channels'"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], told: str) -> None:
    stages = Stages(build("rednet26", SMALL))
    with pytest.raises(ValueError, match=told):
        detector(**({"name": "faster_rcnn", "stages": stages, "num_classes": 3} | settings))


def test_backbones_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="`network` must have a stem and four stages"):
        Stages(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match="`frozen_stages` must be from 0 to 4; got 5"):
        Stages(build("rednet26", SMALL), frozen_stages=5)
