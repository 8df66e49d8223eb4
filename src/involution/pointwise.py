"""1x1 convolutions, and norms folded into the convolutions before them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval


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
