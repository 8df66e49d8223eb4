import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from involution.cli import main
from involution.tasks.classification import Classification

TINY = [
    *("--model.options.base_width", "16", "--data.size", "16", "--data.batch_size", "32"),
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.limit_test_batches", "1", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which one tiny comparison has run."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["compare", *TINY]) == 0
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def mistake(capsys, *args):
    """The one line on stderr that a command line is refused with."""
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_help_lists_commands_and_recipes(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("compare", "fit", "validate", "test", "predict", "digits"):
        assert word in text


def test_the_help_of_a_command_explains_its_settings(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "--model.arch ARCH name of the network in timm",
        "--data.batch_size BATCH_SIZE images in a training step",
        "--trainer.max_epochs",
        "--ckpt_path",
        "--folder FOLDER Where a fit keeps its files",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["fitt"], "unknown command 'fitt'; did you mean 'fit'?"),
        (["fit", "--config", "digit"], "unknown recipe 'digit'; did you mean 'digits'? `involution --help` lists all"),
        (["fit", "--config=nowhere/mine.yaml"], "unknown recipe 'nowhere/mine.yaml'."),
        (["fit", "--model.archh", "x"], "unknown setting 'model.archh'; did you mean 'model.arch'?"),
        (["fit", "--model.lr", "fast"], "`model.lr` must be a number; got fast."),
        (["table", "coko"], "`name` must be one of imagenet, ablation, coco, cityscapes; got coko."),
        (["fit", "--data.size", "4"], "`size` must be at least 8; got 4."),
        (["compare", "--model.arch", "resnet50"], "`compare` needs a RedNet as `model.arch`, such as rednet26"),
        (["test", "--ckpt_path", "nowhere.ckpt"], "`ckpt_path` must be the path of a checkpoint; there is no file now"),
        (["test"], "give --ckpt_path, the checkpoint to test, such as runs/digits/checkpoints/best.ckpt."),
        (["validate"], "give --ckpt_path, the checkpoint to validate, such as"),
        (["predict"], "give --ckpt_path, the checkpoint to predict, such as"),
        (["fit", "--model.options.in_chans", "3"], "`model.options.in_chans` must be 1, as in the data; got 3."),
        (["fit", "--model.options.num_classes", "5"], "`model.options.num_classes` must be 10, as in the data; got 5."),
        (["fit", "--model.options.base_widht", "16"], "'base_widht'; did you mean 'base_width'?"),
        (["compare", "--trainer.logger", "false"], "leave out `trainer.logger`."),
        (["compare", "--trainer.fast_dev_run", "true"], "`trainer.fast_dev_run` does not write; leave it out."),
    ],
)
def test_a_mistake_is_told_in_one_line(args, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert told in mistake(capsys, *args)


def test_missing_packages_are_named_with_the_repair(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "involution.tasks.commands")
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    assert "training needs more packages: pip install 'involution[train]'" in mistake(capsys, "fit")


def test_the_networks_name_the_package_they_miss(monkeypatch):
    for name in ("involution.models", "involution.models.rednet"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"the networks need timm: pip install 'involution\[models\]'"):
        importlib.import_module("involution.models")


def test_an_error_inside_a_run_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Classification, "training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["fit", *TINY])


@pytest.mark.parametrize("moment", ["_prepare", "_with_recipe"])
def test_ctrl_c_before_anything_runs(monkeypatch, capsys, moment):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"involution.cli.{moment}", interrupted)
    assert main(["fit", *TINY]) == 130
    assert capsys.readouterr().err == "involution: ended by SIGINT; a fit goes on by `--ckpt_path last`.\n"


