import hashlib

import lightning.pytorch
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from involution.data import Digits
from involution.data.digits import _move, split

SPLIT = "d358b220eb362360506ca6f4a1212ad54f46fa8dac1fa0cee467e0f68433953e"


@pytest.fixture(scope="module")
def digits():
    data = Digits(size=16, batch_size=100)
    data.setup()
    return data


def _indices(seed):
    from sklearn.datasets import load_digits

    lightning.pytorch.seed_everything(seed, verbose=False)
    return [sorted(part) for part in split(load_digits().target)]


def test_the_split_is_the_same_whatever_the_seed():
    train, validation, test = _indices(seed=0)
    assert [train, validation, test] == _indices(seed=1)
    assert hashlib.sha256(repr((validation, test)).encode()).hexdigest() == SPLIT


def test_the_parts_cover_all_scans_and_do_not_overlap():
    train, validation, test = _indices(seed=0)
    assert (len(train), len(validation), len(test)) == (1100, 197, 500)
    assert sorted(train + validation + test) == list(range(1797))


def test_every_class_has_its_share_of_the_test(digits):
    assert all(48 <= count <= 52 for count in digits.test.tensors[1].bincount())


def test_batches(digits):
    images, classes = next(iter(digits.train_dataloader()))
    assert images.shape == (100, 1, 16, 16)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert classes.shape == (100,)
    assert len(digits.train_dataloader()) == 11
    assert sum(len(classes) for _, classes in digits.test_dataloader()) == 500


def _picture(scan, side):
    return Image.fromarray((255 - 255 / 16 * scan).round().astype("uint8")).resize((side, side), Image.NEAREST)


def test_pictures_become_what_the_scans_are(digits):
    scan = load_digits().images[3]  # its dark pixels fill eight rows, and lie in the middle
    found = digits.to_tensor(_picture(scan, 200).convert("RGB"))
    assert found.shape == (1, 16, 16)
    expected = F.interpolate(torch.tensor(scan / scan.max())[None, None], (16, 16), mode="bilinear")[0].float()
    assert torch.corrcoef(torch.stack((found.flatten(), expected.flatten())))[0, 1] > 0.99
    page = Image.new("L", (900, 500), "white")
    page.paste(_picture(scan, 200), (613, 17))
    assert torch.equal(digits.to_tensor(page), found)
    larger = digits.to_tensor(_picture(scan, 400))
    torch.testing.assert_close(larger, found, rtol=0, atol=0.02)
    assert digits.to_tensor(Image.new("RGB", (30, 41), "white")).count_nonzero() == 0


def test_training_images_come_in_a_new_order_every_epoch(digits):
    loader = digits.train_dataloader()
    first = next(iter(loader))[1]
    loader.sampler.set_epoch(1)  # as Lightning does
    assert not torch.equal(first, next(iter(loader))[1])


def test_images_are_moved_in_training_only(digits):
    scans = {tuple(image.flatten().tolist()) for image in (*digits.train.tensors[0], *digits.test.tensors[0])}
    for loader, known in ((digits.test_dataloader(), True), (digits.train_dataloader(), False)):
        assert all((tuple(image.flatten().tolist()) in scans) == known for image in next(iter(loader))[0])


def test_moving_by_nothing_changes_nothing(digits):
    images = digits.test.tensors[0][:5]
    torch.testing.assert_close(_move(images, 0, 0), images)


def test_moving_keeps_a_shift_within_its_limit():
    point = torch.zeros(50, 1, 17, 17)
    point[:, :, 8, 8] = 1
    moved = _move(point, 2 / 17, 0)  # at most one pixel
    assert moved[:, :, 7:10, 7:10].sum((1, 2, 3)).allclose(torch.ones(50), atol=1e-5)
    assert not torch.equal(moved[0], moved[1])


@pytest.mark.parametrize(("setting", "value"), [("size", 7), ("batch_size", 0), ("max_shift", -1), ("max_turn", -1)])
def test_settings_out_of_range_name_themselves(setting, value):
    with pytest.raises(ValueError, match=rf"`{setting}` must be at least \d; got {value}"):
        Digits(**{setting: value})
