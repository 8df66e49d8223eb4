"""The kernels that a network's involution layers generate, captured while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from involution.nn import Involution2d


@dataclass(frozen=True, eq=False)
class Captured:
    """What one involution layer did with the last batch it saw, on the CPU.

    Attributes:
        name: of the layer in its network.
        layer: the layer.
        input: (B, C, H, W).
        kernel: (B, G, K, K, H', W').
        output: (B, C', H', W').
    """

    name: str
    layer: Involution2d
    input: Tensor
    kernel: Tensor
    output: Tensor

    def sums(self) -> Tensor:
        """The sum of every kernel, (B, G, H', W'): the map the paper shows for each group."""
        return self.kernel.sum((2, 3))

    def patch(self, row: int, column: int, image: int = 0) -> Tensor:
        """What the kernel at a position of the output is multiplied with, (C, K, K); zeros outside of the image."""
        window = self.layer.window
        places = zip((row, column), window.kernel_size, window.stride, window.padding, window.dilation, strict=True)
        rows, columns = ([at * s - p + d * tap for tap in range(k)] for at, k, s, p, d in places)
        x = self.input[image]
        found = x.new_zeros(len(x), *window.kernel_size)
        for i, y in enumerate(rows):
            for j, z in enumerate(columns):
                if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
                    found[:, i, j] = x[:, y, z]
        return found


@contextmanager
def capture_kernels(model: nn.Module) -> Iterator[dict[str, Captured]]:
    """Capture what all involution layers of a network do while it runs, by the names of the layers.

    Inside, layers store their kernels even where they would otherwise generate them in parts; afterwards all is as it
    was. A layer that runs several times is captured the last time. Copies are made, so keep batches small.

    Args:
        model: the network, on any device.

    Raises:
        ValueError: if the network has no involution layer.

    Example:
        >>> import torch
        >>> net = nn.Sequential(Involution2d(32, 3), nn.ReLU())
        >>> with capture_kernels(net) as captured:
        ...     y = net(torch.randn(1, 32, 8, 8))
        >>> captured["0"].kernel.shape
        torch.Size([1, 2, 3, 3, 8, 8])
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Involution2d)}
    if not layers:
        raise ValueError(f"`model` must have involution layers; {type(model).__name__} has none.")
    captured: dict[str, Captured] = {}
    kernels: dict[str, Tensor] = {}
    with ExitStack() as undo:
        for name, layer in layers.items():
            _watch(layer, partial(kernels.__setitem__, name), undo)

            def keep(layer: Involution2d, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
                parts = (part.detach().cpu().clone() for part in (args[0], kernels.pop(name), output))
                captured[name] = Captured(name, layer, *parts)

            undo.callback(layer.register_forward_hook(keep).remove)
        yield captured


def _watch(layer: Involution2d, tell: Callable[[Tensor], None], undo: ExitStack) -> None:
    """Have every kernel of a layer told; a hook also keeps the layer from generating it in parts."""
    generator = layer.generator
    if isinstance(generator, nn.Module):
        undo.callback(generator.register_forward_hook(lambda module, args, kernel: tell(kernel)).remove)
        return

    def recording(x: Tensor) -> Tensor:
        kernel = generator(x)
        tell(kernel)
        return kernel

    layer.generator = recording
    undo.callback(setattr, layer, "generator", generator)
