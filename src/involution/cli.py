"""The console command `involution`."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, ENOTDIR, EPERM, EROFS
from importlib.util import find_spec
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from textwrap import wrap
from typing import Any

from involution.names import mistaken, unknown
from involution.recipes import recipe, recipes

_DEFAULT_RECIPE = "digits"
_NEEDS = {
    "bench": "benchmarking",
    "convert": "converting",
    "scale": "computing",
    "show": "drawing",
    "table": "counting",
}
_EXTRAS = frozenset(
    [
        *("jsonargparse", "lightning", "matplotlib", "pycocotools", "safetensors", "scipy", "sklearn", "timm"),
        *("fsspec", "torchmetrics", "torchvision", "tqdm", "transformers", "yaml"),
    ]
)
_TOLD = {
    "BadItemError",
    "DataError",
    "DivergedError",
    "MisconfigurationException",
}  # what a run raises for the user; by name, as few commands import them
_DISK = {ENOSPC, EDQUOT, EACCES, EPERM, EROFS, EFBIG, ENOTDIR}
_COMMANDS = {
    "compare": "fit the RedNet of a recipe and its mirrored ResNet, and print one table of both",
    "fit": "train a network by a recipe",
    "validate": "measure a checkpoint on the validation data",
    "test": "measure a checkpoint on the test data",
    "predict": "find the classes, boxes, masks or maps of images, and draw them",
    "show": "draw the kernels a network generates for an image",
    "convert": "turn a checkpoint of the official code into one that timm loads, and measure it",
    "study": "put a claim to the test: train its variants over seeds, and compare them",
    "table": "build and count the networks of the paper's tables, beside what was published",
    "scale": "compute what training on many devices needs of their memory and network",
    "bench": "time the operator, its variants, networks or a loader of images on this machine",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        args: the words after `involution`. Default: those of this process.

    Returns:
        The exit code: 0, or 2 after a mistake of the user or when a disk is full, which is told in one line on stderr;
        143 if the system ended the process, 130 if the user did.

    Errors inside a run that has begun are not the user's, and keep their traceback.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    try:
        if args[0] in _FUNCTIONS:
            _call(*args)
            return 0
        run = _prepare(args[0], args[1:])
    except ModuleNotFoundError as error:
        if error.name == "datasets":
            return _refuse("streaming a data set needs more packages: pip install 'involution[stream]'")
        if (error.name or "").partition(".")[0] not in _EXTRAS:
            raise
        return _refuse(f"{_NEEDS.get(args[0], 'training')} needs more packages: pip install 'involution[train]'")
    except (ValueError, TypeError, NotImplementedError) as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}." if error.filename else str(error))
    except KeyboardInterrupt:
        return _ended(SIGINT)
    try:
        run()
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return _refuse(
            f"{error.filename or 'a file'} cannot be written: {error.strerror}. What was complete is untouched: make "
            "room, or give another `--folder`; a fit goes on by `--ckpt_path last`."
        )
    except Exception as error:
        if type(error).__name__ not in _TOLD:
            raise
        told = str(error).rpartition("BadItemError: ")[2]  # a worker process sends its traceback along
        return _refuse(told)
    except SystemExit as error:
        if type(error).__name__ == "SIGTERMException":
            return _ended(SIGTERM)
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning turns into this
            return _ended(SIGINT)
        raise
    except KeyboardInterrupt:
        return _ended(SIGINT)
    return 0


def _ended(signal: Signals) -> int:
    print(f"involution: ended by {signal.name}; a fit goes on by `--ckpt_path last`.", file=sys.stderr)
    return 128 + signal


def _refuse(message: str) -> int:
    print(f"involution: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _prepare(command: str, args: list[str]) -> Callable[[], None]:
    """What is left to run once `args` are parsed, and all they ask for is built and loaded."""
    if command not in _COMMANDS:
        raise ValueError(unknown("command", command, _COMMANDS))
    args, name = _with_recipe(args)
    if command == "compare":
        from involution.tasks.compare import Comparison

        return Comparison(args, name).run
    from involution.tasks.commands import Command

    return Command(command, args, name).run


def _call(command: str, *args: str) -> None:
    """Run a command that is a function, or one of several."""
    from jsonargparse import auto_cli

    try:
        auto_cli(_FUNCTIONS[command](), args=list(args), prog=f"involution {command}", exit_on_error=False)
    except ArgumentError as error:
        raise ValueError(mistaken(str(error))) from None


def _bench() -> Any:
    from involution.analysis.bench_data import data
    from involution.analysis.bench_gpu import gpu
    from involution.analysis.bench_model import model
    from involution.analysis.bench_op import op
    from involution.analysis.bench_variants import variants
    from involution.analysis.readme import readme
    from involution.tasks.soak import soak

    found = {"op": op, "variants": variants, "model": model, "data": data, "gpu": gpu, "soak": soak, "readme": readme}
    if find_spec("triton"):  # a torch without GPUs comes without it
        from involution.analysis.programs import programs

        found["programs"] = programs
    return found


def _convert() -> Any:
    from involution.tasks.convert import convert

    return convert


def _table() -> Any:
    from involution.analysis.tables import table

    return table


def _show() -> Any:
    from involution.show.command import show

    return show


def _scale() -> Any:
    from involution.analysis.scale import scale

    return scale


def _study() -> Any:
    from involution.studies.command import study

    return study


_FUNCTIONS = {
    "bench": _bench,
    "convert": _convert,
    "scale": _scale,
    "show": _show,
    "study": _study,
    "table": _table,
}


def _with_recipe(args: list[str]) -> tuple[list[str], str]:
    """`args` with recipes as paths, the default one if there is none, and the name of the last."""
    args = [part for word in args for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    places = [i + 1 for i, word in enumerate(args[:-1]) if word in ("-c", "--config")]
    if not places and ("-h" in args or "--help" in args):
        return args, _DEFAULT_RECIPE
    if not places:
        args, places = ["--config", _default(args), *args], [1]
    name = args[places[-1]].removesuffix(".yaml")
    for place in places:
        args[place] = str(recipe(args[place]))
    return args, name if name in recipes() else Path(name).stem


def _default(args: list[str]) -> str:
    """The configuration of the run that a given checkpoint came from, else the default recipe."""
    for i, word in enumerate(args):
        if word == "--ckpt_path" or word.startswith("--ckpt_path="):
            path = word.partition("=")[2] or "".join(args[i + 1 : i + 2])
            config = Path(path).parent.parent / "config.yaml"
            if config.is_file():
                return str(config)
    return _DEFAULT_RECIPE


def _help() -> str:
    width = max(map(len, _COMMANDS))
    return "\n".join(
        [
            "usage: involution COMMAND [--config RECIPE] [--SETTING VALUE ...]",
            "",
            "Involution networks: training, testing and comparing them.",
            "",
            "commands:",
            *(f"  {name:<{width}}  {text}" for name, text in _COMMANDS.items()),
            "",
            *wrap(f"recipes: {', '.join(recipes())} (default {_DEFAULT_RECIPE}), or a file's path", 120),
            "",
            "examples:",
            "  involution compare",
            "  involution fit --config digits --trainer.max_epochs 20 --model.lr 0.001",
            "  involution test --ckpt_path runs/digits/checkpoints/best.ckpt",
            "  involution fit --config scenes/faster_rcnn",
            "  involution predict --ckpt_path runs/scenes/faster_rcnn/checkpoints/best.ckpt --images photographs",
            "  involution show photograph.jpg --checkpoint rednet50.safetensors",
            "  involution convert rednet50.pth rednet50.safetensors --evaluate imagenet/val",
            "  involution table imagenet --latency true",
            "  involution study cost",
            "  involution bench op --dtype bfloat16",
            "",
            "`involution COMMAND --help` lists every setting; `compare` takes those of `fit`.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
