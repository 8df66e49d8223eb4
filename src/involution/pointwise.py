"""1x1 convolutions, and norms folded into the convolutions before them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from involution.ops.inferred import Product, pointwise

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Pointwise(_ConvNd):
    """What the pointwise convolutions of all ranks share."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return traced(self, x)
        y = pointwise(x, Product(self.weight, self.bias), self.stride)
        if y is not None:
            return y
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


def traced(module: nn.Module, x: Proxy) -> Any:
    """A call of `module` as one node of a graph of torch.fx, which cannot follow what depends on sizes and devices."""
    tracer: Any = x.tracer
    path = tracer.path_of_module(module)
    if not path:
        raise TypeError(f"{type(module).__name__} is one node to torch.fx; trace a network that holds it.")
    return tracer.create_proxy("call_module", path, (x,), {})


def is_watched(module: nn.Module) -> bool:
    """Whether somebody notices or changes how `module` is called: by a hook, or by a `forward` of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def fold_norms(module: nn.Module, **norms: str) -> None:
    """Fold batch norms into the convolutions before them, for inference: the same numbers to rounding, sooner.

    Args:
        module: in evaluation mode; changed in place.
        norms: by the name of a child that is a convolution, the name of the norm that follows it, which becomes an
            identity. Children of other types, norms without running statistics, and what has hooks or parametrizations
            stay as they are.

    Raises:
        ValueError: if `module` is in training mode.
    """
    if module.training:
        raise ValueError("`module` must be in evaluation mode for its norms to be folded. Call `.eval()` first.")
    for conv_name, norm_name in norms.items():
        conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
        if not isinstance(conv, _ConvNd) or not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        # A norm of another type may do more than normalise, as timm's with an activation do; weights that are made
        # from others are no parameters.
        plain = type(norm) in NORMS and conv._parameters.get("weight") is not None
        if plain and not (conv._forward_hooks or "forward" in conv.__dict__ or is_watched(norm)):
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())
