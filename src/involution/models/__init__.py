"""Networks made of involutions. Importing this package registers the RedNets and `shallow` with timm."""

try:
    from involution.models.rednet import RedNet, mirrored_resnet
    from involution.models.shallow import Shallow
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "timm":
        raise
    raise ModuleNotFoundError("the networks need timm: pip install 'involution[models]'", name="timm") from error

__all__ = ["RedNet", "Shallow", "mirrored_resnet"]
