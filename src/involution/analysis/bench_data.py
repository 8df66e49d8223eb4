"""The benchmark of a loader alone: how many images a second it can give to training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from involution.analysis.record import append, here
from involution.analysis.table import markdown, number
from involution.data.imagenet import ImageNet


def data(
    root: str,
    workers: Sequence[int] = (0, 1, 2),
    batch_size: int = 64,
    size: int = 224,
    auto_augment: str | None = None,
    num_classes: int = 0,
    train_images: int = 0,
    seconds: float = 10.0,
    out: Path = Path("runs/bench"),
) -> list[dict[str, Any]]:
    """Load training images, and nothing else: read, decoded, transformed and put into batches.

    Args:
        root: where the images are: folders of classes, tar files, an address of them, or hf:NAME; see the data set
            `imagenet`.
        workers: numbers of processes that decode, each timed by itself.
        batch_size: images of a batch.
        size: pixels a side.
        auto_augment: changes of images by timm, such as rand-m7-mstd0.5-inc1.
        num_classes: how many classes there are, where the images do not tell.
        train_images: images of an epoch of a stream that does not tell.
        seconds: for each number of processes, from the first batch on.
        out: folder for data.csv, to which the rows are added.

    Raises:
        ValueError: if there are no images, or an argument is out of range.
    """
    if not seconds > 0:
        raise ValueError(f"`seconds` must be above 0; got {seconds}.")
    if not workers:
        raise ValueError("`workers` must name at least one number of processes; got none.")
    rows: list[dict[str, Any]] = []
    for count in workers:
        images = ImageNet(
            root,
            batch_size,
            count,
            size,
            max(size, round(size / 0.875)),
            auto_augment=auto_augment,
            num_classes=num_classes,
            train_images=train_images,
        )
        images.setup("fit")
        done, took = _timed(images, f"{count} worker(s)", seconds)
        rows.append(
            {"root": root, "workers": count, "batch_size": batch_size, "size": size, "auto_augment": auto_augment or ""}
            | {"images": done, "seconds": round(took, 2), "images_per_second": round(done / took, 1)}
            | here()
        )
    lines: list[Sequence[str]] = [("workers", "images/s", "images/s a worker", "ms an image of a worker")]
    for row in rows:
        pace, hands = float(row["images_per_second"]), max(1, int(row["workers"]))
        lines.append((str(row["workers"]), number(pace), number(pace / hands), number(1000 * hands / pace)))
    append(rows, out / "data.csv")
    print(f"\n{markdown(lines)}\n\nrows added to {out / 'data.csv'}")
    return rows


def _timed(images: ImageNet, label: str, seconds: float) -> tuple[int, float]:
    """How many images came after the first batch, in how many seconds; epochs follow one another."""
    loader: Any = images.train_dataloader()
    done, epoch, begin = 0, 0, 0.0
    with tqdm(desc=label, unit=" images", file=sys.stderr, leave=False, disable=None) as shown:
        while True:
            loader.sampler.set_epoch(epoch)
            for batch, _ in loader:
                now = perf_counter()
                if not begin:
                    begin = now  # the processes are up, and read ahead
                    continue
                done += len(batch)
                shown.update(len(batch))
                if now - begin >= seconds:
                    return done, now - begin
            epoch += 1
