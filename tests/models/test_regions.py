"""Anchors and regions, held to positions computed by hand."""

import torch
from torchvision.models.detection.image_list import ImageList

from involution.models.pyramid import P6P7
from involution.models.regions import Anchors, RoIAlign

STRIDES = (4, 8, 16, 32)


def test_anchors_are_not_rounded_and_keep_their_stride_where_sizes_were_rounded_up() -> None:
    anchors = Anchors([8], (32, 64))
    images = ImageList(torch.zeros(1, 3, 96, 160), [(96, 160)])
    (found,) = anchors(images, [torch.zeros(1, 8, 3, 5), torch.zeros(1, 8, 2, 3)])
    assert len(found) == 3 * (15 + 6)
    wide, square, high = found[:3]
    torch.testing.assert_close(square, torch.tensor([-128.0, -128, 128, 128]))
    torch.testing.assert_close(wide, torch.tensor([-128.0 * 2**0.5, -64 * 2**0.5, 128 * 2**0.5, 64 * 2**0.5]))
    torch.testing.assert_close(high, wide[[1, 0, 3, 2]])
    last = found[-2]  # the square one at row 1, column 2 of the coarser level
    torch.testing.assert_close((last[:2] + last[2:]) / 2, torch.tensor([128.0, 64.0]))


def test_a_region_is_read_where_it_lies_and_from_the_level_of_its_size() -> None:
    levels = {}
    for index, stride in enumerate(STRIDES):
        side = 1024 // stride
        centres = (torch.arange(side) + 0.5) * stride
        columns, rows = centres.expand(side, side), centres[:, None].expand(side, side)
        levels[str(index)] = torch.stack((columns, rows, torch.full_like(rows, index))).repeat(2, 1, 1, 1).double()
    corners = torch.tensor([[100.3, 200.8], [40.5, 300.1], [300.0, 100.0], [64.0, 70.0], [400.0, 410.0]]).double()
    sides = torch.tensor([[20.0, 30.0], [111.0, 112.0], [112.5, 112.5], [300.0, 250.0], [500.0, 460.0]]).double()
    boxes = torch.cat((corners, corners + sides), 1)
    found = RoIAlign(7, STRIDES)(levels, [boxes[:2], boxes[2:]], [(1024, 1024)] * 2)
    assert found[:, 2, 0, 0].tolist() == [0, 0, 1, 2, 3]
    bins = (torch.arange(7).double() + 0.5) / 7
    expected = corners[:, :, None] + sides[:, :, None] * bins
    torch.testing.assert_close(found[:, 0], expected[:, 0, None, :].expand(5, 7, 7), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[:, 1], expected[:, 1, :, None].expand(5, 7, 7), rtol=1e-12, atol=0)


def test_no_box_gives_no_region() -> None:
    levels = {str(index): torch.zeros(1, 5, 64 // stride, 64 // stride) for index, stride in enumerate(STRIDES)}
    assert RoIAlign(14, STRIDES)(levels, [torch.zeros(0, 4)], [(64, 64)]).shape == (0, 5, 14, 14)


def test_the_top_levels_come_from_the_last_stage_without_relu() -> None:
    top = P6P7(8, 8)
    stage, level = torch.randn(1, 8, 9, 7), torch.randn(1, 8, 9, 7)
    (first, p6, p7), names = top([level], [stage], ["2"])
    assert first is level
    assert names == ["2", "p6", "p7"]
    assert (p6 < 0).any()
    torch.testing.assert_close(p6, top.p6(stage))
    torch.testing.assert_close(p7, top.p7(p6))
