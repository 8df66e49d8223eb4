"""Involution layers: a kernel generator and the operator, in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from operator import index
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from involution.ops.functional import autocast_enabled, generated_involution, involution
from involution.ops.window import IntOrInts, Window, per_axis


class _Pointwise(_ConvNd):
    """What the pointwise convolutions of all ranks share."""

    def forward(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1)
        if x.device.type != "cpu" or x.dim() != self.weight.dim() or not last.is_contiguous():
            return super().forward(x)  # of the convolution that is mixed in
        if max(self.stride) > 1:
            last = last[(slice(None), *(slice(None, None, step) for step in self.stride))]
        return F.linear(last, self.weight.flatten(1), self.bias).movedim(-1, 1)


class PointwiseConv1d(_Pointwise, nn.Conv1d):
    """A 1x1 convolution over sequences; see `PointwiseConv2d`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=bias)


class PointwiseConv2d(_Pointwise, nn.Conv2d):
    """A 1x1 convolution over images, done as one matrix product where channels lie innermost on a CPU.

    The library behind torch's convolution sorts the weights anew in every call, and takes small images for a case of
    its own, in another layout; the matrix product does neither. Parameters are those of `nn.Conv2d`.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        stride: step between output positions.
        bias: add one number per output channel.

    Shapes: (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=bias)


class PointwiseConv3d(_Pointwise, nn.Conv3d):
    """A 1x1 convolution over volumes; see `PointwiseConv2d`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=bias)


_CONV = (PointwiseConv1d, PointwiseConv2d, PointwiseConv3d)
_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_norms(module: nn.Module, **norms: str) -> None:
    """Fold batch norms into the convolutions before them, for inference: the same numbers to rounding, sooner.

    Args:
        module: in evaluation mode; changed in place.
        norms: by the name of a child that is a convolution, the name of the norm that follows it, which becomes an
            identity. Children of other types, and norms without running statistics, stay as they are.

    Raises:
        ValueError: if `module` is in training mode.
    """
    if module.training:
        raise ValueError("`module` must be in evaluation mode for its norms to be folded. Call `.eval()` first.")
    for conv_name, norm_name in norms.items():
        conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
        if isinstance(conv, _ConvNd) and isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())


