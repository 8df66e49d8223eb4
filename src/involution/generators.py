"""Kernel generators: what an involution layer computes its kernels by."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import _has_any_global_hook

from involution.names import unknown
from involution.ops.functional import local_products
from involution.ops.window import per_axis, whole
from involution.pointwise import PointwiseConv1d, PointwiseConv2d, PointwiseConv3d, fold_norms, is_watched

POINTWISE = (PointwiseConv1d, PointwiseConv2d, PointwiseConv3d)
_CONV: tuple[Callable[..., _ConvNd], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NAMES = ("bottleneck", "linear", "neighbourhood", "attention")

MakeNorm = Callable[[int], nn.Module] | None
MakeAct = Callable[[], nn.Module]


class SpanGenerator(nn.Module):
    """A kernel generator that ends in a 1x1 convolution, `span`, from features to the kernel.

    A subclass makes the span, and the features; a layer may then generate the kernel where it uses it, without calling
    the generator.

    Args:
        groups: G, kernels per position.
        kernel_size: *K, one int per spatial axis; its length sets the number of axes, one to three.
        stride: step between output positions, one int per axis.

    Shapes: (B, C, *S) -> (B, G, *K, *O) with O = ceil(S / stride).
    """

    span: _ConvNd

    def __init__(self, groups: int, kernel_size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        super().__init__()
        kernel_size, self.stride = _per_axis(kernel_size, stride)
        self.shape = (whole("groups", groups), *kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Generate the kernel from `x`."""
        return self.span(self.features(x)).unflatten(1, self.shape)

    def features(self, x: Tensor) -> Tensor:
        """What the span turns into the kernel, (B, R, *O)."""
        raise NotImplementedError

    def _pool(self, x: Tensor) -> Tensor:
        return pool(x, self.stride)

    def is_plain(self) -> bool:
        """Whether nobody watches or changes the kernel: no hook, no other span in place of the 1x1 convolution."""
        span = self.span
        return (
            type(self).forward is SpanGenerator.forward
            and type(span) in POINTWISE
            and span.bias is not None
            and not (is_watched(self) or is_watched(span) or _has_any_global_hook())
        )


class BottleneckGenerator(SpanGenerator):
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
        norm: MakeNorm = None,
        act: MakeAct = nn.ReLU,
    ) -> None:
        super().__init__(groups, kernel_size, stride)
        hidden = _hidden(channels, reduction)
        for name, value, gives in (("norm", norm, "nn.BatchNorm2d"), ("act", act, "nn.ReLU")):
            if isinstance(value, nn.Module) or not (callable(value) or (value is None and name == "norm")):
                raise TypeError(f"`{name}` must be what makes a module, such as {gives}, not a module; got {value!r}.")
        self.reduce = self._reduce(channels, hidden)
        self.norm = (_NORM[len(kernel_size) - 1] if norm is None else norm)(hidden)
        self.act = act()
        self.span = _span(hidden, self.shape)

    def _reduce(self, channels: int, hidden: int) -> nn.Module:
        return POINTWISE[len(self.stride) - 1](channels, hidden, bias=False)

    def features(self, x: Tensor) -> Tensor:
        """What the span turns into the kernel, (B, C / reduction, *O)."""
        features: Tensor = self.act(self.norm(self.reduce(self._pool(x))))
        return features

    def fuse(self) -> Self:
        """Fold the norm into `reduce`; `timm.utils.reparameterize_model` calls this. See `fold_norms`."""
        fold_norms(self, reduce="norm")
        return self


