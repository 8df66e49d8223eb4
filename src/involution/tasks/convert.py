"""The command that turns a checkpoint of the official code into one that timm loads, and measures it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from involution.analysis.table import markdown
from involution.cost import parameters
from involution.models import RedNet
from involution.models.rednet import checkpoint_filter_fn
from involution.weights import read, rednet_of


def convert(official: Path, out: Path, evaluate: Path | None = None, batch_size: int = 64, workers: int = 2) -> None:
    """Turn a checkpoint of the official code into safetensors under our names; nothing in the file is executed.

    Depth, widths, kernel sizes and classes are told from the shapes. What detectors and segmentors have around the
    backbone is left out, and counted.

    Args:
        official: the checkpoint, as the official classification, detection or segmentation code wrote it.
        out: a file that ends in .safetensors, which `timm.create_model(..., checkpoint_path=...)` loads; or a folder,
            for model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER")` loads.
        evaluate: a folder of images, in one folder for each class in the order of the classifier, such as ImageNet's
            validation set; prints top-1 and top-5 accuracy, images resized to 256 pixels and cropped to 224.
        batch_size: images at a time, for `evaluate`.
        workers: processes that read images, for `evaluate`.

    Raises:
        ValueError: if a file does not fit.
    """
    to_file = out.suffix == ".safetensors"
    if out.suffix and not to_file and not out.is_dir():
        raise ValueError(f"`out` must end in .safetensors, or be a folder; got {out}.")
    images = ImageFolder(evaluate) if evaluate else None
    given = read(official)
    model = rednet_of(given, official)
    if images and not model.num_classes:
        raise ValueError(f"`evaluate` needs a classifier, and {official} holds none; got {evaluate}. Leave it out.")
    if images and len(images.classes) != model.num_classes:
        raise ValueError(
            f"`evaluate` must hold a folder for each of the {model.num_classes} classes of the checkpoint; {evaluate} "
            f"has {len(images.classes)}."
        )
    if to_file:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), out)
    else:
        save_for_hf(model, str(out), safe_serialization=True)
    print(_mapping(given, model))
    print(f"\n{official.name}: {parameters(model):,} parameters, written to {out}")
    if images:
        print(_accuracy(model, images, batch_size, workers))


def _mapping(given: Mapping[str, Tensor], model: RedNet) -> str:
    """A table of how many entries of each part of the checkpoint went where, with the first of each."""
    state = model.state_dict()
    ours = {official: name for name, official in checkpoint_filter_fn({key: key for key in given}).items()}
    counts, examples, targets = Counter[str](), dict[str, str](), dict[str, str]()
    for key in given:
        plain, name = key.removeprefix("module."), ours.get(key, "")
        used = name in state
        part = (plain.removeprefix("backbone.") if used else plain).split(".")[0]
        counts[part] += 1
        targets.setdefault(part, name.split(".")[0] if used else "left out")
        examples.setdefault(part, f"{key} -> {name}" if used else key)
    lines = [(part, str(count), targets[part], examples[part]) for part, count in counts.items()]
    return markdown([("part of the checkpoint", "entries", "ours", "for example"), *lines])


def _accuracy(model: RedNet, images: ImageFolder, batch_size: int, workers: int) -> str:
    images.transform = create_transform(**resolve_model_data_config(model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.eval().to(device).to(memory_format=torch.channels_last)
    classes = model.num_classes
    best = {k: MulticlassAccuracy(classes, top_k=min(k, classes), average="micro").to(device) for k in (1, 5)}
    loader = DataLoader(images, batch_size, num_workers=workers)
    with torch.inference_mode():
        for batch, labels in tqdm(loader, "evaluating", file=sys.stderr, disable=None):
            logits = model(batch.to(device, memory_format=torch.channels_last))
            for metric in best.values():
                metric.update(logits, labels.to(device))
    shares = ", ".join(f"top-{k} {metric.compute():.2%}" for k, metric in best.items())
    return f"{len(images)} images: {shares}"
