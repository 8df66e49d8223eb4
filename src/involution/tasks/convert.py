"""The command that turns a checkpoint of the official code into one that timm loads, and measures it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from involution.analysis.table import markdown
from involution.cost import parameters
from involution.models import RedNet
from involution.recognition import network_of, rednet_of
from involution.weights import read, renamed

_KINDS = (".safetensors", ".ckpt", "")


def convert(official: Path, out: Path, evaluate: Path | None = None, batch_size: int = 64, workers: int = 2) -> None:
    """Turn a checkpoint of the official code into safetensors under our names; nothing in the file is executed.

    Depth, widths, kernel sizes and classes are told from the names and shapes.

    Args:
        official: the checkpoint, as the official classification, detection or segmentation code wrote it.
        out: a file that ends in .safetensors, which `timm.create_model(..., checkpoint_path=...)` loads; or a folder,
            for model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER")` loads; what detectors
            and segmentors have around the backbone is then left out, and counted. Or a file that ends in .ckpt, for
            the whole network, which `involution test` and `involution predict` take as --ckpt_path.
        evaluate: a folder of images, in one folder for each class in the order of the classifier, such as ImageNet's
            validation set; prints top-1 and top-5 accuracy, images resized to 256 pixels and cropped to 224.
        batch_size: images at a time, for `evaluate`.
        workers: processes that read images, for `evaluate`.

    Raises:
        ValueError: if a file does not fit.
    """
    kind = "" if out.is_dir() else out.suffix
    if kind not in _KINDS:
        raise ValueError(f"`out` must end in {', '.join(filter(None, _KINDS))}, or be a folder; got {out}.")
    if evaluate and kind == ".ckpt":
        raise ValueError(f"`evaluate` measures a classifier; give an `out` that ends in .safetensors, not {out}.")
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
    out.parent.mkdir(parents=True, exist_ok=True)
    told, network = network_of(given, official) if kind == ".ckpt" else ("", model)
    if kind == ".ckpt":
        weights = {f"net.{key}": value for key, value in network.state_dict().items()}
        torch.save({"state_dict": weights, "pytorch-lightning_version": version("lightning")}, out)
    elif kind == ".safetensors":
        save_file(model.state_dict(), out)
    else:
        save_for_hf(model, str(out), safe_serialization=True)
    print(_mapping(given, network))
    print(f"\n{official.name}: {told and told + ', '}{parameters(network):,} parameters, written to {out}")
    if images:
        print(_accuracy(model, images, batch_size, workers))


def _mapping(given: Mapping[str, Tensor], network: nn.Module) -> str:
    """A table of how many entries of each part of the checkpoint went where, with the first of each."""
    state = network.state_dict()
    ours = {theirs: name for name, theirs in renamed({key: key for key in given}, network).items()}
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
    from torchmetrics.classification import MulticlassAccuracy  # slow to import, and seldom wanted

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
