"""What segmentation measures."""

import pytest
import torch

from involution.tasks.segmentation import Segmentation


def test_shares_are_of_all_pixels_of_all_batches_where_something_is_known() -> None:
    task = Segmentation(
        classes=("road", "car", "sky", "moon"), arch="rednet26", options={"base_width": 16}, channels=32
    )
    told: dict[str, float] = {}
    task.log = lambda name, value, **_: told.__setitem__(name, float(value))
    maps = iter(([0, 0, 1, 1, 2, 0], [0, 1, 1, 1, 2, 2]))  # found
    task.forward = lambda images: [torch.tensor([next(maps)])]
    for shown in ([0, 0, 0, 1, 255, 0], [0, 0, 1, 1, 255, 255]):
        task.measure("test", ([torch.zeros(3, 1, 6)], [{"map": torch.tensor([shown])}]))
    task.measure("test", ([], []))  # a batch of nothing but bad items
    task.conclude("test")
    assert told["test/IoU/road"] == pytest.approx(4 / 6)
    assert told["test/IoU/car"] == pytest.approx(3 / 5)
    assert told["test/IoU/sky"] != told["test/IoU/sky"]  # neither shown nor, where it counts, found
    assert told["test/mIoU"] == pytest.approx((4 / 6 + 3 / 5) / 2)
    assert int(task._counts("test").confmat.sum()) == 0
