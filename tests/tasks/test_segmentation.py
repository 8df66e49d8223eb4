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


def test_images_may_be_seen_larger() -> None:
    torch.manual_seed(0)
    settings = {"classes": ("no", "yes"), "arch": "rednet26", "options": {"base_width": 16}, "channels": 32}
    plain, scaled = (Segmentation(**settings, scale=scale).eval() for scale in (1.0, 1.5))
    scaled.load_state_dict(plain.state_dict())
    images = [torch.rand(3, 41, 60), torch.rand(3, 33, 47)]
    seen: list[tuple[int, ...]] = []
    scaled.net.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    with torch.no_grad():
        assert [tuple(found.shape) for found in scaled(images)] == [(41, 60), (33, 47)]
        large = torch.nn.functional.interpolate(torch.stack([images[0]]), size=(62, 90), mode="bilinear")[0]
        found = torch.nn.functional.interpolate(plain._logits([large])["out"], size=(41, 60), mode="bilinear")
        torch.testing.assert_close(scaled._logits(images[:1])["out"], found, rtol=1e-4, atol=1e-4)
    assert seen == [(62, 90), (62, 90)]
    with pytest.raises(ValueError, match="`scale` must be above 0; got 0"):
        Segmentation(**settings, scale=0)
