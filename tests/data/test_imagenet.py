"""Images in a folder for each class: what is read, what is refused, and the published recipes."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from involution.cli import main
from involution.data.imagenet import ImageNet
from involution.data.items import BadItemError
from involution.tasks.classification import Classification

RECIPES = Path(__file__).parents[2] / "src" / "involution" / "recipes" / "imagenet"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes, four images each to train on and three to measure with, of many kinds."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 4), ("val", 3)):
        for number, name in enumerate(("n01 tench", "n02 größe")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                sides = ((80, 50), (31, 64), (1, 1), (40, 40))[index]
                picture = Image.effect_noise(sides, 40 + 40 * number).convert("RGB")
                picture.save(folder / f"{index}.JPEG")
    return tmp_path


def test_images_of_all_kinds_are_read(root: Path) -> None:
    folder = root / "train" / "n01 tench"
    Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(folder / "cmyk.jpg")
    Image.fromarray(np.full((30, 40), 0x8000, np.uint16)).save(folder / "grey16.png")
    Image.new("LA", (40, 30), (200, 10)).save(folder / "grey_alpha.png")
    Image.new("RGB", (20_000, 4), (10, 20, 30)).save(folder / "wide.png")
    data = ImageNet(root, batch_size=4, workers=0, size=32, resize=40)
    data.setup()
    assert data.classes == ("n01 tench", "n02 größe")
    assert data.num_classes == 2
    items = data.load("train")
    assert len(items) == 12
    found = {Path(items._samples[index][0]).name: items[index] for index in range(12)}
    assert all(image.shape == (3, 32, 32) and image.isfinite().all() for image, _ in found.values())
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for name, colour in (("grey16.png", (0.5, 0.5, 0.5)), ("cmyk.jpg", (1.0, 0.0, 0.0))):
        image = found[name][0].mean((1, 2)) * deviation + mean
        torch.testing.assert_close(image, torch.tensor(colour), rtol=0, atol=0.02)
    images, classes = next(iter(data.val_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert classes.tolist() == [0, 0, 0, 1]


def test_the_centre_is_measured(root: Path) -> None:
    picture = np.zeros((80, 160, 3), np.uint8)
    picture[20:60, 60:100] = 255
    for path in (root / "val" / "n01 tench").iterdir():
        path.unlink()
    Image.fromarray(picture).save(root / "val" / "n01 tench" / "square.png")
    image, _ = ImageNet(root, workers=0, size=20, resize=40).load("val")[0]
    assert image.shape == (3, 20, 20)
    assert image[:, 2:-2, 2:-2].min() > 2  # white, normalised


def test_what_is_bad_is_named_or_left_out(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (root / "train" / "n01 tench" / "0.JPEG").read_bytes()
    (root / "train" / "n01 tench" / "0.JPEG").write_bytes(whole[: len(whole) // 2])
    (root / "val" / "n02 größe" / "text.jpg").write_text("no image")
    for split in ("train", "val"):
        (root / split / "n03 empty").mkdir()
    data = ImageNet(root, batch_size=2, workers=0, size=32, resize=40)
    assert data.num_classes == 3
    with pytest.raises(BadItemError, match=r"0.JPEG cannot be read as an image: .* `--data.skip_bad true`"):
        data.load("train")[0]
    data = ImageNet(root, batch_size=1, workers=0, size=32, resize=40, skip_bad=True)
    data.setup()
    assert [len(classes) for _, classes in data.val_dataloader()] == [1] * 6 + [0]
    assert sum(len(classes) for _, classes in data.train_dataloader()) == 8
    data.teardown("fit")
    assert capsys.readouterr().out == "skipped 1 bad items of val\nskipped 1 bad items of train\n"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"root": Path("nowhere")}, "there is no folder nowhere/val; it must hold a folder of images for each class"),
        ({"root": Path("flat")}, "flat/val must hold a folder of images for each class"),
        ({"root": Path("bare")}, "no folder in bare/val holds an image that ends in .jpg"),
        ({"size": 300}, "`size` must be from 1 to `resize`, 256; got 300"),
        ({"scale": (0.5, 0.2)}, "`scale` must be two shares of an image, the smaller first; got"),
        ({"erase": 2.0}, "`erase` must be a share from 0 to 1; got 2.0"),
        ({"workers": -1}, "`workers` must be at least 0; got -1"),
    ],
)
def test_settings_that_do_not_fit(root: Path, change: dict[str, object], told: str) -> None:
    Path("flat/val").mkdir(parents=True)
    Path("bare/val/class").mkdir(parents=True)
    with pytest.raises(ValueError, match=told):
        ImageNet(**({"root": root} | change))


def test_classes_that_are_in_one_part_alone_are_refused(root: Path) -> None:
    (root / "train" / "n03").mkdir()
    with pytest.raises(ValueError, match=r"the classes of train in .* are not those of val: n03 is in one"):
        ImageNet(root).load("train")


def test_the_published_recipe_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model.options.num_classes=2", "--model.options.base_width=16", "--data.size=32", "--data.resize=40"]
    small += ["--data.batch_size=4", "--data.workers=0", "--data.root=.", "--trainer.max_epochs=2"]
    small += ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto", "--trainer.accelerator=cpu"]
    small += ["--trainer.log_every_n_steps=1", "--model.warmup=2"]
    assert main(["fit", "--config", "imagenet/rednet26", *small]) == 0
    with Path("runs/imagenet/rednet26/metrics.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file) if row["lr"]]
    scaled = 0.8 * 4 / 2048
    assert rates == pytest.approx([scaled * share for share in (0.25, 0.625, 0.5, 0.5)])
    assert main(["test", "--ckpt_path", "runs/imagenet/rednet26/checkpoints/last.ckpt"]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    predict = ["predict", "--ckpt_path", "runs/imagenet/rednet26/checkpoints/last.ckpt", "--images", "val/n01 tench"]
    assert main(predict) == 0
    told = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"2  n0\d \w+ [\d.]+%  n0\d \w+ [\d.]+%", told[-2])
    assert told[-1] == "3 images in predictions.json in runs/imagenet/rednet26/predictions"
    assert main([*predict[:3], "--data.skip_bad", "true"]) == 2
    assert "`data.skip_bad` would leave out images" in capsys.readouterr().err
    assert main([*predict, "--data.skip_bad", "true"]) == 0  # which is of no concern to pictures
    args = ["fit", "--config", "imagenet/rednet26", *small, "--model.options.num_classes=3"]
    assert main(args) == 2
    assert "`model.options.num_classes` must be 2, as in the data; got 3." in capsys.readouterr().err


def test_the_modern_recipe_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(type(net).__name__))
    small = ["--model.options.num_classes=2", "--model.options.base_width=16", "--data.size=32", "--data.resize=40"]
    small += ["--data.batch_size=4", "--data.workers=0", "--data.root=.", "--trainer.max_epochs=2"]
    small += [
        "--trainer.devices=1",
        "--trainer.strategy=auto",
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
    ]
    assert main(["fit", "--config", "imagenet/rednet50_modern", *small]) == 0
    assert compiled == ["RedNet"]
    last = "runs/imagenet/rednet50_modern/checkpoints/last.ckpt"
    kept = torch.load(last)
    now, averaged = kept["current_model_state"], kept["state_dict"]
    assert any(not torch.equal(value, averaged[key]) for key, value in now.items() if key in averaged)
    assert main(["test", "--ckpt_path", last]) == 0


def test_mixing_gives_soft_targets_of_both_images() -> None:
    task = Classification("rednet26", {"num_classes": 3, "base_width": 16}, mixup=1.0, label_smoothing=0.0)
    seen: list[torch.Tensor] = []
    task.forward = lambda images: seen.append(images) or torch.zeros(len(images), 3, requires_grad=True)
    task.log = lambda *args, **kwargs: None
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    np.random.seed(0)
    loss = task.training_step((images, torch.tensor([0, 2])), 0)
    assert loss.item() == pytest.approx(np.log(3))  # of any target that sums to one
    first, second = seen[0][:, 0, 0, 0].tolist()
    assert first + second == pytest.approx(1)
    assert min(first, second) > 0
    assert images.unique().tolist() == [0, 1]
    task.measure("validation", (images, torch.tensor([0, 2])))
    assert torch.equal(seen[1], images)
    with pytest.raises(ValueError, match=r"`mixup` and `cutmix` need an even `data.batch_size`; got 1"):
        task.training_step((images[:1], torch.tensor([0])), 0)
    with pytest.raises(ValueError, match="`cutmix` must be at least 0; got -1"):
        Classification("rednet26", {"num_classes": 3}, cutmix=-1)


@pytest.mark.parametrize("depth", [26, 38, 50, 101, 152])
def test_published_recipes_are_those_of_the_paper(depth: int) -> None:
    recipe = yaml.safe_load((RECIPES / f"rednet{depth}.yaml").read_text())
    trainer, data = recipe["trainer"], recipe["data"]
    assert data["batch_size"] * trainer["devices"] * trainer["num_nodes"] == recipe["model"]["lr_batch"] == 2048
    assert trainer["max_epochs"] * recipe["model"]["warmup"] == pytest.approx(5, rel=1e-5)
    with torch.device("meta"):
        task = Classification(**recipe["model"])
    assert task.name == f"rednet{depth}"

    class Stub:
        estimated_stepping_batches, max_epochs, world_size, accumulate_grad_batches = 130 * 625, 130, 8, 2
        datamodule = type("Data", (), {"batch_size": 32})

    task._trainer = Stub()
    optimizer = task.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups  # one decay for everything
    assert len(group["params"]) == len(list(task.net.parameters()))
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)
    assert group["initial_lr"] == pytest.approx(0.8 * 32 * 8 * 2 / 2048)
