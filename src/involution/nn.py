"""Involution layers: a kernel generator and the operator, in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from involution import inference
from involution.generators import (
    POINTWISE,
    AttentionGenerator,
    MakeAct,
    MakeNorm,
    NeighbourhoodGenerator,
    SpanGenerator,
    build,
)
from involution.inference import NOTHING
from involution.ops.functional import generated_involution, involution
from involution.ops.unwatched import autocast_enabled
from involution.ops.window import IntOrInts, Window, whole
from involution.pointwise import traced


class _Involution(nn.Module):
    """Involution over `rank` spatial axes; its three faces differ in nothing else."""

    rank: int

    def __init__(
        self,
        channels: int,
        kernel_size: IntOrInts = 7,
        stride: IntOrInts = 1,
        padding: IntOrInts | None = None,
        dilation: IntOrInts = 1,
        groups: int | None = None,
        group_channels: int | None = None,
        reduction: int = 4,
        out_channels: int | None = None,
        norm: MakeNorm = None,
        act: MakeAct = nn.ReLU,
        generator: str | Callable[[Tensor], Tensor] = "bottleneck",
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.channels = whole("channels", channels)
        self.groups = _groups(channels, groups, group_channels)
        if padding is None:
            both = Window.normalise(self.rank, kernel_size, stride, 0, dilation).same_padding()
            if any(before != after for before, after in both):
                raise ValueError(
                    f"no `padding` keeps the size with `kernel_size` {kernel_size} and `dilation` {dilation}; "
                    "give `padding` yourself."
                )
            padding = tuple(before for before, _ in both)
        self.window = Window.normalise(self.rank, kernel_size, stride, padding, dilation)
        sides = zip(self.window.padding, self.window.same_padding(), strict=True)
        self._overhang = [p - same for p, both in reversed(list(sides)) for same in both]  # of `x` over window centres
        self.reduction = reduction
        if isinstance(generator, str):
            sizes = (self.window.kernel_size, self.window.stride, self.window.dilation)
            generator = build(generator, channels, self.groups, *sizes, reduction, norm, act)
        if not callable(generator):
            raise TypeError(f"`generator` must be callable, from x to the kernel; got {generator!r}.")
        self._check(generator)
        self.generator = generator
        width = channels if out_channels is None else whole("out_channels", out_channels)
        self.project = nn.Identity() if width == channels else POINTWISE[self.rank - 1](channels, width)

    def _check(self, generator: object) -> None:
        """Hold a generator of ours against the layer: it may have been made for another."""
        window = self.window
        wanted = {"shape": (self.groups, *window.kernel_size), "stride": window.stride, "dilation": window.dilation}
        if isinstance(generator, (SpanGenerator, AttentionGenerator)):
            for name, value in wanted.items():
                given = getattr(generator, name, value)
                if given != value:
                    raise ValueError(f"`generator` must have the layer's {name} {value}; got one of {name} {given}.")
        if isinstance(generator, (NeighbourhoodGenerator, AttentionGenerator)) and min(self._overhang) < 0:
            same = tuple(before for before, _ in window.same_padding())
            raise ValueError(
                f"`padding` must be at least {same} for {type(generator).__name__}, which looks around every centre; "
                f"got {window.padding}. Use more, and crop the output."
            )

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return traced(self, x)
        if type(self) in _LAYERS and (y := inference.at_once(self, x)) is not None:
            return y
        if not isinstance(x, Tensor):
            raise TypeError(f"`x` must be a tensor; got {type(x).__name__}.")
        if x.dim() != self.rank + 2 or x.shape[1] != self.channels:
            raise ValueError(
                f"`x` must have shape (B, {self.channels}, {self.rank} spatial sizes) for {type(self).__name__} with "
                f"{self.channels} channels; got {tuple(x.shape)}."
            )
        weight = next(self.parameters(), None)
        if weight is not None and x.device != weight.device:
            raise ValueError(f"`x` and the layer must share a device; got {x.device} and {weight.device}.")
        if weight is not None and x.dtype != weight.dtype and not autocast_enabled(x.device.type):
            raise TypeError(
                f"`x` and the layer must share a dtype; got {x.dtype} and {weight.dtype}. "
                "Convert one with `.to()`, or work under torch.autocast."
            )
        self.window.output_size(x.shape[2:])  # a window too large for x is said before the generator runs
        return self.project(self._involve(x))

    def _involve(self, x: Tensor) -> Tensor:
        window, generator, centres = self.window, self.generator, self.centres(x)
        settings = (window.stride, window.padding, window.dilation)
        if self.fused and isinstance(generator, SpanGenerator) and generator.is_plain():
            features, weight, bias = generator.features(centres), generator.span.weight.flatten(1), generator.span.bias
            assert bias is not None  # ours has one
            return generated_involution(x, features, weight, bias, window.kernel_size, *settings)
        return involution(x, generator(centres), *settings)

    def centres(self, x: Tensor) -> Tensor:
        """`x` cut (or padded with zeros) to the positions window centres can lie on: all of `x` by default."""
        return F.pad(x, self._overhang) if any(self._overhang) else x

    def extra_repr(self) -> str:
        window = self.window
        return (
            f"{self.channels}, kernel_size={window.kernel_size}, stride={window.stride}, padding={window.padding}, "
            f"dilation={window.dilation}, groups={self.groups}"
        )


def followed(
    layer: nn.Module, x: Tensor, norm: nn.Module = NOTHING, act: nn.Module = NOTHING, beside: Tensor | None = None
) -> Tensor:
    """act(norm(layer(x)) + beside), by fewer passes over memory where a network only infers and nothing watches."""
    if isinstance(layer, _Involution):
        out = inference.at_once(layer, x, norm, act) if beside is None and type(layer) in _LAYERS else None
    else:
        out = inference.convolved(layer, x, norm, act, beside)
    if out is not None:
        return out
    unseen = inference.is_unseen(layer)  # asked before, too: a hook may take itself away
    y: Tensor = layer(x)
    if unseen and inference.is_unseen(layer) and inference.follow(y, norm, act, beside):
        return y
    y = y if norm is NOTHING else norm(y)  # it is in no network, so that torch.fx could not name it
    if beside is not None:
        y += beside
    return y if act is NOTHING else act(y)


class Involution1d(_Involution):
    """Involution over sequences (B, C, L); see `Involution2d`."""

    rank = 1


class Involution2d(_Involution):
    """Involution over images: generates a kernel at every output position, then applies it.

    Args:
        channels: C, of input and output; the field's default, 16 channels a group, must divide it.
        kernel_size: *K, an int or one per axis.
        stride: step between outputs, an int or one per axis.
        padding: zeros on both sides, an int or one per axis. Default: what keeps the size at stride 1.
        dilation: step between taps, an int or one per axis.
        groups: G, kernels per position. Give this or `group_channels`.
        group_channels: D = C / G, channels that share a kernel. Default 16.
        reduction: r, how much narrower the generator's bottleneck is than C.
        out_channels: another width for the output, by a 1x1 projection. Default: C.
        norm: called with C / r, gives the generator's normalisation. Default: batch norm.
        act: called without arguments, gives the generator's activation.
        generator: "bottleneck", the paper's; "linear", "neighbourhood" or "attention", see `involution.generators`; or
            any callable from x, cut to the window centres, to the kernel (B, G, *K, *O). `reduction`, `norm` and `act`
            have a meaning where the generator has such a part.
        fused: generate the kernel part by part where it is used, and again in the backward pass, instead of storing it,
            if the generator ends in a span, as all but "attention" do, and no hook watches it. Faster, and training
            keeps less in memory; in float32 on a GPU the backward pass is slower.

    Shapes: (B, C, *S) -> (B, out_channels, *O), O = floor((S + 2 padding - dilation (K - 1) - 1) / stride) + 1;
    with the default padding O = ceil(S / stride).

    Raises:
        TypeError, ValueError: if the settings contradict one another, or `x` does not fit them.

    Example:
        >>> import torch
        >>> layer = Involution2d(64, kernel_size=7, stride=2)
        >>> layer(torch.randn(1, 64, 13, 13)).shape
        torch.Size([1, 64, 7, 7])

    Source: Li et al., CVPR 2021.
    """

    rank = 2


class Involution3d(_Involution):
    """Involution over volumes (B, C, D, H, W); see `Involution2d`."""

    rank = 3


_LAYERS = (Involution1d, Involution2d, Involution3d)  # a subclass may compute something else


def _groups(channels: int, groups: int | None, group_channels: int | None) -> int:
    if groups is not None and group_channels is not None:
        raise ValueError(f"give `groups` or `group_channels`, not both; got {groups} and {group_channels}.")
    name, value = ("groups", groups) if groups is not None else ("group_channels", group_channels)
    value = 16 if value is None else whole(name, value)
    if channels % value:
        divisors = ", ".join(str(d) for d in range(1, channels + 1) if channels % d == 0)
        raise ValueError(
            f"`{name}` must divide the channels; got {name} {value} and {channels} channels. Choose from {divisors}."
        )
    return channels // value if groups is None else value