class BottleneckGenerator(nn.Module):
    """The paper's kernel generator: at every output position, a kernel per group from the channels there.

    [average pool if stride > 1] -> reduce 1x1 (C -> C / reduction) -> norm -> act -> span 1x1 (-> G * T).
    The pool works in ceil mode: the same as the official one on sizes the stride divides, and right on all others.

    Args:
        channels: C, channels of the input.
        groups: G, kernels per position.
        kernel_size: *K, one int per spatial axis; its length sets the number of axes, one to three.
        stride: step between output positions, one int per axis.
        reduction: r, how many times narrower the bottleneck is than the input; it divides C.
        norm: called with C / r, gives the normalisation between reduce and span. Default: batch norm.
        act: called without arguments, gives the activation after it.

    Shapes: (B, C, *S) -> (B, G, *K, *O) with O = ceil(S / stride).

    Raises:
        ValueError: if `reduction` does not divide `channels`.

    Source: Li et al., CVPR 2021, section 4.1 and algorithm 1.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        reduction: int = 4,
        norm: Callable[[int], nn.Module] | None = None,
        act: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        if not (isinstance(kernel_size, tuple) and 1 <= len(kernel_size) <= 3):
            raise TypeError(f"`kernel_size` must be a tuple of 1 to 3 ints, one per spatial axis; got {kernel_size!r}.")
        rank = len(kernel_size)
        kernel_size, stride = per_axis("kernel_size", kernel_size, rank, 1), per_axis("stride", stride, rank, 1)
        channels, groups = _whole("channels", channels), _whole("groups", groups)
        if channels % _whole("reduction", reduction):
            raise ValueError(
                f"`reduction` must divide the channels; got reduction {reduction} and {channels} channels."
            )
        for name, value, gives in (("norm", norm, "nn.BatchNorm2d"), ("act", act, "nn.ReLU")):
            if isinstance(value, nn.Module) or not (callable(value) or (value is None and name == "norm")):
                raise TypeError(f"`{name}` must be what makes a module, such as {gives}, not a module; got {value!r}.")
        conv, hidden = _CONV[rank - 1], channels // reduction
        self.shape = (groups, *kernel_size)
        self.stride = stride
        self.reduce = conv(channels, hidden, bias=False)
        self.norm = (_NORM[rank - 1] if norm is None else norm)(hidden)
        self.act = act()
        self.span = conv(hidden, groups * prod(kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """Generate the kernel from `x`."""
        return self.span(self.features(x)).unflatten(1, self.shape)

    def features(self, x: Tensor) -> Tensor:
        """What the span turns into the kernel, (B, C / reduction, *O)."""
        features: Tensor = self.act(self.norm(self.reduce(self._pool(x))))
        return features

    def fuse(self) -> Self:
        """Fold the norm into `reduce`; `timm.models.reparameterize_model` calls this. See `fold_norms`."""
        fold_norms(self, reduce="norm")
        return self

    def is_plain(self) -> bool:
        """Whether nobody watches or changes the kernel: no hook, no other span in place of the 1x1 convolution."""
        hooks = [
            hooks
            for m in (self, self.span)
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        return (
            type(self) is BottleneckGenerator
            and type(self.span) in _CONV
            and self.span.bias is not None
            and not any(hooks)
        )

    def _pool(self, x: Tensor) -> Tensor:
        """`x` averaged over `stride`; windows that overhang average what they cover."""
        if max(self.stride) == 1:
            return x
        window = tuple(map(min, self.stride, x.shape[2:]))  # torch refuses a 3-D window larger than x
        if len(window) == 3 and x.dtype.itemsize == 2:  # and has no 3-D pool for half types on a CPU
            return self._pool(x.float()).to(x.dtype)
        # Nothing is padded, so `count_include_pad` changes no value; without it the compiled backward pass divides
        # overhanging windows by the wrong count (pytorch issue 198119).
        return _POOL[len(window) - 1](x, window, self.stride, ceil_mode=True, count_include_pad=False)


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
        norm: Callable[[int], nn.Module] | None = None,
        act: Callable[[], nn.Module] = nn.ReLU,
        generator: Callable[[Tensor], Tensor] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.channels = _whole("channels", channels)
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
        if generator is None:
            generator = BottleneckGenerator(
                channels, self.groups, self.window.kernel_size, self.window.stride, reduction, norm, act
            )
        if not callable(generator):
            raise TypeError(f"`generator` must be callable, from x to the kernel; got {generator!r}.")
        self.generator = generator
        width = channels if out_channels is None else _whole("out_channels", out_channels)
        self.project = nn.Identity() if width == channels else _CONV[self.rank - 1](channels, width)

    def forward(self, x: Tensor) -> Tensor:
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
        window, generator, centres = self.window, self.generator, self._centres(x)
        settings = (window.stride, window.padding, window.dilation)
        if self.fused and isinstance(generator, BottleneckGenerator) and generator.is_plain():
            features, weight, bias = generator.features(centres), generator.span.weight.flatten(1), generator.span.bias
            assert bias is not None  # ours has one
            return generated_involution(x, features, weight, bias, window.kernel_size, *settings)
        return involution(x, generator(centres), *settings)

    def _centres(self, x: Tensor) -> Tensor:
        """`x` cut (or padded with zeros) to the positions window centres can lie on: all of `x` by default."""
        return F.pad(x, self._overhang) if any(self._overhang) else x

    def extra_repr(self) -> str:
        window = self.window
        return (
            f"{self.channels}, kernel_size={window.kernel_size}, stride={window.stride}, padding={window.padding}, "
            f"dilation={window.dilation}, groups={self.groups}"
        )


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
        generator: any callable from x, cut to the window centres, to the kernel (B, G, *K, *O), in place of the
            standard `BottleneckGenerator`; `reduction`, `norm` and `act` then have no meaning.
        fused: generate the kernel part by part where it is used, and again in the backward pass, instead of storing it,
            if the generator is the standard one and no hook watches it. Faster, and training keeps less in memory.

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


def _groups(channels: int, groups: int | None, group_channels: int | None) -> int:
    if groups is not None and group_channels is not None:
        raise ValueError(f"give `groups` or `group_channels`, not both; got {groups} and {group_channels}.")
    name, value = ("groups", groups) if groups is not None else ("group_channels", group_channels)
    value = 16 if value is None else _whole(name, value)
    if channels % value:
        divisors = ", ".join(str(d) for d in range(1, channels + 1) if channels % d == 0)
        raise ValueError(
            f"`{name}` must divide the channels; got {name} {value} and {channels} channels. Choose from {divisors}."
        )
    return channels // value if groups is None else value


def _whole(name: str, value: int) -> int:
    """`value` as an int of at least 1; errors name the argument `name`."""
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an int; got {value!r}.") from None
    if number < 1:
        raise ValueError(f"`{name}` must be at least 1; got {value}.")
    return number