def test_a_wrong_key_in_a_file_is_named(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model:\n  archh: rednet26\n")
    assert "unknown setting 'model.archh'; did you mean 'model.arch'?" in mistake(capsys, "fit", "-c", str(recipe))


def test_a_comparison_leaves_its_table_and_files(at_home):
    run = Path("runs/digits")
    head, _, rednet, resnet = (run / "table.md").read_text().splitlines()
    assert re.fullmatch(
        r"\| model +\| parameters \| MACs / image \| latency +\| in batches of \d+ \| +fit \| test accuracy \|", head
    )
    numbers = r"\| +[\d.]+ M \| +[\d.]+ ms \| +[\d.]+ ms \| +\d+ s \| +[\d.]+% \|"
    assert re.fullmatch(rf"\| rednet26 +\| +0\.47 M {numbers}", rednet)
    assert re.fullmatch(rf"\| resnet26 \(mirror\) +\| +0\.74 M {numbers}", resnet)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    for fit in (run, run / "mirror"):
        assert {path.name for path in (fit / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
        assert {"config.yaml", "metrics.csv"} <= {path.name for path in fit.iterdir()}


def test_a_checkpoint_is_tested_with_the_settings_of_its_run(at_home, capsys):
    assert main(["test", "--ckpt_path", "runs/digits/checkpoints/best.ckpt"]) == 0
    assert "test/accuracy" in capsys.readouterr().out


def test_predicting_writes_the_likeliest_classes(at_home, capsys):
    checkpoint = "--ckpt_path=runs/digits/checkpoints/best.ckpt"
    assert main(["predict", checkpoint]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "500 images in predictions.json in runs/digits/predictions"
    entries = json.loads(Path("runs/digits/predictions/predictions.json").read_text())
    assert [entry["image"] for entry in entries] == [f"{place:05d}" for place in range(500)]
    for entry in entries:
        scores = [found["probability"] for found in entry["classes"]]
        assert len(scores) == 5
        assert {found["class"] for found in entry["classes"]} <= set("0123456789")
        assert scores == sorted(scores, reverse=True)
    for name in ("one", "seven"):
        Image.new("RGB", (30, 41), "white").save(f"{name}.png")
    assert main(["predict", checkpoint, "--images", "seven.png", "one.png"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["seven", "one"]
    assert lines[0].count("%") == 5
    assert last == "2 images in predictions.json in runs/digits/predictions-2"
    shared = ["--trainer.devices", "2", "--trainer.num_nodes", "3", "--trainer.strategy", "ddp"]  # of a recipe
    assert main(["predict", checkpoint, "--images", "seven.png", *shared, "--trainer.accelerator", "cpu"]) == 0
    assert capsys.readouterr().out.endswith("1 images in predictions.json in runs/digits/predictions-3\n")


def test_a_fit_resumes_in_a_folder_of_its_own(at_home, capsys):
    assert main(["fit", "--ckpt_path", "runs/digits/checkpoints/last.ckpt", "--trainer.max_epochs", "2"]) == 0
    assert "epoch 2 of 2, 0:00:00 left: " in capsys.readouterr().out
    first, second = (torch.load(f"runs/{name}/checkpoints/last.ckpt") for name in ("digits", "digits-2"))
    assert (first["global_step"], second["global_step"]) == (2, 4)


def test_a_checkpoint_opens_in_python(at_home):
    module = Classification.load_from_checkpoint("runs/digits/mirror/checkpoints/last.ckpt", map_location="cpu")
    assert module.name == "resnet26 (mirror)"


def test_the_checkpoint_of_another_network_is_refused(at_home, capsys):
    checkpoint = "runs/digits/mirror/checkpoints/last.ckpt"
    line = mistake(capsys, "test", "--config", "digits", "--ckpt_path", checkpoint)
    assert re.search(r"another network than rednet26 .* \d+ of \d+ entries missing \(.*\); \d+ unknown \(.*\)", line)


def test_a_comparison_starts_from_no_checkpoint(at_home, capsys):
    line = mistake(capsys, "compare", "--ckpt_path", "runs/digits/checkpoints/last.ckpt")
    assert "fits both networks from the start; leave out `ckpt_path`" in line


def test_a_file_that_is_no_checkpoint_is_refused(capsys, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    (tmp_path / "junk.ckpt").write_text("junk")
    for name, told in (("weights.pth", "must be a checkpoint that a fit has written"), ("junk.ckpt", "cannot be read")):
        assert told in mistake(capsys, "test", "--ckpt_path", str(tmp_path / name))
