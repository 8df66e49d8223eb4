"""Involutions in place of the convolutions of any network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from involution.nn import Involution1d, Involution2d, Involution3d, _Involution
from involution.ops.window import whole

_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: Involution1d,
    nn.Conv2d: Involution2d,
    nn.Conv3d: Involution3d,
}


@dataclass(frozen=True)
class Replacement:
    """What `replace_convs` did.

    Args:
        replaced: for each convolution by name, what it was and what took its place.
        skipped: for each convolution that stayed, by name, why.
        parameters: of the network, before and after.
        macs: multiply-adds of the network on the image it was given, before and after; None without an image.
    """

    replaced: dict[str, str]
    skipped: dict[str, str]
    parameters: tuple[int, int]
    macs: tuple[int, int] | None

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} convolutions replaced, {len(self.skipped)} left as they were"]
        lines += [f"  {name}: {text}" for name, text in self.replaced.items()]
        lines += [f"  {name} stays: {reason}" for name, reason in self.skipped.items()]
        for what, counts in (("parameters", self.parameters), ("multiply-adds", self.macs)):
            if counts and counts[0]:
                before, after = counts
                lines.append(f"{what}: {before:,} before, {after:,} after ({after / before - 1:+.1%})")
        return "\n".join(lines)


def replace_convs(
    network: nn.Module,
    where: Callable[[str, nn.Module], bool] | None = None,
    kernel_size: int = 7,
    image: Tensor | None = None,
    **involution: Any,
) -> Replacement:
    """Put involutions in place of the k x k convolutions of `network`, in place: same stride, dilation and output size.

    Where the widths of a convolution differ, the involution is followed by a 1x1 projection. The new layers are
    untrained, on the device and of the dtype of what they replace. 1x1 convolutions stay; others that stay are named.

    Args:
        network: any module; it is changed.
        where: called with the name and the convolution, says whether to replace it. Default: all.
        kernel_size: of the involutions, odd; larger convolutions stay.
        image: what the network takes, to count multiply-adds before and after.
        involution: any other argument of `Involution2d` but window and widths, such as `group_channels`. A convolution
            that they do not fit stays.

    Raises:
        TypeError, ValueError: if `kernel_size` is even, or a setting fits no layer; the network is then unchanged.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1))
        >>> print(replace_convs(net))
        1 convolutions replaced, 1 left as they were
          2: 32 -> 64 channels, 3x3 convolution of stride 2 -> 7x7 involution
          0 stays: `group_channels` must divide the channels; got group_channels 16 and 3 channels. Choose from 1, 3
        parameters: 19,392 before, 4,162 after (-78.5%)
    """
    _check(network, kernel_size, involution)
    before = _counts(network, image)
    layers: dict[_ConvNd, nn.Module | str] = {}  # or why there is none; a convolution used twice gives one involution
    places: list[tuple[nn.Module, str, str, _ConvNd]] = []
    own = {part for layer in network.modules() if isinstance(layer, _Involution) for part in layer.modules()}
    for parent_name, parent in network.named_modules():
        if parent in own:  # a generator may look around by a convolution
            continue
        for child_name, conv in parent._modules.items():
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if isinstance(conv, _ConvNd) and max(conv.kernel_size) > 1 and (where is None or where(name, conv)):
                if conv not in layers:
                    layers[conv] = _involution(conv, kernel_size, involution)
                places.append((parent, child_name, name, conv))
    replaced: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for parent, child_name, name, conv in places:  # only now, so that an error changes nothing
        layer = layers[conv]
        if isinstance(layer, str):
            skipped[name] = layer
        else:
            setattr(parent, child_name, layer)
            replaced[name] = _described(conv, kernel_size)
    (parameters, macs), (parameters_now, macs_now) = before, _counts(network, image)
    return Replacement(
        replaced, skipped, (parameters, parameters_now), None if macs is None or macs_now is None else (macs, macs_now)
    )


def _check(network: nn.Module, kernel_size: int, settings: dict[str, Any]) -> None:
    if isinstance(network, _ConvNd):
        raise ValueError("`network` is itself a convolution, which cannot be replaced in place; make an involution.")
    if whole("kernel_size", kernel_size) % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd, so that windows keep their centres; got {kernel_size}.")
    for name in ("channels", "stride", "padding", "dilation", "out_channels"):
        if name in settings:
            raise TypeError(f"`{name}` is that of each convolution; got {settings[name]!r}. Leave it out.")
    for name in ("groups", "group_channels", "reduction"):
        if settings.get(name) is not None:
            whole(name, settings[name])


def _involution(conv: _ConvNd, kernel_size: int, settings: dict[str, Any]) -> nn.Module | str:
    """A layer whose output has the size of that of `conv`; or why none can take its place."""
    if type(conv) not in _LAYERS:
        return f"it is a {type(conv).__name__}"
    if conv.padding_mode != "zeros":
        return f"its padding mode is {conv.padding_mode!r}"
    if any(size % 2 == 0 for size in conv.kernel_size):
        return f"its kernel size {conv.kernel_size} is even"
    if max(conv.kernel_size) > kernel_size:
        return f"its kernel size {conv.kernel_size} is larger than {kernel_size}"
    padding = tuple(
        before + dilation * (kernel_size - size) // 2
        for before, dilation, size in zip(_padding(conv), conv.dilation, conv.kernel_size, strict=True)
    )
    window = {"stride": conv.stride, "padding": padding, "dilation": conv.dilation}
    try:
        layer = _LAYERS[type(conv)](conv.in_channels, kernel_size, out_channels=conv.out_channels, **window, **settings)
    except ValueError as error:  # its widths do not fit the settings
        return str(error).removesuffix(".")
    return layer.to(conv.weight.device, conv.weight.dtype).train(conv.training)


def _padding(conv: _ConvNd) -> tuple[int, ...]:
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return tuple(int(p) for p in conv.padding)


def _described(conv: _ConvNd, kernel_size: int) -> str:
    widths = f"{conv.in_channels} -> {conv.out_channels} channels"
    stride = f" of stride {'x'.join(map(str, conv.stride))}" if max(conv.stride) > 1 else ""
    if len(set(conv.stride)) == 1:
        stride = stride.partition("x")[0]
    old, new = "x".join(map(str, conv.kernel_size)), "x".join([str(kernel_size)] * len(conv.kernel_size))
    return f"{widths}, {old} convolution{stride} -> {new} involution"


def _counts(network: nn.Module, image: Tensor | None) -> tuple[int, int | None]:
    """Parameters and multiply-adds; the network keeps its mode and statistics."""
    from involution import cost  # imports much that `import involution` need not

    if image is None:
        return cost.parameters(network), None
    modes = {module: module.training for module in network.modules()}
    try:
        macs = cost.macs(network.eval(), image)
    finally:
        for module, training in modes.items():
            module.training = training
    return cost.parameters(network), macs
