"""Pairs of digits: answers that no single digit tells, at the distance that was asked for."""

import pytest
import torch

from involution.data.pairs import Pairs


def test_half_of_the_pairs_are_the_same_digit_at_the_distance():
    pairs = Pairs(distance=40, digits=(1, 7, 3), train_pairs=60, validation_pairs=2, test_pairs=2)
    pairs.setup()
    images, same = pairs._pairs["train"].tensors
    assert images.shape == (60, 1, 32, 112)
    assert (images.min(), images.max()) == (0, 1)
    assert same.bincount().tolist() == [30, 30]
    inked = images.amax((1, 2)) > 0
    for columns in inked:
        left = int(columns.nonzero()[0])
        assert not columns[left + 16 : left + 38].any()  # a scan is narrower than its 16 pixels by a few
        assert columns[left + 38 :].any()


def test_all_digits_asked_for_are_there_in_like_numbers_whatever_the_answer():
    pairs = Pairs(distance=16, train_pairs=400, validation_pairs=0, test_pairs=0)
    pairs.setup()
    images, same = pairs._pairs["train"].tensors
    ink = [images[same == answer].mean().item() for answer in (0, 1)]
    assert ink[0] == pytest.approx(ink[1], rel=0.05)


def test_pairs_are_the_same_every_time_and_others_in_each_split():
    one, two = (Pairs(train_pairs=50, validation_pairs=50, test_pairs=50) for _ in range(2))
    one.setup(), two.setup()
    splits = [one._pairs[name].tensors[0] for name in ("train", "validation", "test")]
    for name, images in zip(("train", "validation", "test"), splits, strict=True):
        assert torch.equal(images, two._pairs[name].tensors[0])
    assert not torch.equal(splits[0], splits[1])
    assert not torch.equal(splits[1], splits[2])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"distance": 15}, "`distance` must be from 16, side by side, to 96 on a strip 112 wide; got 15"),
        ({"distance": 97}, "`distance` must be from 16"),
        ({"digits": (1, 1)}, r"`digits` must be two or more of 0 to 9; got \(1, 1\)"),
        ({"batch_size": 0}, "`batch_size` must be at least 1; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Pairs(**settings)
