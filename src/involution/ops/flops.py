"""FLOP formulas of the ops for `torch.utils.flop_counter.FlopCounterMode`.

Each op does one multiply-add, counted as two FLOPs, for every channel, tap and output position; a generated kernel
takes those of its 1x1 convolution besides, and a 1x1 convolution does one for every input channel and output.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_Shape = Sequence[int]


def register_when_counted() -> None:
    """Register the formulas as soon as torch's counter is imported.

    Not before: importing the counter imports triton, which `import involution` must not cost.
    """
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _OnImport())


class _OnImport(MetaPathFinder):
    """Lets the counter be found as usual and registers the formulas right after it has run."""

    _searching = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER or self._searching:
            return None
        self._searching = True  # so that the search below passes us by
        spec = importlib.util.find_spec(name)
        self._searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            sys.modules.setdefault(name, module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # this one loader object only
        return spec


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.involution
    register_flop_formula(ops.forward)(_forward)
    register_flop_formula(ops.generated)(_generated)
    register_flop_formula(ops.generated_grad_x)(_generated_grad_x)
    register_flop_formula(ops.grad_span)(_grad_span)
    register_flop_formula(ops.grad_x)(_grad_x)
    register_flop_formula(ops.grad_kernel)(_grad_kernel)
    register_flop_formula(ops.pointwise)(_pointwise)
    register_flop_formula(ops.layer)(_layer)


def _forward(x: _Shape, kernel: _Shape, *window: Any, out_shape: _Shape, **_: Any) -> int:
    return 2 * prod(out_shape) * prod(kernel[2 : len(x)])


def _generated(
    x: _Shape,
    features: _Shape,
    weight: _Shape,
    bias: _Shape,
    kernel_size: _Shape,
    *window: Any,
    out_shape: _Shape,
    **_: Any,
) -> int:
    return 2 * prod(out_shape) * prod(kernel_size) + 2 * prod(features) * weight[0]


def _generated_grad_x(
    grad: _Shape,
    features: _Shape,
    weight: _Shape,
    bias: _Shape,
    size: _Shape,
    kernel_size: _Shape,
    *window: Any,
    **_: Any,
) -> int:
    return 2 * prod(grad) * prod(kernel_size) + 2 * prod(features) * weight[0]


def _grad_span(
    grad: _Shape, x: _Shape, features: _Shape, weight: _Shape, kernel_size: _Shape, *window: Any, **_: Any
) -> int:
    return 2 * prod(grad) * prod(kernel_size) + 4 * prod(features) * weight[0]


def _grad_x(grad: _Shape, kernel: _Shape, *size_and_window: Any, **_: Any) -> int:
    return 2 * prod(grad) * prod(kernel[2 : len(grad)])


def _grad_kernel(grad: _Shape, x: _Shape, groups: int, kernel_size: _Shape, *window: Any, **_: Any) -> int:
    return 2 * prod(grad) * prod(kernel_size)


def _pointwise(x: _Shape, weight: _Shape, *rest: Any, out_shape: _Shape, **_: Any) -> int:
    return 2 * prod(out_shape) * weight[1]


def _layer(x: _Shape, source: _Shape, reduce: _Shape, *rest: Any, out_shape: _Shape, **_: Any) -> int:
    span, kernel_size = rest[7], rest[15]
    places = prod(source) // source[1]
    return 2 * prod(out_shape) * prod(kernel_size) + 2 * places * reduce[0] * (reduce[1] + span[0])
