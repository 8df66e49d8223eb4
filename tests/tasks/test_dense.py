"""Detection and segmentation from the command line: fits, tests, predictions, and every packaged recipe."""

import json
import math
from pathlib import Path

import pytest
import yaml
from PIL import Image

from involution.cli import main
from involution.data.items import BadItemError
from involution.tasks.detection import Detection
from involution.tasks.segmentation import Segmentation
from involution.tasks.task import learning_rate

RECIPES = Path(__file__).parents[2] / "src" / "involution" / "recipes"
TINY = [
    *("--data.train_scenes", "4", "--data.validation_scenes", "2", "--data.test_scenes", "2", "--data.batch_size", "2"),
    *("--data.look.height", "64", "--data.look.width", "64", "--data.look.smallest", "16", "--data.look.largest", "32"),
    *("--model.options.base_width", "16", "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"),
    *("--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"),
]


@pytest.fixture(autouse=True)
def _at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def size(path):
    with Image.open(path) as image:
        return image.size


def test_a_detector_is_fitted_tested_and_predicts(tmp_path, capsys):
    small = ["--model.detector_options.min_size", "64", "--model.detector_options.max_size", "64"]
    assert main(["fit", "--config", "scenes/mask_rcnn", *TINY, *small]) == 0
    checkpoint = "runs/scenes/mask_rcnn/checkpoints/last.ckpt"
    assert "runs/scenes/mask_rcnn/checkpoints" in capsys.readouterr().out
    assert main(["test", "--ckpt_path", checkpoint]) == 0
    told = capsys.readouterr().out
    assert "test/AP50" in told
    assert "test/mask_AP" in told
    (tmp_path / "photographs").mkdir()
    for name, sides in (("odd.png", (97, 61)), ("other.jpg", (64, 64))):
        Image.effect_noise(sides, 50).convert("RGB").save(tmp_path / "photographs" / name)
    assert main(["predict", "--ckpt_path", checkpoint, "--images", "photographs", "--least", "0"]) == 0
    folder = Path("runs/scenes/mask_rcnn/predictions")
    assert capsys.readouterr().out.splitlines()[-1] == f"2 pictures and predictions.json in {folder}"
    assert size(folder / "odd.png") == (4 * 97, 4 * 61)
    found = json.loads((folder / "predictions.json").read_text())
    assert {entry["image_id"] for entry in found} <= {"odd", "other"}
    for entry in found:
        assert set(entry) == {"image_id", "category_id", "bbox", "score", "segmentation"}
        assert 1 <= entry["category_id"] <= 10
    (tmp_path / "photographs" / "truncated.png").write_bytes(b"no image")  # the last of its folder
    assert main(["predict", "--ckpt_path", checkpoint, "--images", "photographs"]) == 2
    assert "truncated.png cannot be read as an image" in capsys.readouterr().err.splitlines()[-1]
    assert isinstance(json.loads((folder.with_name("predictions-2") / "predictions.json").read_text()), list)
    (tmp_path / "photographs" / "truncated.png").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    for images, told in (
        (["nowhere"], "`images` must be paths of images or folders; there is no nowhere."),
        (["empty"], "`images` must hold images; there is none in empty."),
        (["photographs/odd.png", "photographs"], "`images` must differ in their names; got two of odd."),
        (["broken.png"], "broken.png cannot be read as an image"),
    ):
        assert main(["predict", "--ckpt_path", checkpoint, "--images", *images]) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_bad_item_ends_a_fit_with_one_line(capsys, monkeypatch):
    def read(self, index):
        raise BadItemError("scene 3 is bad.")

    monkeypatch.setattr("involution.data.scenes.Scenes.__getitem__", read)
    assert main(["fit", "--config", "scenes/semantic_fpn", *TINY]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "involution: scene 3 is bad."


def test_the_help_is_that_of_the_task(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "coco/retinanet", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--model.frozen_stages FROZEN_STAGES stages of the backbone that are not trained" in text
    assert "--data.skip_bad" in text
    assert "--model.lr LR largest learning rate" in text


def test_a_segmentor_and_its_mirror_are_compared_and_predict(capsys, monkeypatch):
    monkeypatch.setattr("involution.tasks.report._SECONDS", 0.5)
    assert main(["compare", "--config", "scenes/semantic_fpn", *TINY]) == 0
    told = capsys.readouterr().out
    assert "| test mIoU |" in told
    run = Path("runs/scenes/semantic_fpn")
    assert (run / "curves.png").stat().st_size > 10_000
    rows = (run / "results.csv").read_text().splitlines()
    assert rows[0].startswith("recipe,model,parameters,macs,ms,ms_in_batch,batch,mIoU,minutes,")
    assert rows[1].startswith("scenes/semantic_fpn,rednet26,")
    assert rows[2].startswith("scenes/semantic_fpn,resnet26 (mirror),")
    assert main(["predict", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    (entry, _) = json.loads((run / "predictions" / "predictions.json").read_text())
    assert sum(entry["pixels"].values()) == 64 * 64
    assert set(entry["pixels"]) <= {"background", *"0123456789"}
    assert size(run / "predictions" / entry["map"]) == (64, 64)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--task", "detecton"], "unknown task 'detecton'; did you mean 'detection'"),
        (["--config", "junk.yaml"], "junk.yaml is no YAML file"),
        (["--dataset", "scene"], "unknown dataset 'scene'; did you mean 'scenes'"),
        (["--task", "detection"], "`dataset` digits has nothing for `task` detection; choose another."),
        (["--dataset", "scenes"], "`dataset` scenes has no classes of images; choose another."),
        (["--config", "coco/faster_rcnn"], "there is no annotation file data/coco/annotations/instances_val2017.json."),
        (["--config", "scenes/detr", "--model.neck", "involution"], "`neck` must be 'convolution' for detr"),
        (
            ["--config", "scenes/faster_rcnn", "--model.detector_options.chanels", "3"],
            "unknown setting of faster_rcnn 'chanels'; did you mean 'channels'",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(args, told, capsys, tmp_path):
    (tmp_path / "junk.yaml").write_text("a: [")
    assert main(["fit", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.parametrize("path", sorted(RECIPES.glob("c*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_published_recipes_build_what_they_say(path):
    recipe = yaml.safe_load(path.read_text())
    task, classes = {"detection": (Detection, 80), "segmentation": (Segmentation, 19)}[recipe["task"]]
    model = task(classes=[str(number) for number in range(classes)], **recipe["model"])
    assert model.name == "rednet50"
    assert model.hparams["lr"] == recipe["model"]["lr"]
    trained = sum(p.numel() for p in model.net.parameters() if p.requires_grad)
    published = {
        "faster_rcnn": 31_598_464,
        "faster_rcnn_neck": 29_508_032,
        "faster_rcnn_neck_head": 28_985_424,
        "mask_rcnn": 34_241_744,
        "mask_rcnn_neck": 32_151_312,
        "mask_rcnn_neck_head": 29_538_272,
        "retinanet": 27_814_100,
        "retinanet_neck": 26_246_276,
        "semantic_fpn": 18_463_169,
        "semantic_fpn_neck": 16_372_737,
        "upernet": 56_379_780 + 720,  # the stem of K 7
    }
    assert trained == published[path.stem]


@pytest.mark.parametrize("step", [0, 1, 1564, 3129, 3130, 3756, 40690, 81379])
def test_the_published_schedule_of_imagenet(step):
    """mmcv's formula: a cosine of the epoch, times what is left of the warm-up of 3130 iterations from a quarter."""
    epoch = step // 626
    expected = 0.5 * 0.8 * (1 + math.cos(math.pi * epoch / 130))
    if step < 3130:
        expected *= 1 - (1 - step / 3130) * (1 - 0.25)
    recipe = yaml.safe_load((RECIPES / "imagenet" / "rednet50.yaml").read_text())["model"]
    share = learning_rate(130 * 626, recipe["schedule"], recipe["warmup"], recipe["warmup_from"], (), 0.0, epochs=130)
    assert recipe["lr"] * share(step) == pytest.approx(expected, rel=1e-3)


def test_schedules():
    poly = learning_rate(100, "poly", 0, 0.0, (), 0.01)
    assert [poly(0), poly(100)] == [1.0, 0.01]
    assert poly(50) == pytest.approx(0.01 + 0.99 * 0.5**0.9)
    warm = learning_rate(1000, "step", 500, 0.001, (0.75,), 0.0)
    assert warm(0) == pytest.approx(0.001 + 0.999 / 500)
    assert warm(499) == 1.0
    assert [warm(749), warm(750)] == [1.0, 0.1]
    cosine = learning_rate(10, "cosine", 0.2, 0.0, (), 0.5)
    assert [cosine(0), cosine(1)] == [0.5, 1.0]
    assert cosine(6) == pytest.approx(0.75)
    assert cosine(10) == pytest.approx(0.5)