class LinearGenerator(SpanGenerator):
    """One 1x1 convolution from the input to the kernel, the paper's ablation of the bottleneck.

    [average pool if stride > 1] -> span 1x1 (C -> G * T).

    Args:
        channels: C, channels of the input.
        groups: G, kernels per position.
        kernel_size: *K, one int per spatial axis; its length sets the number of axes, one to three.
        stride: step between output positions, one int per axis.

    Shapes: (B, C, *S) -> (B, G, *K, *O) with O = ceil(S / stride).
    """

    def __init__(self, channels: int, groups: int, kernel_size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        super().__init__(groups, kernel_size, stride)
        self.span = _span(whole("channels", channels), self.shape)

    def features(self, x: Tensor) -> Tensor:
        """The input itself, pooled to the output positions, (B, C, *O)."""
        return self._pool(x)


class NeighbourhoodGenerator(BottleneckGenerator):
    """A bottleneck that looks around: its reduce is a K x K convolution, so a kernel depends on a neighbourhood.

    reduce K x K of the layer's stride (C -> C / reduction) -> norm -> act -> span 1x1 (-> G * T).

    Args and shapes are those of `BottleneckGenerator`; the neighbourhood is of the size of the kernel.

    Raises:
        ValueError: if `reduction` does not divide `channels`, or a kernel size is even.
    """

    def _reduce(self, channels: int, hidden: int) -> nn.Module:
        size = self.shape[1:]
        if any(side % 2 == 0 for side in size):
            raise ValueError(f"`kernel_size` must be odd for a neighbourhood around each position; got {size}.")
        return _CONV[len(size) - 1](channels, hidden, size, self.stride, tuple(side // 2 for side in size), bias=False)

    def features(self, x: Tensor) -> Tensor:
        """What the span turns into the kernel, (B, C / reduction, *O)."""
        features: Tensor = self.act(self.norm(self.reduce(x)))
        return features


class AttentionGenerator(nn.Module):
    """Local self-attention as a kernel generator: products of a query with the keys around it are the kernel.

    kernel[g, t, o] = softmax over t of query[g, o] . (key[g, o + t] + position[g, t]) / sqrt(R / G), both of R channels
    in G heads, made from x by 1x1 convolutions; the query of a strided layer is made from x pooled. Outside of x keys
    are zero, and take part. The values are x itself: put a 1x1 convolution before the layer for others.

    Args:
        channels: C, channels of the input.
        groups: G, heads.
        kernel_size: *K, odd, one int per spatial axis; its length sets the number of axes, one to three.
        stride: step between output positions, one int per axis.
        dilation: step between keys, one int per axis; that of the layer. Default: one.
        reduction: r, how many times narrower queries and keys are than the input; C / r is a multiple of G.
        position: add a learnt vector per tap and head to the keys.
        softmax: normalise over taps; else the kernel is the scaled products.

    Shapes: (B, C, *S) -> (B, G, *K, *O) with O = ceil(S / stride).

    Raises:
        ValueError: if the sizes do not divide one another, or a kernel size is even.

    Source: Li et al., CVPR 2021, section 4.2: self-attention is an involution with such a kernel. The form over
    neighbourhoods is that of Ramachandran et al., "Stand-Alone Self-Attention in Vision Models", NeurIPS 2019.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...] | None = None,
        reduction: int = 4,
        position: bool = True,
        softmax: bool = True,
    ) -> None:
        super().__init__()
        kernel_size, self.stride = _per_axis(kernel_size, stride)
        rank, hidden = len(kernel_size), _hidden(channels, reduction)
        self.dilation = per_axis("dilation", 1 if dilation is None else dilation, rank, 1)
        self.shape = (whole("groups", groups), *kernel_size)
        self.softmax = softmax
        if any(side % 2 == 0 for side in kernel_size):
            raise ValueError(f"`kernel_size` must be odd for keys around each query; got {kernel_size}.")
        if hidden % groups:
            raise ValueError(
                f"`groups` must divide the {hidden} channels of queries and keys; got {groups} groups. Use a smaller "
                "`reduction` or fewer groups."
            )
        self.query, self.key = (POINTWISE[rank - 1](channels, hidden, bias=False) for _ in range(2))
        self.position: nn.Parameter | None = None
        if position:
            self.position = nn.Parameter(torch.empty(groups, prod(kernel_size), hidden // groups))
            nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Generate the kernel from `x`."""
        groups, *kernel_size = self.shape
        query, key = self.query(pool(x, self.stride)), self.key(x)
        padding = tuple(d * (k - 1) // 2 for d, k in zip(self.dilation, kernel_size, strict=True))
        products = local_products(query, key, groups, kernel_size, self.stride, padding, self.dilation)
        logits = products.flatten(2, 1 + len(kernel_size))
        heads = query.unflatten(1, (groups, -1))
        if self.position is not None:
            logits = logits + torch.einsum("bgd...,gtd->bgt...", heads, self.position)
        logits = logits * heads.shape[2] ** -0.5
        return (logits.softmax(2) if self.softmax else logits).unflatten(2, kernel_size)


def build(
    name: str,
    channels: int,
    groups: int,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    reduction: int,
    norm: MakeNorm,
    act: MakeAct,
) -> nn.Module:
    """The generator called `name`, with those settings that it has.

    Raises:
        ValueError: if there is none of this name, or the settings do not fit it.
    """
    if name == "bottleneck":
        return BottleneckGenerator(channels, groups, kernel_size, stride, reduction, norm, act)
    if name == "linear":
        return LinearGenerator(channels, groups, kernel_size, stride)
    if name == "neighbourhood":
        return NeighbourhoodGenerator(channels, groups, kernel_size, stride, reduction, norm, act)
    if name == "attention":
        return AttentionGenerator(channels, groups, kernel_size, stride, dilation, reduction)
    raise ValueError(f"`generator`: {unknown('generator', name, _NAMES)}")


def pool(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`x` averaged over `stride`; windows that overhang average what they cover."""
    if max(stride) == 1:
        return x
    window = tuple(map(min, stride, x.shape[2:]))  # torch refuses a 3-D window larger than x
    if len(window) == 3 and x.dtype.itemsize == 2:  # and has no 3-D pool for half types on a CPU
        return pool(x.float(), stride).to(x.dtype)
    # Nothing is padded, so `count_include_pad` changes no value; without it the compiled backward pass divides
    # overhanging windows by the wrong count (pytorch issue 198119).
    return _POOL[len(window) - 1](x, window, stride, ceil_mode=True, count_include_pad=False)


def _per_axis(kernel_size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not (isinstance(kernel_size, tuple) and 1 <= len(kernel_size) <= 3):
        raise TypeError(f"`kernel_size` must be a tuple of 1 to 3 ints, one per spatial axis; got {kernel_size!r}.")
    rank = len(kernel_size)
    return per_axis("kernel_size", kernel_size, rank, 1), per_axis("stride", stride, rank, 1)


def _hidden(channels: int, reduction: int) -> int:
    channels = whole("channels", channels)
    if channels % whole("reduction", reduction):
        raise ValueError(f"`reduction` must divide the channels; got reduction {reduction} and {channels} channels.")
    return channels // reduction


def _span(hidden: int, shape: tuple[int, ...]) -> _ConvNd:
    return POINTWISE[len(shape) - 2](hidden, prod(shape))
