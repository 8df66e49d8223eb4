"""RedNet: ResNet with involution for every 3x3 convolution, registered with timm as rednet26, 38, 50, 101 and 152."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import Bottleneck as ResNetBottleneck
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from involution.inference import NOTHING
from involution.models.official import backbone
from involution.models.recompute import recomputed, recomputes
from involution.nn import Involution2d, followed
from involution.ops.transformed import transformed
from involution.pointwise import PointwiseConv2d, fold_norms, is_watched

BLOCKS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_EXPANSION = 4
STAGES = ("layer1", "layer2", "layer3", "layer4")
_POOLS = ("avg", "max", "avgmax", "catavgmax", "")


class ConvNorms(nn.Sequential):
    """Layers in turn; each batch norm right behind a convolution can be folded into it."""

    def forward(self, x: Tensor) -> Tensor:
        """What the last layer gives."""
        layers = iter(self)
        for layer in layers:
            if isinstance(layer, (Involution2d, nn.Conv2d)):
                x = followed(layer, x, next(layers, NOTHING), next(layers, NOTHING))
            else:
                x = layer(x)
        return x

    def fuse(self) -> Self:
        """Fold the norms into the convolutions; `timm.utils.reparameterize_model` calls this. See `fold_norms`."""
        fold_norms(self, **dict(pairwise(self._modules)))
        return self


class Bottleneck(nn.Module):
    """1x1 convolution, involution, 1x1 convolution, each with its norm, beside a shortcut.

    Shapes: (B, C, H, W) -> (B, 4 width, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, channels: int, width: int, stride: int, dilation: int, **involution: Any) -> None:
        super().__init__()
        out = width * _EXPANSION
        self.conv1 = PointwiseConv2d(channels, width, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = Involution2d(width, stride=stride, dilation=dilation, **involution)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = PointwiseConv2d(width, out, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.downsample = ConvNorms(PointwiseConv2d(channels, out, stride, bias=False), nn.BatchNorm2d(out))
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """The feature map of the block from that of the one before."""
        y = followed(self.conv1, x, self.bn1, self.act1)
        y = followed(self.conv2, y, self.bn2, self.act2)
        return followed(self.conv3, y, self.bn3, self.act3, self.downsample(x))

    def fuse(self) -> Self:
        """Fold the norms into the convolutions; `timm.utils.reparameterize_model` calls this. See `fold_norms`."""
        fold_norms(self, conv1="bn1", conv3="bn3")
        return self


class RedNet(nn.Module):
    """The paper's backbone and classifier: ResNet's bottlenecks around involutions, and an involution stem.

    Args:
        layers: blocks in each of the four stages.
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the image.
        global_pool: how timm pools the last feature map: "avg", "max", "avgmax", "catavgmax", or "" for not at all.
        drop_rate: dropout before the classifier, from 0 to 1.
        output_stride: 32, or 16 or 8 for dense prediction: the last stages then dilate instead of striding.
        stem: "involution", the published net, or "convolution", ResNet's 7x7 convolution of stride 2.
        stem_kernel: kernel size of the stem's involution: 3 in the official classification code, 7 in its detection
            and segmentation code.
        stem_width: channels after the stem.
        base_width: channels of the involutions in the first stage; each stage doubles them.
        kernel_size: kernel size of the blocks' involutions.
        groups: kernels per position in every block (1: a single kernel). Give this or `group_channels`.
        group_channels: channels that share a kernel in every block. Default 16.
        reduction: how much narrower the bottlenecks of the blocks' kernel generators are.
        generator: the blocks' kernel generators: "bottleneck", "linear", "neighbourhood" or "attention"; see
            `Involution2d`.
        fused: let the involutions generate their kernels part by part where they are used; see `Involution2d`.
        recompute_stem: in training, run the stem's norms, activations and pool again in the backward pass instead of
            keeping what they give: less memory for hardly more time. Weights must stay what they are until then.
            Compilers choose for themselves what to keep.
        zero_init_last: start every block as its shortcut, by a last norm of zero.

    `groups`, `group_channels` and `reduction` leave the stem alone, as the paper's ablations do.

    Shapes: (B, in_chans, H, W) -> (B, num_classes). H and W may be odd. On a CPU feature maps have their channels
    innermost (torch.channels_last), whatever the layout of the images.

    Raises:
        TypeError, ValueError: if an argument or the images do not fit; the message names what.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("rednet26", num_classes=10, base_width=16, stem_width=32)
        >>> model(torch.randn(1, 3, 33, 65)).shape
        torch.Size([1, 10])

    Source: Li et al., CVPR 2021, section 4.2 and table 1.
    """

    global_pool: SelectAdaptivePool2d
    fc: nn.Module

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        output_stride: int = 32,
        stem: Literal["involution", "convolution"] = "involution",
        stem_kernel: int = 3,
        stem_width: int = 64,
        base_width: int = 64,
        kernel_size: int = 7,
        groups: int | None = None,
        group_channels: int | None = None,
        reduction: int = 4,
        generator: str = "bottleneck",
        fused: bool = True,
        recompute_stem: bool = True,
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(
            in_chans=in_chans,
            kernel_size=kernel_size,
            stem_kernel=stem_kernel,
            base_width=base_width,
            stem_width=stem_width,
        )
        _check_head(num_classes, global_pool)
        if not isinstance(drop_rate, (int, float)) or not 0 <= drop_rate <= 1:
            raise ValueError(f"`drop_rate` must be a number from 0 to 1; got {drop_rate!r}.")
        if len(layers) != len(STAGES):
            raise ValueError(f"`layers` must have one entry for each of the {len(STAGES)} stages; got {layers}.")
        if stem not in ("involution", "convolution"):
            raise ValueError(f"`stem` must be 'involution' or 'convolution'; got {stem!r}.")
        if stem == "involution" and stem_width % 32:
            raise ValueError(
                "`stem_width` must be a multiple of 32 for the stem's involution, which has half as many channels, "
                f"16 a group; got {stem_width}. Choose {stem_width // 32 * 32 + 32}, or `stem` 'convolution'."
            )
        if output_stride not in (8, 16, 32):
            raise ValueError(f"`output_stride` must be 8, 16 or 32; got {output_stride!r}.")
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.recompute_stem = recompute_stem

        if stem == "involution":
            self.stem = _involution_stem(in_chans, stem_width, stem_kernel, fused)
        else:
            self.stem = _convolution_stem(in_chans, stem_width)
        self.stem.get_submodule("conv1").register_forward_pre_hook(_take_images)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.feature_info: list[dict[str, Any]] = [{"num_chs": stem_width, "reduction": 2, "module": "stem"}]

        involution = {
            "kernel_size": kernel_size,
            "groups": groups,
            "group_channels": group_channels,
            "reduction": reduction,
            "generator": generator,
            "act": partial(nn.ReLU, inplace=True),
            "fused": fused,
        }
        channels, reached, dilation = stem_width, 4, 1
        for index, (name, depth) in enumerate(zip(STAGES, layers, strict=True)):
            width = base_width * 2**index
            stride, previous = min(2, index + 1), dilation
            if reached * stride > output_stride:
                stride, dilation = 1, dilation * stride
            reached *= stride
            blocks = nn.Sequential()
            for block in range(depth):
                # the first block still sees the spacing of the stage before
                spacing = dilation if block else previous
                blocks.append(Bottleneck(channels, width, 1 if block else stride, spacing, **involution))
                channels = width * _EXPANSION
            self.add_module(name, blocks)
            self.feature_info.append({"num_chs": channels, "reduction": reached, "module": name})

        self.num_features = channels
        self.reset_classifier(num_classes, global_pool)
        self.apply(_initialise)
        if zero_init_last:
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)

    def get_classifier(self) -> nn.Module:
        """The last linear layer; an identity if there are no classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier for `num_classes` in place, and another pooling if `global_pool` names one.

        Raises:
            TypeError, ValueError: if an argument does not fit.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        _check_head(num_classes, pool)
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        weight = next(self.parameters())
        self.fc.apply(_initialise).to(weight.device, weight.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that sort parameters into the stem, and stages (`coarse`) or blocks, for layer-wise decay."""
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping what is inside it."""
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last feature map and those of `feature_info` at `indices`, as all timm models give them.

        Args:
            x: image, (B, in_chans, H, W).
            indices: which of the stem (0) and the four stages: a list, or an int for that many last ones. Default: all.
            norm: without meaning here; there is no norm after the last stage.
            stop_early: run no stage after the last one asked for.
            output_fmt: "NCHW", the only one served.
            intermediates_only: leave the last feature map out of the answer.

        Raises:
            ValueError: for another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"`output_fmt` must be 'NCHW'; got {output_fmt!r}.")
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self.stem(x)
        if 0 in wanted:
            intermediates.append(x)
        x = self.maxpool(x)
        for index, name in enumerate(STAGES[:last] if stop_early else STAGES, start=1):
            x = self._run(self.get_submodule(name), x)
            if index in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (B, num_features, H / output_stride, W / output_stride), sizes rounded up."""
        x = self._pooled_stem(x)
        for name in STAGES:
            x = self._run(self.get_submodule(name), x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits from the last feature map; with `pre_logits` what goes into the classifier."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images `x`."""
        return self.forward_head(self.forward_features(x))

    def _pooled_stem(self, x: Tensor) -> Tensor:
        if not (self.recompute_stem and self.training and recomputes(x)) or not _is_plain(self.stem):
            return self.maxpool(self.stem(x))
        layers: list[nn.Module] = []
        for layer in (*self.stem, self.maxpool):
            layers.append(layer)
            if layer is self.maxpool or isinstance(layer, (nn.Conv2d, Involution2d)):
                run = nn.Sequential(*layers)
                # what does not begin with a norm would change its input in place, which is kept
                x = recomputed(run, x) if isinstance(layers[0], _BatchNorm) else run(x)
                layers = []
        return x

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return stage(x)
        if not recomputes(x):
            return checkpoint_seq(stage, x)  # compilers know timm's
        for block in stage.children():
            x = recomputed(block, x)
        return x


def mirrored_resnet(depth: int, base_width: int = 64, stem_width: int = 64, **kwargs: Any) -> ResNet:
    """timm's ResNet with the depths, widths and initialisation of the RedNet of the same `depth`.

    Args:
        depth: 26, 38, 50, 101 or 152.
        base_width: channels of the 3x3 convolutions in the first stage; each stage doubles them.
        stem_width: channels after the stem, a 7x7 convolution of stride 2.
        kwargs: any other argument of timm's `ResNet`.

    Raises:
        ValueError: if there is no RedNet of this depth, or `stem_width` is odd.

    Example:
        >>> sum(p.numel() for p in mirrored_resnet(26, base_width=16, stem_width=32, num_classes=10).parameters())
        744170
    """
    if depth not in BLOCKS:
        raise ValueError(f"`depth` must be one of {', '.join(map(str, BLOCKS))}; got {depth}.")
    if stem_width % 2:
        raise ValueError(f"`stem_width` must be even; got {stem_width}.")
    widths = tuple(base_width * 2**index for index in range(len(STAGES)))
    # timm's plain stem is 64 wide whatever one asks; its deep stem is not, and gives way to a plain one here
    model = ResNet(
        ResNetBottleneck, BLOCKS[depth], channels=widths, stem_type="deep", stem_width=stem_width // 2, **kwargs
    )
    model.conv1 = nn.Conv2d(kwargs.get("in_chans", 3), stem_width, 7, 2, 3, bias=False)
    return model.apply(_initialise)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        _check_int(name, value)
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1; got {value}.")
        if name in ("kernel_size", "stem_kernel") and value % 2 == 0:
            raise ValueError(f"`{name}` must be odd, so that the involution keeps the size; got {value}.")


def _check_head(num_classes: int, global_pool: str) -> None:
    _check_int("num_classes", num_classes)
    if num_classes < 0:
        raise ValueError(f"`num_classes` must be at least 0, where 0 leaves the classifier out; got {num_classes}.")
    if global_pool not in _POOLS:
        raise ValueError(f"`global_pool` must be one of {', '.join(map(repr, _POOLS))}; got {global_pool!r}.")


def _check_int(name: str, value: int) -> None:
    try:
        operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an int; got {value!r}.") from None


def _take_images(conv: nn.Conv2d, args: tuple[Tensor]) -> tuple[Tensor]:
    """Refuse images that the first convolution would refuse in its own words, or take for something else.

    On a CPU the images' channels are put innermost, and so are those of all features then: for the copy of an image
    the network runs in its fastest layout. Not for batches of torch.func and subclasses of tensors, which may have no
    such layout, and not in exported programs, which others run.
    """
    (x,), weight = args, conv.weight
    if x.dim() != 4 or x.shape[1] != conv.in_channels:
        raise ValueError(
            f"`x` must be images of shape (B, {conv.in_channels}, H, W); got {tuple(x.shape)}. Reshape them, or build "
            "the network with other `in_chans`."
        )
    if not x.is_floating_point():
        raise TypeError(f"`x` must be of the network's dtype, {weight.dtype}; got {x.dtype}. Convert and scale it.")
    if x.device != weight.device:
        raise ValueError(f"`x` must be on the network's device, {weight.device}; got {x.device}. Move one of them.")
    # autocast converts all but float64
    if x.dtype != weight.dtype and not (
        torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
    ):
        raise TypeError(f"`x` must be of the network's dtype, {weight.dtype}; got {x.dtype}. Convert one of them.")
    if type(x) is not Tensor or not x.is_cpu or transformed() or torch.compiler.is_exporting():
        return args
    return (x.to(memory_format=torch.channels_last),)


def _involution_stem(in_chans: int, width: int, kernel_size: int, fused: bool) -> ConvNorms:
    half = width // 2
    layers = {
        "conv1": nn.Conv2d(in_chans, half, 3, 2, 1, bias=False),
        "bn1": nn.BatchNorm2d(half),
        "act1": nn.ReLU(inplace=True),
        "conv2": Involution2d(half, kernel_size, act=partial(nn.ReLU, inplace=True), fused=fused),
        "bn2": nn.BatchNorm2d(half),
        "act2": nn.ReLU(inplace=True),
        "conv3": nn.Conv2d(half, width, 3, 1, 1, bias=False),
        "bn3": nn.BatchNorm2d(width),
        "act3": nn.ReLU(inplace=True),
    }
    return ConvNorms(OrderedDict(layers))


def _convolution_stem(in_chans: int, width: int) -> ConvNorms:
    layers = {
        "conv1": nn.Conv2d(in_chans, width, 7, 2, 3, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "act1": nn.ReLU(inplace=True),
    }
    return ConvNorms(OrderedDict(layers))


def _is_plain(stem: nn.Module) -> bool:
    """Whether the stem is the one made here, not wrapped, compiled or watched: then its layers may be called singly."""
    return (
        type(stem) is ConvNorms
        and stem._compiled_call_impl is None
        and not any(is_watched(m) for m in stem.modules() if m is not stem.conv1)  # which runs only once
        and not _has_any_global_hook()
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """What timm calls before it loads pretrained weights, so that official ones fit; ours stay as they are."""
    return backbone(state_dict)


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "fc",
    }


default_cfgs = generate_default_cfgs({f"rednet{depth}": _cfg() for depth in BLOCKS})


def _rednet(depth: int, pretrained: bool, **kwargs: Any) -> RedNet:
    return build_model_with_cfg(
        RedNet, f"rednet{depth}", pretrained, pretrained_filter_fn=checkpoint_filter_fn, layers=BLOCKS[depth], **kwargs
    )


def rednet26(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-26: 9.2 M parameters."""
    return _rednet(26, pretrained, **kwargs)


def rednet38(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-38: 12.4 M parameters."""
    return _rednet(38, pretrained, **kwargs)


def rednet50(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-50: 15.5 M parameters."""
    return _rednet(50, pretrained, **kwargs)


def rednet101(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-101: 25.7 M parameters."""
    return _rednet(101, pretrained, **kwargs)


def rednet152(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-152: 34.0 M parameters."""
    return _rednet(152, pretrained, **kwargs)


for entrypoint in (rednet26, rednet38, rednet50, rednet101, rednet152):
    register_model(entrypoint)
