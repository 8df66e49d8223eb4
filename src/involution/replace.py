"""Involutions in place of the convolutions of any network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from involution.nn import Involution1d, Involution2d, Involution3d

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
        involution: any other argument of `Involution2d` but window and width, such as `group_channels`.

    Raises:
        ValueError: if `kernel_size` is even.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1))
        >>> print(replace_convs(net))
        1 convolutions replaced, 1 left as they were
          2: 32 -> 64 channels, 3x3 convolution of stride 2 -> 7x7 involution
          0 stays: its 3 channels do not divide into groups of 16
        parameters: 19,392 before, 4,162 after (-78.5%)
    """
    if kernel_size % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd, so that windows keep their centres; got {kernel_size}.")
    before = _counts(network, image)
    replaced: dict[str, str] = {}
    skipped: dict[str, str] = {}
    done: dict[nn.Module, nn.Module] = {}  # a convolution used in two places gives one involution
    for parent_name, parent in list(network.named_modules()):
        for child_name, conv in list(parent.named_children()):
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if not isinstance(conv, _ConvNd) or max(conv.kernel_size) == 1 or (where and not where(name, conv)):
                continue
            reason = _unfit(conv, kernel_size, involution)
            if reason:
                skipped[name] = reason
                continue
            if conv not in done:
                done[conv] = _involution(conv, kernel_size, involution)
            setattr(parent, child_name, done[conv])
            replaced[name] = _described(conv, kernel_size)
    (parameters, macs), (parameters_now, macs_now) = before, _counts(network, image)
    return Replacement(
        replaced, skipped, (parameters, parameters_now), None if macs is None or macs_now is None else (macs, macs_now)
    )


def _unfit(conv: _ConvNd, kernel_size: int, settings: dict[str, Any]) -> str:
    """Why no involution can take the place of `conv`; empty if one can."""
    if type(conv) not in _LAYERS:
        return f"it is a {type(conv).__name__}"
    if conv.padding_mode != "zeros":
        return f"its padding mode is {conv.padding_mode!r}"
    if isinstance(conv.padding, str) and max(conv.stride) > 1:
        return f"its padding is {conv.padding!r}"
    if any(size % 2 == 0 for size in conv.kernel_size):
        return f"its kernel size {conv.kernel_size} is even"
    if max(conv.kernel_size) > kernel_size:
        return f"its kernel size {conv.kernel_size} is larger than {kernel_size}"
    if "groups" in settings and conv.in_channels % settings["groups"]:
        return f"its {conv.in_channels} channels do not divide into {settings['groups']} groups"
    per_group = settings.get("group_channels", 16)
    if "groups" not in settings and conv.in_channels % per_group:
        return f"its {conv.in_channels} channels do not divide into groups of {per_group}"
    if conv.in_channels % settings.get("reduction", 4):
        return f"its {conv.in_channels} channels cannot be reduced by {settings.get('reduction', 4)}"
    return ""


def _involution(conv: _ConvNd, kernel_size: int, settings: dict[str, Any]) -> nn.Module:
    """A layer whose output has the size of that of `conv`."""
    padding = _padding(conv)
    wider = [
        before + dilation * (kernel_size - size) // 2
        for before, dilation, size in zip(padding, conv.dilation, conv.kernel_size, strict=True)
    ]
    layer = _LAYERS[type(conv)](
        conv.in_channels,
        kernel_size,
        stride=conv.stride,
        padding=tuple(wider),
        dilation=conv.dilation,
        out_channels=conv.out_channels,
        **settings,
    )
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
    from involution.analysis import cost  # imports much that `import involution` need not

    if image is None:
        return cost.parameters(network), None
    modes = {module: module.training for module in network.modules()}
    macs = cost.macs(network.eval(), image)
    for module, training in modes.items():
        module.training = training
    return cost.parameters(network), macs
