"""What is shown: a network with weights, and an image brought to its size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import Tensor
from torchvision.transforms import functional as F

from involution.data.items import open_image
from involution.data.scenes import Look, Scenes
from involution.models.rednet import BLOCKS, STAGES, RedNet
from involution.models.stages import build
from involution.recognition import rednet_of
from involution.show.packaged import TOLD, packaged, rednet_in
from involution.weights import read

SAMPLE = "sample"
_LEAST = 32  # pixels a side
_ENLARGED = 2  # the `scale` of the recipe scenes/semantic_fpn


@dataclass(frozen=True, eq=False)
class Subject:
    """A network in evaluation mode, and an image it is shown.

    Attributes:
        network: the network.
        weights: where they come from, for people.
        mirror: kernels of convolutions trained in the same way, (G, k, k) by layer; empty if unknown.
        picture: the image as it is looked at, 8 bits a channel.
        x: what the network is given, (1, in_chans, H, W).
    """

    network: RedNet
    weights: str
    mirror: dict[str, Tensor]
    picture: Image.Image
    x: Tensor


def subject(image: str, model: str | None = None, checkpoint: Path | None = None, size: int = 224) -> Subject:
    """Load a network and an image for it.

    Args:
        image: a file; or "sample", for a scene of digits.
        model: name of a RedNet, such as rednet50. Default: told by the checkpoint.
        checkpoint: of a RedNet, or of anything with one in it: safetensors, an official file, or one that a fit wrote.
            Default: random weights for `model`; if that is missing too, the small RedNet that comes with the library.
        size: a larger image is scaled down, so that its longer side has so many pixels.

    Raises:
        ValueError: if the image cannot be read, or the checkpoint is of no RedNet or of another than `model`.
    """
    if size < _LEAST:
        raise ValueError(f"`size` must be at least {_LEAST}; got {size}.")
    picture = sample() if image == SAMPLE else _fitted(Path(image), size)
    network, weights, mirror = _network(model, checkpoint)
    chans = network.stem[0].in_channels
    if chans not in (1, 3):
        raise ValueError(f"`checkpoint` must be of a network for images of 1 or 3 channels; it takes {chans}.")
    x = F.to_tensor(picture.convert("L" if chans == 1 else "RGB"))
    if chans == 3:
        config = resolve_model_data_config(network)
        x = F.normalize(x, config["mean"], config["std"])
    return Subject(network.eval(), weights, mirror, picture, x[None])


def depth(network: RedNet) -> int:
    """Of the RedNet, such as 50."""
    blocks = tuple(len(list(network.get_submodule(stage).children())) for stage in STAGES)
    return next(depth for depth, of in BLOCKS.items() if of == blocks)


def sample() -> Image.Image:
    """A scene of digits that the packaged network was not trained on, enlarged as it was for the network's training."""
    scene, _ = Scenes("test", 1, Look(fewest=4, most=6))[0]
    picture = F.to_pil_image(scene)
    return picture.resize((_ENLARGED * picture.width, _ENLARGED * picture.height), Image.Resampling.BILINEAR)


def _fitted(path: Path, size: int) -> Image.Image:
    picture = open_image(path)
    if max(picture.size) > size:
        scale = size / max(picture.size)
        sides = [max(_LEAST, round(side * scale)) for side in picture.size]
        print(f"scaled {path} from {picture.width} x {picture.height} to {sides[0]} x {sides[1]} pixels")
        picture = picture.resize(sides, Image.Resampling.LANCZOS)
    if min(picture.size) < _LEAST:
        raise ValueError(
            f"`image` must have {_LEAST} pixels a side or more; {path} is {picture.width} x {picture.height}."
        )
    return picture


def _network(model: str | None, checkpoint: Path | None) -> tuple[RedNet, str, dict[str, Tensor]]:
    if checkpoint is None and model is None:
        network, mirror = packaged()
        return network, TOLD, mirror
    if checkpoint is None:
        network = build(str(model))
        if not isinstance(network, RedNet):
            raise ValueError(f"`model` must be a RedNet, such as rednet50; got {model!r}.")
        return network, "random; give --checkpoint for trained ones", {}
    try:
        state = load_file(checkpoint) if checkpoint.suffix == ".safetensors" else read(checkpoint)
    except SafetensorError as error:
        raise ValueError(f"`checkpoint` {checkpoint} cannot be read as safetensors: {error}") from error
    network = rednet_of(rednet_in(state), checkpoint)
    name = f"rednet{depth(network)}"
    if model not in (None, name):
        raise ValueError(f"`checkpoint` {checkpoint} is of a {name}, not of `model` {model}. Leave `model` out.")
    return network, f"weights of {checkpoint.name}", {}
