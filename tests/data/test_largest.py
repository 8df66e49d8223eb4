"""Which digit is the largest: answers that follow from the scenes, and what is refused."""

from itertools import islice

import numpy as np
import pytest
import torch

from involution.data.largest import LargestDigit, Questions
from involution.data.scenes import Look, composed


def test_the_answer_is_the_digit_with_the_largest_box() -> None:
    look = Look(fewest=0, most=4, overlap=0.5)
    questions, asked = Questions("validation", 12, look, seed=3), 0
    for image, owner, labels in islice(composed("validation", look, 3), 100):
        rows, columns = np.indices(owner.shape)
        areas = [np.ptp(rows[owner == n]) + 1 for n in range(1, len(labels) + 1)]
        areas = [a * (np.ptp(columns[owner == n]) + 1) for n, a in enumerate(areas, 1)]
        rest = sorted(areas)[:-1]
        if not areas or (rest and max(areas) < 1.2 * rest[-1]):
            continue
        found, digit = questions[asked]
        assert digit == labels[int(np.argmax(areas))] - 1
        brightness = found * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        brightness += torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        torch.testing.assert_close((brightness * 255).round().byte().permute(1, 2, 0).numpy(), image)
        asked += 1
        if asked == len(questions):
            return
    pytest.fail("fewer questions than scenes that are clear")


def test_all_digits_are_asked_for() -> None:
    questions = Questions("train", 200, Look())
    assert {questions[index][1] for index in range(200)} == set(range(10))


def test_scenes_without_digits_have_no_answer() -> None:
    data = LargestDigit(Look(fewest=0, most=0), train_scenes=1)
    with pytest.raises(ValueError, match=r"`look.most` must be at least 1, .* got 0"):
        data.setup("fit")
