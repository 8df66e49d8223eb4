"""Involution (Li et al., CVPR 2021) for PyTorch: the operator, its layers, the RedNet backbones and their training."""

from involution.generators import BottleneckGenerator
from involution.nn import Involution1d, Involution2d, Involution3d
from involution.ops import flops
from involution.ops.functional import involution
from involution.ops.library import implementations
from involution.replace import replace_convs

__version__ = "0.1.0"
__all__ = [
    "BottleneckGenerator",
    "Involution1d",
    "Involution2d",
    "Involution3d",
    "implementations",
    "involution",
    "replace_convs",
]

flops.register_when_counted()
