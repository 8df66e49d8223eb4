"""Lightning's commands over our tasks and data."""

from __future__ import annotations

import logging
import re
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from involution.names import mistaken, unknown
from involution.tasks.progress import Pace, Progress
from involution.tasks.saves import Log, Saves, WholeFiles, newest
from involution.tasks.task import Task

# Where each is, and what a task needs of its data: imported when a recipe names it.
TASKS = {
    "classification": "involution.tasks.classification:Classification",
    "detection": "involution.tasks.detection:Detection",
    "segmentation": "involution.tasks.segmentation:Segmentation",
}
DATASETS = {
    "digits": "involution.data.digits:Digits",
    "imagenet": "involution.data.imagenet:ImageNet",
    "scenes": "involution.data.scenes:DigitScenes",
    "largest": "involution.data.largest:LargestDigit",
    "pairs": "involution.data.pairs:Pairs",
    "coco": "involution.data.coco:Coco",
    "cityscapes": "involution.data.cityscapes:Cityscapes",
}
_CLASSES = {"detection": "classes", "segmentation": "map_classes"}


class Command(LightningCLI):
    """One of Lightning's commands, ready to `run`; a fit keeps its files in a folder of its own.

    Args:
        command: fit, validate, test or predict.
        args: the rest of the command line.
        name: of the recipe, for the folder.

    Raises:
        ValueError, TypeError, OSError: with one sentence for the user.
    """

    def __init__(self, command: str, args: Sequence[str], name: str) -> None:
        _calm()
        self._command, self._name = command, name
        self._task, self._dataset = _kinds(args)
        task: type[Task] = _load(TASKS[self._task])
        data: type[LightningDataModule] = _load(DATASETS[self._dataset])
        self._classes = _CLASSES.get(self._task)
        if self._classes is not None and not hasattr(data, self._classes):
            raise ValueError(f"`dataset` {self._dataset} has nothing for `task` {self._task}; choose another.")
        if self._classes is None and not hasattr(data, "num_classes"):
            raise ValueError(f"`dataset` {self._dataset} has no classes of images; choose another.")
        self._checkpoint: dict[str, Any] | None = None
        self._pictures: Any = None  # that --images names
        self._goes_on = False  # in the folder of an earlier start
        try:
            super().__init__(
                task,
                data,
                args=[command, *args],
                seed_everything_default=0,
                load_from_checkpoint_support=False,  # the task's settings are plain values
                auto_configure_optimizers=False,
                save_config_callback=SaveConfigCallback if command == "fit" else None,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={"enable_model_summary": False},  # Lightning's tells of 0 FLOPs
                parser_kwargs={"prog": "involution", "exit_on_error": False, command: {"exit_on_error": False}},
            )
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error

    def subcommands(self) -> dict[str, set[str]]:
        """Only the one that runs: building the parsers of all takes seconds."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our settings beside Lightning's."""
        for name, known, chosen in (("task", TASKS, self._task), ("dataset", DATASETS, self._dataset)):
            parser.add_argument(f"--{name}", type=str, default=chosen, help=f"One of {', '.join(known)}.")
        if self._command == "predict":
            images = "Images or folders of them to predict; by default those of the data set."
            parser.add_argument("--images", type=str, nargs="+", default=[], help=images)
            parser.add_argument("--least", type=float, default=0.5, help="Score from which detections are drawn.")
        every = "Optimizer steps of a fit between two checkpoints to go on from, by --ckpt_path last."
        parser.add_argument("--save_every", type=PositiveInt, default=500, help=every)
        parser.add_argument("--keep", type=PositiveInt, default=2, help="How many of them are kept, the newest.")
        board = "Let a fit also log for TensorBoard, into FOLDER/tensorboard."
        parser.add_argument("--tensorboard", type=bool, default=False, help=board)
        if self._classes is not None:
            parser.link_arguments(f"data.{self._classes}", "model.classes", apply_on="instantiate")
        parser.add_argument(
            "--folder",
            default=f"runs/{self._name}",
            help="Where a fit keeps its files; where it is taken, the first of FOLDER-2, FOLDER-3, ... that is free.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in one sentence what is wrong."""
        with warnings.catch_warnings():
            # Lightning warns of our `args` beside those of the console script, of which they are the checked form.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            try:
                super().parse_arguments(parser, args)
            except ArgumentError as error:
                raise ValueError(self._explain(str(error))) from None

    def _explain(self, message: str) -> str:
        found = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
        if found is None:
            return mistaken(message)
        known = self._subcommand_parsers[self._command].get_defaults().keys()
        return unknown("setting", found[1] or found[2], known) + f" (`involution {self._command} --help` lists all)"

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint here, where Lightning would let it override the settings the user wrote."""
        settings = self.config[self._command]
        path = settings.get("ckpt_path")
        if path == "last" and self._command == "fit":
            path = settings["ckpt_path"] = newest(Path(settings["folder"]) / "checkpoints")
            self._goes_on = True
        if path is None and self._command == "fit":
            return
        if path is None:
            raise ValueError(
                f"give --ckpt_path, the checkpoint to {self._command}, such as runs/{self._name}/checkpoints/best.ckpt."
            )
        if not Path(path).is_file():
            raise ValueError(f"`ckpt_path` must be the path of a checkpoint; there is no file {path}.")
        try:
            checkpoint = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            raise ValueError(f"`ckpt_path` {path} cannot be read as a checkpoint: {error}") from error
        if "pytorch-lightning_version" not in checkpoint or "state_dict" not in checkpoint:
            raise ValueError(f"`ckpt_path` must be a checkpoint that a fit has written; {path} is none.")
        if self._command == "fit" and "optimizer_states" not in checkpoint:
            raise ValueError(f"`ckpt_path` must be a checkpoint that a fit has written; {path} holds weights alone.")
        settings["weights_only"] = True
        self._checkpoint = checkpoint

    def after_instantiate_classes(self) -> None:
        """Lightning calls it before it runs anything: refuse a network that does not fit the data or checkpoint."""
        for name in ("in_chans", "num_classes") if self._classes is None else ():
            value, wanted = getattr(self.model, name), getattr(self.datamodule, name)
            if value != wanted:
                raise ValueError(f"`model.options.{name}` must be {wanted}, as in the data; got {value}.")
        if self._checkpoint is not None:
            self.model.on_load_checkpoint(self._checkpoint)
            before = self._checkpoint.get("hyper_parameters", {}).get("optimizer", self.model.hparams["optimizer"])
            if self._command == "fit" and before != self.model.hparams["optimizer"]:
                raise ValueError(
                    f"`model.optimizer` must be {before}, as in the checkpoint to go on from; got "
                    f"{self.model.hparams['optimizer']}. Leave out `ckpt_path` to start anew."
                )
            self._checkpoint = None  # Lightning reads it again
        if self._command == "predict":
            self._check_prediction()

    def _check_prediction(self) -> None:
        """Refuse what would leave it open which image a prediction is of, and find the pictures that are asked for."""
        settings = self.config["predict"]
        if self._classes is None and not settings["images"] and settings["data"].get("skip_bad"):
            raise ValueError(
                "`data.skip_bad` would leave out images by whose places predictions are named; got true. Give "
                "--data.skip_bad false."
            )
        if settings["images"]:
            from involution.tasks.predict import Pictures

            to_tensor = None
            if self._classes is None:
                to_tensor = getattr(self.datamodule, "to_tensor", None)
                if to_tensor is None:
                    raise ValueError(f"`images` cannot be made into those of `dataset` {self._dataset}; leave it out.")
            self._pictures = Pictures([Path(path) for path in settings["images"]], to_tensor)

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing yet: Lightning would run on construction, where mistakes of the user cannot be told from bugs."""

    def start(self) -> None:
        """Run the command."""
        super()._run_subcommand(self._command)

    def run(self) -> None:
        """Run the command; draw how a fit learned, and tell where it left its files."""
        self.start()
        if self._command != "fit" or not self.trainer.is_global_zero:
            return
        folder = Path(self.trainer.default_root_dir)
        places = {"checkpoints": folder / "checkpoints"}
        if (folder / "metrics.csv").exists():  # another logger writes elsewhere
            from involution.tasks.report import draw_curves

            places |= {"metrics": folder / "metrics.csv", "learning curves": folder / "curves.png"}
            draw_curves({self.model.name: places["metrics"]}, self.model.measures[0], places["learning curves"])
        print()
        for what, where in {**places, "configuration": folder / "config.yaml"}.items():
            print(f"{what:<16} {where}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with our progress display and the folder of the run."""
        settings = self._get(self.config_init, "trainer")
        if settings.overfit_batches:
            raise ValueError("`trainer.overfit_batches` needs an order of its own; give `trainer.limit_train_batches`.")
        if settings.enable_progress_bar is not False:
            settings.callbacks = [*(settings.callbacks or []), Progress()]
        if self._command == "predict":  # in one process, for one file in the order of the images
            if not isinstance(settings.devices, list) or len(settings.devices) > 1:  # else that device
                settings.devices = 1
            settings.num_nodes, settings.strategy = 1, "auto"
        if self._command == "fit":
            folder = Path(self._get(self.config, "folder"))
            kwargs["default_root_dir"] = folder if self._goes_on else _free(folder)
            if settings.enable_checkpointing is not False and not settings.fast_dev_run:
                every, keep = (self._get(self.config, name) for name in ("save_every", "keep"))
                place = Path(kwargs["default_root_dir"]) / "checkpoints"  # whatever logger there is
                for callback in settings.callbacks or []:
                    if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                        callback.dirpath = str(place)
                settings.callbacks = [*(settings.callbacks or []), Saves(place, every, keep)]
            settings.callbacks = [*(settings.callbacks or []), Pace()]
            kwargs["plugins"] = [*(settings.plugins or []), WholeFiles()]
        if settings.logger is None and self._command == "fit":
            steps = self._checkpoint["global_step"] if self._checkpoint else 0
            kwargs["logger"] = [Log(kwargs["default_root_dir"], steps)]
            if self._get(self.config, "tensorboard"):
                kwargs["logger"].append(_board(kwargs["default_root_dir"], steps))
        elif settings.logger is None:
            kwargs["logger"] = False
        return super().instantiate_trainer(**kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Write the classes of each image, or draw what was found in it, and tell where that is."""
        from involution.tasks import predict

        settings, pictures, data = self.config["predict"], self._pictures, self.datamodule
        folder, names = _free(Path(settings["folder"]) / "predictions"), pictures.names if pictures else ()
        if self._classes is None:
            labels = getattr(data, "classes", None) or list(map(str, range(data.num_classes)))
            writer: Any = predict.Classes(folder, labels, names)
        else:
            labels = getattr(data, self._classes)
            numbers = getattr(data, "category_ids", range(1, len(labels) + 1))
            writer = predict.Drawings(folder, labels, numbers, settings["least"], names)
        self.trainer.callbacks.append(writer)
        if pictures:
            kwargs = {**kwargs, "datamodule": None, "dataloaders": predict.loader(pictures, self._classes is None)}
        self.trainer.predict(**{**kwargs, "return_predictions": False})
        if pictures and self._classes is None:
            for entry in writer.entries:
                print(entry["image"], *(f"{c['class']} {c['probability']:.1%}" for c in entry["classes"]), sep="  ")
        print(f"{writer.count} {writer.what} in {folder}")


def _kinds(args: Sequence[str]) -> tuple[str, str]:
    """The task and the data set that a command line asks for, in its files or itself; the last word counts."""
    chosen = {"task": "classification", "dataset": "digits"}
    for word, value in zip(args, [*args[1:], ""], strict=True):
        name, given, text = word.partition("=")
        if name in ("-c", "--config"):
            try:
                content = yaml.safe_load(Path(text or value).read_text())
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"{text or value} is no YAML file: {error}") from error
            chosen |= {key: str(content[key]) for key in chosen if isinstance(content, dict) and key in content}
        elif name.removeprefix("--") in chosen and name.startswith("--"):
            chosen[name.removeprefix("--")] = text if given else value
    for name, known in (("task", TASKS), ("dataset", DATASETS)):
        if chosen[name] not in known:
            raise ValueError(unknown(name, chosen[name], known))
    return chosen["task"], chosen["dataset"]


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _free(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that is missing or empty."""
    candidate, number = folder, 1
    while candidate.exists() and any(candidate.iterdir()):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _board(folder: Path, steps: int) -> TensorBoardLogger:
    if not find_spec("tensorboard"):
        raise ValueError("`tensorboard` needs another package: pip install tensorboard")
    # what an interrupted run logged later is logged again
    return TensorBoardLogger(folder, name="", version="tensorboard", purge_step=steps)


def _calm() -> None:
    """Keep Lightning to what matters here: its advertisements and state of the machine go, its warnings stay."""
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "lightning.fabric.utilities.seed",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The data is a few tensors in memory, so more worker processes would only cost.
    warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")
    # Every fit has a folder of its own, so the one a checkpoint comes from is always another.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    # The log that a fit goes on with is read before that, and written again.
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # A test needs none of the callbacks of a fit.
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used to create")
    # The averaged weights are those a checkpoint holds, so a test has what it needs.
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback, but loading a checkpoint")
    # Our hook changes nothing unless the weights are shared out.
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model that overrides")
    # Lightning's own use of torch and jsonargparse, which nobody who reads of it here could change.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
