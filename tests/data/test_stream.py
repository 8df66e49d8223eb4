"""Images streamed from a data set of Hugging Face: shared out, shuffled, and gone on with from any batch."""

import io
from itertools import chain

import pytest
import torch
from PIL import Image

from involution.cli import main
from involution.data.imagenet import ImageNet
from involution.data.items import BadItemError

datasets = pytest.importorskip("datasets", reason="the streaming of data sets is optional")

LENGTHS = {"train": (7, 5, 6, 6), "validation": (3, 4)}
SMALL = {"workers": 0, "size": 16, "resize": 16}
PLAIN = datasets.Value("int64")
NAMED = datasets.ClassLabel(names=[str(number) for number in range(100)])


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (number, 128, 128)).save(file, "PNG")
    return file.getvalue()


def write(folder, label=NAMED, spoilt=()):
    """Files of a data set whose images are numbered throughout a split; their class is their number."""
    (folder / "data").mkdir(parents=True)
    for split, lengths in LENGTHS.items():
        number = 0
        for file, length in enumerate(lengths):
            numbers = list(range(number, number + length))
            images = [{"bytes": b"no image" if n in spoilt else picture(n), "path": None} for n in numbers]
            features = datasets.Features({"image": datasets.Image(), "label": label})
            part = datasets.Dataset.from_dict({"image": images, "label": numbers}, features=features)
            part.to_parquet(folder / "data" / f"{split}-{file:05}-of-{len(lengths):05}.parquet")
            number += length
    return f"hf:{folder}"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # five seconds at the end of each epoch
    datasets.disable_progress_bars()
    return write(tmp_path / "numbers")


def test_images_are_those_of_the_files(root):
    data = ImageNet(root, batch_size=4, **SMALL, train_images=24)
    data.setup()
    assert data.num_classes == 100
    met = [(image, number) for batch in data.val_dataloader() for image, number in zip(*batch, strict=True)]
    assert [int(number) for _, number in met] == list(range(7))
    for image, number in met:
        assert image.shape == (3, 16, 16)
        assert image[0].mean().item() * 0.229 + 0.485 == pytest.approx(int(number) / 255, abs=0.01)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])  # files are shared out evenly by two, and not by three
def test_processes_see_every_image_once_an_epoch_and_go_on_in_the_middle(root, on, ranks, workers, classes):
    epochs = {0: [], 1: []}
    for rank in range(ranks):
        on(rank, ranks)
        data = ImageNet(root, batch_size=2, **SMALL | {"workers": workers}, train_images=24)
        data.setup("fit")
        whole = data.train_dataloader()
        for epoch, met in epochs.items():
            batches = classes(whole, epoch)
            assert len(batches) == len(whole) == 12 // ranks
            met += chain.from_iterable(batches)
            again = ImageNet(root, batch_size=2, **SMALL, train_images=24)
            again.setup("fit")
            late = again.train_dataloader()
            late.load_state_dict({"epoch": epoch, "batches": 3})
            assert classes(late, epoch) == batches[3:]
    assert epochs[0] != epochs[1]
    for met in epochs.values():
        assert sorted(met) == list(range(24)) if ranks != 2 else 24 - 2 <= len(set(met)) <= 24


def test_measuring_on_three_processes_meets_every_image_once(root, on, classes):
    met = []
    for rank in range(3):
        on(rank, 3)
        met += classes(ImageNet(root, batch_size=2, **SMALL).val_dataloader(), flat=True)
    assert sorted(met) == list(range(7))


def test_an_epoch_may_be_longer_than_the_stream(root, classes):
    data = ImageNet(root, batch_size=10, **SMALL, train_images=60)
    data.setup("fit")
    met = classes(data.train_dataloader(), flat=True)
    assert len(met) == 60
    assert {met.count(number) for number in range(24)} == {2, 3}


def test_a_fit_on_a_stream_goes_on_from_any_step_to_the_same_weights(root):
    args = ["--config", "imagenet/rednet26", "--data.root", root, "--data.train_images=24", "--data.workers=0"]
    args += ["--model.options.num_classes=100", "--model.options.base_width=16", "--data.size=32", "--data.resize=32"]
    args += ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto", "--trainer.accelerator=cpu"]
    args += ["--data.batch_size=4", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--model.warmup=1"]
    assert main(["fit", *args, "--folder", "run", "--save_every=4", "--keep=9"]) == 0
    assert main(["fit", *args, "--folder", "other", "--ckpt_path", "run/checkpoints/step-8.ckpt"]) == 0
    one, other = (torch.load(f"{folder}/checkpoints/last.ckpt")["state_dict"] for folder in ("run", "other"))
    assert all(torch.equal(other[name], value) for name, value in one.items())


def test_what_is_bad_is_named_or_left_out(root, tmp_path, classes):
    spoilt = write(tmp_path / "spoilt", spoilt=(1,))
    data = ImageNet(spoilt, batch_size=2, **SMALL, train_images=24)
    with pytest.raises(BadItemError, match=r"image 1 of .*spoilt cannot be read as an image: .*--data.skip_bad true"):
        list(data.val_dataloader())
    data = ImageNet(spoilt, batch_size=2, **SMALL, train_images=24, skip_bad=True)
    assert classes(data.val_dataloader()) == [[0], [2, 3], [4, 5], [6]]
    assert data._sets["val"].skipped == 1


def test_settings_that_do_not_fit(root, tmp_path, on):
    def refused(told, root=root, **change):
        with pytest.raises(ValueError, match=told):
            ImageNet(root, **SMALL | change).load("train")

    refused("numbers does not tell how many images there are; give it by `--data.train_images`")
    plain = write(tmp_path / "plain", PLAIN)
    refused("plain does not tell how many classes there are; give it by `--data.num_classes`", root=plain)
    refused("`num_classes` must be 100, as in .*numbers, or left out; got 7", num_classes=7)
    refused("nowhere cannot be read as a data set of Hugging Face", root=f"hf:{tmp_path}/nowhere")
    data = ImageNet(plain, **SMALL, num_classes=3, train_images=24)
    with pytest.raises(BadItemError, match=r"image 3 of .*plain is of class 3; there are 3"):
        list(data.val_dataloader())
    on(0, 2)
    data = ImageNet(root, batch_size=13, **SMALL, train_images=24)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"`batch_size` must be at most 12, for 24 items .* of 2 process.*; got 13"):
        data.train_dataloader()
