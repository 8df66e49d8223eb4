"""Networks made of involutions. Importing this package registers the RedNets with timm."""

from involution.models.rednet import RedNet, mirrored_resnet

__all__ = ["RedNet", "mirrored_resnet"]
