"""Networks of timm as backbones: built by name, their four stages watched or frozen."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, Self

import timm
from timm.models import FeatureListNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from involution.models.rednet import RedNet, mirrored_resnet
from involution.names import unknown
from involution.replace import replace_convs

Layer = Literal["convolution", "involution"]

# What a RedNet understands and its mirror, which has no involutions, does not.
_INVOLUTION_OPTIONS = {  # of a RedNet, without meaning for a ResNet
    *("stem", "stem_kernel", "recompute_stem"),
    *("kernel_size", "groups", "group_channels", "reduction", "generator", "fused"),
}
_PRETRAINED = {"pretrained", "pretrained_cfg_overlay", "checkpoint_path"}
_REDNET_OPTIONS = inspect.signature(RedNet).parameters.keys() - {"layers"} | _PRETRAINED
_STAGES = (1, 2, 3, 4)  # of `feature_info`, where 0 is the stem


def build(arch: str, options: Mapping[str, Any] | None = None, mirror: bool = False) -> Any:
    """A network of timm, or the ResNet that mirrors a RedNet.

    Args:
        arch: name of the network in timm, such as rednet26, rednet50 or resnet50.
        options: its further arguments.
        mirror: build in place of the RedNet the ResNet of the same depths and widths, which has convolutions where
            the RedNet has involutions.

    Raises:
        ValueError: if the network or one of its options is unknown, or has no mirror.
    """
    options = dict(options or {})
    if not timm.is_model(arch):
        raise ValueError(unknown("network", arch, timm.list_models()))
    for name in options if arch.startswith("rednet") else ():
        if name not in _REDNET_OPTIONS:
            raise ValueError(unknown(f"option of {arch}", name, _REDNET_OPTIONS))
    if not mirror:
        return timm.create_model(arch, **options)
    if not arch.startswith("rednet"):
        raise ValueError(f"only a RedNet has a `mirror`; got `arch` {arch!r}.")
    shared = {key: value for key, value in options.items() if key not in _INVOLUTION_OPTIONS}
    return mirrored_resnet(int(arch.removeprefix("rednet")), **shared)


class Stages(nn.Module):
    """The four feature maps of a network, for necks and heads.

    Args:
        network: a network of timm with a stem and four stages; its classifier is left out.
        frozen_stages: how many of the stages keep their weights and statistics in training; the stem goes with the
            first. 0: none.
        norm_eval: batch norms keep their statistics in training.

    Attributes:
        channels: of the four maps.

    Shapes: (B, in_chans, H, W) -> four maps (B, channels[i], H / 4 / 2**i, W / 4 / 2**i), sizes rounded up; the last
        are larger if the network's `output_stride` is below 32.

    Raises:
        ValueError: if the network has no such stages, or `frozen_stages` is not from 0 to 4.
    """

    def __init__(self, network: nn.Module, frozen_stages: int = 0, norm_eval: bool = False) -> None:
        super().__init__()
        if not 0 <= frozen_stages <= len(_STAGES):
            raise ValueError(f"`frozen_stages` must be from 0 to {len(_STAGES)}; got {frozen_stages}.")
        reductions = [info["reduction"] for info in getattr(network, "feature_info", [])]
        if len(reductions) != len(_STAGES) + 1:
            raise ValueError(f"`network` must have a stem and four stages; got one that reduces by {reductions}.")
        self.body = FeatureListNet(network, out_indices=_STAGES)
        self.channels: list[int] = self.body.feature_info.channels()
        self.norm_eval = norm_eval
        last = self.body.feature_info.info[frozen_stages]["module"]
        children = list(self.body.named_children())
        end = [name for name, _ in children].index(last) + 1 if frozen_stages else 0
        self._frozen = [child for _, child in children[:end]]
        for child in self._frozen:
            child.requires_grad_(False)
        self.train()  # Lightning does not call it, and keeps the modes it finds

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but what is frozen."""
        super().train(mode)
        if mode:
            for child in self._frozen:
                child.eval()
            for module in self.body.modules() if self.norm_eval else ():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of the stages, the finest first."""
        maps: list[Tensor] = self.body(x)
        return maps


def involve(part: nn.Module, layer: Layer, name: str) -> nn.Module:
    """`part` with an involution of K 7 and 16 channels a group for every k x k convolution, if `layer` says so.

    Args:
        part: of a neck or head; changed in place.
        layer: "convolution" leaves all as it is.
        name: of the argument, for errors.

    Raises:
        ValueError: if `layer` is neither, or a convolution cannot be replaced.

    Source: the authors' detection code, which does so in necks, the proposal network and the mask head.
    """
    if layer not in ("convolution", "involution"):
        raise ValueError(f"`{name}` must be 'convolution' or 'involution'; got {layer!r}.")
    if layer == "involution":
        report = replace_convs(part)
        if report.skipped:
            place, reason = next(iter(report.skipped.items()))
            raise ValueError(f"`{name}` cannot be of involutions, as convolution {place} stays: {reason}.")
    return part
