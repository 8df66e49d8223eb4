"""Images in tar files: every one once an epoch on any number of processes and workers, from any batch on."""

import io
import json
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import pytest
import torch
from PIL import Image

from involution.data.imagenet import ImageNet
from involution.data.items import BadItemError
from involution.data.order import Order
from involution.data.shards import Shards, members

LENGTHS = {"train": (7, 5, 6, 6), "val": (3, 4)}  # images of each shard
SMALL = {"workers": 0, "size": 16, "resize": 16, "num_classes": 100}


def picture(number, kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (number, 128, 128)).save(file, kind)
    return file.getvalue()


def write(path, files):
    """A tar file of files by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of shards whose images are numbered throughout a split; their class is their number."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "imagenet"
    info = {"splits": {}}
    for split, lengths in LENGTHS.items():
        number, names = 0, []
        for shard, length in enumerate(lengths):
            files = {}
            for _ in range(length):
                told = {".json": json.dumps({"label": number}).encode()} if number % 2 else {".cls": b"%d" % number}
                image = {".png": picture(number, "PNG")} if number % 3 else {".jpg": picture(number)}
                files |= {f"./{number:04}{extension}": content for extension, content in (image | told).items()}
                number += 1
            names.append(f"in-{split}-{shard}.tar")
            write(folder / names[-1], files)
        called = {"train": "train", "val": "validation"}[split]
        info["splits"][called] = {"filenames": names, "shard_lengths": lengths}
    (folder / "_info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("listed", [True, False])
def test_images_are_those_of_the_files(root, listed):
    if not listed:
        (root / "_info.json").unlink()
    data = ImageNet(str(root), batch_size=4, **SMALL)
    data.setup()
    assert data.num_classes == 100
    items = data._sets["val"]
    assert [items[index][1] for index in range(len(items))] == list(range(7))
    deviation, mean = 0.229, 0.485
    for index in range(7):
        image, number = items[index]
        assert image.shape == (3, 16, 16)
        assert image[0].mean().item() * deviation + mean == pytest.approx(number / 255, abs=0.015)
    assert [batch[1].tolist() for batch in data.val_dataloader()] == [[0, 1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_see_every_image_once_an_epoch_and_go_on_in_the_middle(root, on, workers, classes):
    epochs = {0: [], 1: []}
    for rank in range(2):
        on(rank, 2)
        data = ImageNet(str(root), batch_size=3, **SMALL | {"workers": workers})
        data.setup("fit")
        whole = data.train_dataloader()
        for epoch, met in epochs.items():
            batches = classes(whole, epoch)
            assert len(batches) == len(whole) == 4
            met += chain.from_iterable(batches)
            again = ImageNet(str(root), batch_size=3, **SMALL)  # with any number of workers
            again.setup("fit")
            late = again.train_dataloader()
            late.load_state_dict({"epoch": epoch, "batches": 2})
            assert classes(late, epoch) == batches[2:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]


def test_measuring_on_three_processes_meets_every_image_once(root, on, classes):
    met = []
    for rank in range(3):
        on(rank, 3)
        met += classes(ImageNet(str(root), batch_size=2, **SMALL).val_dataloader(), flat=True)
    assert sorted(met) == list(range(7))


def test_reading_goes_file_by_file(on):
    files = [100] * 50
    for rank in range(2):
        on(rank, 2)
        order = [index // 100 for index, _ in Order(5000, 10, train=True, files=files)]
        assert len(set(order)) <= 26
        for start in range(0, 2500, 400):  # images of four files, and of two more where windows and files do not agree
            assert len(set(order[start : start + 400])) <= 6
    on(0, 1)
    order = [index for index, _ in Order(5000, 10, train=True, files=files)]
    assert sorted(order) == list(range(5000))
    assert max(len({index // 100 for index in order[start : start + 40]}) for start in range(0, 5000, 40)) >= 3


def test_shards_behind_an_address_are_copied_once(root, tmp_path, classes):
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    server = ThreadingHTTPServer(("localhost", 0), partial(Handler, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://localhost:{server.server_port}"
        data = ImageNet(address, batch_size=2, **SMALL | {"workers": 2}, cache=str(tmp_path / "cache"))
        data.setup("fit")
        for epoch in range(2):
            assert sorted(classes(data.train_dataloader(), epoch, flat=True)) == list(range(24))
        assert sorted(path for path in asked if path.endswith(".tar")) == [f"/in-train-{n}.tar" for n in range(4)]
        assert not list((tmp_path / "cache").rglob("*.part"))
        (root / "_info.json").unlink()
        with pytest.raises(ValueError, match=r"there is no http://localhost:[0-9]+/_info.json, which must list"):
            ImageNet(address, **SMALL, cache=str(tmp_path / "cache"))
    finally:
        server.shutdown()
        server.server_close()


def test_what_is_bad_is_named_or_left_out(root, tmp_path, classes):
    write(
        root / "in-train-1.tar",
        {f"{n}.jpg": picture(n)[:-300] for n in range(5)} | {f"{n}.cls": b"7" for n in range(5)},
    )
    data = ImageNet(str(root), batch_size=1, **SMALL)
    with pytest.raises(
        BadItemError, match=r"in-train-1.tar: 0.jpg cannot be read as an image: .*`--data.skip_bad true`"
    ):
        data.load("train")[7]
    whole = (root / "in-train-0.tar").read_bytes()
    (root / "in-train-0.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadItemError, match=r"in-train-0.tar cannot be read as a tar file: it is cut off"):
        data.load("train")[0]
    data = ImageNet(str(root), batch_size=2, **SMALL, skip_bad=True)
    data.setup("fit")
    met = classes(data.train_dataloader(), flat=True)
    assert len(met) == 24
    assert set(met) == set(range(12, 24))
    assert data._sets["train"].skipped >= 12


def test_a_damaged_shard_is_read_once_and_its_items_replaced_from_others(root, monkeypatch):
    whole = (root / "in-train-2.tar").read_bytes()
    (root / "in-train-2.tar").write_bytes(whole[: len(whole) // 2])
    read = []
    monkeypatch.setattr("involution.data.shards.members", lambda path: (read.append(path.name), members(path))[1])
    items = ImageNet(str(root), **SMALL, skip_bad=True).load("train")
    found = [items[index][1] for index in range(12, 18)]
    assert len(set(found)) == 6
    assert not set(found) & set(range(12, 18))
    assert items.skipped == 6
    assert read.count("in-train-2.tar") == 1


def test_names_of_splits_are_words_and_folders_of_classes_are_no_shards(root, tmp_path):
    (root / "_info.json").unlink()
    for path in root.glob("*train*.tar"):
        path.rename(root / f"retrieval-{path.name}")
    assert len(ImageNet(str(root), **SMALL)._sets["val"]) == 7
    for split in ("train", "val"):
        (tmp_path / "folders" / split / "n01").mkdir(parents=True)
        (tmp_path / "folders" / split / "n01" / "a.jpg").write_bytes(picture(1))
    write(tmp_path / "folders" / "ILSVRC2012_img_val.tar", {"a.jpg": picture(1)})  # as it was downloaded
    data = ImageNet(str(tmp_path / "folders"), workers=0)
    assert data.classes == ("n01",)


def test_a_class_file_counts_before_other_facts(tmp_path):
    write(
        tmp_path / "train.tar", {"a.json": b'{"author": 1}', "a.jpg": b"", "a.cls": b"3", "b.png": b"", "b.cls": b"4"}
    )
    assert [member.number for member in members(tmp_path / "train.tar")] == [3, 4]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a.jpg": b""}, r"a.jpg has no a.cls beside it, nor .json"),
        ({"a.jpg": b"", "a.cls": b"cat"}, r"a.cls does not tell a class: JSONDecodeError"),
        ({"a.jpg": b"", "a.json": b"{}"}, r"a.json does not tell a class: KeyError\('label'\)"),
    ],
)
def test_images_without_a_class_are_refused(tmp_path, files, told):
    write(tmp_path / "train.tar", files)
    with pytest.raises(BadItemError, match=rf"train.tar: {told}"):
        members(tmp_path / "train.tar")


def test_settings_that_do_not_fit(root):
    def refused(told, **change):
        with pytest.raises(ValueError, match=told):
            ImageNet(**{"root": str(root), **SMALL, **change})

    refused("shards do not tell how many classes there are; give it by `--data.num_classes`", num_classes=0)
    refused("`num_classes` must be at least 0; got -1", num_classes=-1)
    items = Shards(str(root), "val", lambda image: torch.zeros(1), 3, Path("cache"))
    with pytest.raises(BadItemError, match=r"in-val-1.tar: ./0003.jpg is of class 3; `num_classes` is 3"):
        items[3]
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["train"]["shard_lengths"] = [8, 5, 6, 6]
    (root / "_info.json").write_text(json.dumps(info))
    with pytest.raises(BadItemError, match=r"in-train-0.tar holds 7 images; _info.json tells of 8"):
        ImageNet(str(root), **SMALL).load("train")[0]
    info["splits"]["train"]["shard_lengths"] = [8]
    (root / "_info.json").write_text(json.dumps(info))
    refused(r"_info.json does not describe shards as timm's data sets do: .*other numbers of `filenames`")
    del info["splits"]["train"], info["splits"]["validation"]
    (root / "_info.json").write_text(json.dumps(info))
    refused(r"_info.json has no split validation or val; it has ")
    (root / "_info.json").unlink()
    for path in root.glob("*val*.tar"):
        path.unlink()
    refused(
        r"there are no shards of val in .*imagenet: no tar file with validation or val in its name, and no _info.json"
    )
    refused("`root` s3://bucket/images cannot be read: Install s3fs", root="s3://bucket/images")
    refused("`root` what://bucket cannot be read: ", root="what://bucket")
