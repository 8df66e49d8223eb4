"""The geometry of a sliding window: what the user gave, normalised, and the sizes that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

IntOrInts = int | Sequence[int]

_MOST = 2**31 - 1  # beyond any tensor that fits into memory; keeps all arithmetic on sizes within 64 bits


@dataclass(frozen=True, slots=True)
class Window:
    """Where each output looks: `kernel_size`, `stride`, `padding` and `dilation`, one int per spatial axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def normalise(
        cls, rank: int, kernel_size: IntOrInts, stride: IntOrInts, padding: IntOrInts, dilation: IntOrInts
    ) -> Window:
        """The window with every setting spelled out for `rank` axes.

        Raises:
            TypeError: if a setting is neither an int nor a sequence of ints.
            ValueError: if a setting has the wrong number of entries or one that is out of range.
        """
        return cls(
            per_axis("kernel_size", kernel_size, rank, least=1),
            per_axis("stride", stride, rank, least=1),
            per_axis("padding", padding, rank, least=0),
            per_axis("dilation", dilation, rank, least=1),
        )

    def span(self) -> tuple[int, ...]:
        """Input positions from the first tap to the last, per axis."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))

    def same_padding(self) -> tuple[tuple[int, int], ...]:
        """Zeros (before, after) per axis that put every window's centre on an input position."""
        return tuple(((span - 1) // 2, span // 2) for span in self.span())

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Output size O = floor((S + 2 padding - dilation (K - 1) - 1) / stride) + 1 for the input size S.

        Raises:
            ValueError: if the padded input is smaller than the window.
        """
        axes = zip(size, self.padding, self.dilation, self.kernel_size, strict=True)
        room = [s + 2 * p - d * (k - 1) - 1 for s, p, d, k in axes]
        if min(room) < 0:
            raise ValueError(
                f"`x` has spatial size {tuple(size)}, too small for a window that spans {self.span()} with padding "
                f"{self.padding}. Use a smaller `kernel_size` or `dilation`, or more `padding`."
            )
        return tuple(r // s + 1 for r, s in zip(room, self.stride, strict=True))


def per_axis(name: str, value: IntOrInts, rank: int, least: int) -> tuple[int, ...]:
    """`value` as a tuple of `rank` ints, each at least `least`; errors name the argument `name`."""
    # The first two cases are nearly all, and on the way to every call of the operator.
    if type(value) is int and least <= value <= _MOST:
        return (value,) * rank
    if type(value) is tuple and len(value) == rank and all(type(e) is int and least <= e <= _MOST for e in value):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        entries = tuple(value)
        if len(entries) != rank:
            raise ValueError(f"`{name}` must be an int or one int per spatial axis, {rank} here; got {value}.")
    else:
        entries = (value,) * rank
    try:
        entries = tuple(map(index, entries))
    except TypeError:
        raise TypeError(f"`{name}` must be an int or one int per spatial axis, {rank} here; got {value!r}.") from None
    if any(entry < least for entry in entries):
        raise ValueError(f"`{name}` must be at least {least} on every axis; got {value}.")
    if any(entry > _MOST for entry in entries):
        raise ValueError(f"`{name}` must be at most {_MOST} on every axis; got {value}.")
    return entries


def whole(name: str, value: int) -> int:
    """`value` as an int of at least 1; errors name the argument `name`."""
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an int; got {value!r}.") from None
    if number < 1:
        raise ValueError(f"`{name}` must be at least 1; got {value}.")
    return number
