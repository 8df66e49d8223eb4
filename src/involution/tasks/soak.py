"""A long training, watched for memory and files that it does not give back."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import active_children
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from tqdm import tqdm

from involution.analysis.record import append, here
from involution.recipes import recipe
from involution.tasks.commands import Command

_CLASSES, _SIDE = 4, 48
_IMAGES = {"train": 16, "val": 4}  # of a class
_EVERY = 5.0  # seconds between two looks, at least
_WORKERS, _BATCH = 2, 8


def soak(minutes: float = 30.0, out: Path = Path("runs/soak")) -> list[dict[str, Any]]:
    """Train a small RedNet on images in folders for a long time, with all that a fit does, and watch the process.

    Worker processes read images, checkpoints are written every few steps, an epoch of seconds ends in a validation, and
    metrics are logged. What is watched: resident memory of the training process and of its workers, and open files.

    Args:
        minutes: how long.
        out: folder of soak.csv and soak.png, which are written anew.

    Raises:
        ValueError: if `minutes` is not above 0.
        OSError: if the system cannot tell; it takes Linux's /proc.
    """
    if not minutes > 0:
        raise ValueError(f"`minutes` must be above 0; got {minutes}.")
    if not Path("/proc/self/fd").exists():
        raise OSError("memory and open files of a process are read from /proc, which this system lacks.")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _images(Path(folder))
        watch = Watch(minutes)
        fit = Command("fit", [*_settings(folder), "--folder", f"{folder}/run"], "soak")
        fit.trainer.callbacks.append(watch)
        fit.start()
    place = here()
    rows = [row | place for row in watch.rows]
    (out / "soak.csv").unlink(missing_ok=True)
    append(rows, out / "soak.csv")
    _draw(rows, out / "soak.png")
    half = [row for row in rows if row["minutes"] >= rows[-1]["minutes"] / 2]
    print(
        f"\n{rows[-1]['epochs']} epochs, {rows[-1]['steps']} steps in {rows[-1]['minutes']:.1f} minutes; second half:"
    )
    for name in ("process_mib", "workers_mib", "files"):
        print(f"  {name:<12} from {half[0][name]:g} to {half[-1][name]:g}, at most {max(row[name] for row in half):g}")
    print(f"rows     {out / 'soak.csv'}\npicture  {out / 'soak.png'}")
    return rows


class Watch(Callback):
    """Looks at the process after an epoch, every few seconds, and ends the training after `minutes`.

    Attributes:
        rows: what was seen.
    """

    def __init__(self, minutes: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self._minutes, self._begin = minutes, perf_counter()
        self._shown = tqdm(total=round(60 * minutes), desc="soaking", file=sys.stderr, unit="s", disable=None)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, where the last look is long ago."""
        now = perf_counter() - self._begin
        if trainer.sanity_checking or (self.rows and now - 60 * self.rows[-1]["minutes"] < _EVERY):
            return
        gc.collect()  # what is left then is held
        workers = [_resident(worker.pid or 0) for worker in active_children()]
        self.rows.append(
            {
                "minutes": round(now / 60, 3),
                "epochs": trainer.current_epoch + 1,
                "steps": trainer.global_step,
                "process_mib": round(_resident(os.getpid()), 1),
                "workers_mib": round(sum(workers), 1),
                "workers": len(workers),
                "files": len(os.listdir("/proc/self/fd")),
            }
        )
        self._shown.update(round(now) - self._shown.n)
        trainer.should_stop = now >= 60 * self._minutes


def _resident(process: int) -> float:
    """Resident memory in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _images(root: Path) -> None:
    for split, count in _IMAGES.items():
        for number in range(_CLASSES):
            folder = root / split / str(number)
            folder.mkdir(parents=True)
            for index in range(count):
                Image.effect_noise((_SIDE, _SIDE), 20 + 40 * number).convert("RGB").save(folder / f"{index}.jpg")


def _settings(root: str) -> Sequence[str]:
    return [
        *("--config", str(recipe("imagenet/rednet26")), "--data.root", root),
        *(
            "--data.size",
            "32",
            "--data.resize",
            "32",
            "--data.batch_size",
            str(_BATCH),
            "--data.workers",
            str(_WORKERS),
        ),
        *("--model.options.num_classes", str(_CLASSES), "--model.options.base_width", "16"),
        *("--trainer.max_epochs", "1000000", "--trainer.devices", "1", "--trainer.num_nodes", "1"),
        *("--trainer.strategy", "auto", "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"),
        *("--save_every", "5", "--keep", "2"),
    ]


def _draw(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    memory, files = figure.subplots(1, 2)
    times = [row["minutes"] for row in rows]
    for name, label, colour in (("process_mib", "training", "#d1495b"), ("workers_mib", "its workers", "#30343a")):
        memory.plot(times, [row[name] for row in rows], color=colour, label=label)
    memory.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    files.plot(times, [row["files"] for row in rows], color="#d1495b")
    files.set(xlabel="minutes", ylabel="open files", ylim=(0, None))
    memory.legend(fontsize=8)
    for axes in (memory, files):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
