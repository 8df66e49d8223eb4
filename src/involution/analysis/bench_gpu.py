"""The benchmark of a GPU: operator, layer and networks against their rivals; right first, then timed by its clock."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch

from involution import cost
from involution.analysis import contenders, record, table
from involution.analysis.problem import PASSES, Problem, check, problems, timed
from involution.analysis.record import Row
from involution.models import mirrored_resnet
from involution.nn import Involution2d

Part = Literal["op", "layer", "inference", "training"]

_COPY = "copy of 1 GiB"
_SHAPES = ((128, 64, 56), (128, 128, 28), (128, 256, 14), (128, 512, 7))


def gpu(
    shapes: Sequence[tuple[int, int, int]] = _SHAPES,
    batches: Sequence[int] = (1, 32, 256),
    dtypes: Sequence[Literal["bfloat16", "float16", "float32"]] = ("bfloat16", "float32"),
    parts: Sequence[Part] = ("op", "layer", "inference", "training"),
    compiled: bool = True,
    out: Path = Path("runs/bench"),
) -> list[Row]:
    """Time operator, layer and networks on a GPU, by its own clock, with a cache swept before every measurement.

    Everything is recorded as a CUDA graph first, so that the time is that of the device and not of its processor.
    Networks are RedNet-50 and timm's ResNet-50, compiled; training steps are under autocast, for half types.

    Args:
        shapes: batch, channels and side of each input of operator and layer; the default is RedNet-50's.
        batches: batch sizes of inference; training takes the largest, up to 128.
        dtypes: of all tensors.
        parts: what to time, any of op, layer, inference and training.
        compiled: also time the compiled loop over taps.
        out: folder for gpu.csv, to which the rows are added.

    Raises:
        ValueError: if there is no GPU, or the arguments do not fit one another.
        RuntimeError: if the operator is wrong on this machine; nothing is timed then.
    """
    if not torch.cuda.is_available():
        raise ValueError("`bench gpu` needs a CUDA or ROCm device, and torch finds none. Nothing is measured.")
    if not (shapes and batches and dtypes and parts):
        raise ValueError("`shapes`, `batches`, `dtypes` and `parts` must hold at least one each.")
    record.check(out / "gpu.csv")
    here = record.here("cuda")
    rows: list[Row] = []

    def keep(found: list[Row]) -> None:
        record.add(found, out / "gpu.csv")  # at once: what follows takes minutes, and may be interrupted
        rows.extend(found)

    with functorch.patch(donated_buffer=False):  # else compiled code could not go backward through one graph twice
        for dtype in dtypes:
            for problem in problems(shapes, dtype=dtype):
                if "op" in parts:
                    keep(_operator(problem, compiled, here))
                if "layer" in parts:
                    keep(_layer(problem, here))
            for batch in batches if "inference" in parts else ():
                keep(_networks("inference compiled", batch, dtype, here))
            if "training" in parts:
                keep(_networks("training step compiled", min(128, max(batches)), dtype, here))
    print(f"\nrows added to {out / 'gpu.csv'}")
    for benchmark in dict.fromkeys(row.benchmark for row in rows):
        for quantity in (table.TIME, table.MEMORY):
            chosen = [row for row in rows if row.benchmark == benchmark]
            for kind in dict.fromkeys(row.dtype for row in chosen):
                text = table.against_base([row for row in chosen if row.dtype == kind], quantity)
                print(f"\n{benchmark}, {kind}\n\n{text}" if text else "")
    return rows


def _operator(problem: Problem, compiled: bool, here: dict[str, Any]) -> list[Row]:
    """Rows of the operator and of what it is compared with."""
    x, kernel, grad = problem.tensors("cuda")
    rivals = contenders.operators(x, kernel, compiled)
    check(rivals[contenders.OURS].run, x, kernel, grad)
    rows = []
    for direction in ("forward", "forward+backward"):
        _say(problem.shape, problem.dtype, direction)
        passes = PASSES[direction]
        for name, rival in rivals.items():
            run = timed(rival.run, x, rival.weight, grad, direction)
            moved = 2 * x.numel() + rival.weight.numel()  # each tensor read or written once a pass
            work = (2e-6 * passes * x.numel() * rival.macs, 1e-6 * passes * moved * x.element_size())
            figures = record.figures(_times(_graph(run)), *work, _peak_mib(run))
            rows.append(Row("op", name, contenders.OURS, direction, **problem.described(), **figures, **here))
        if direction == "forward":
            source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
            figures = record.figures(_times(partial(torch.empty_like(source).copy_, source)), 0.0, 2e-6 * 2**30)
            rows.append(Row("op", _COPY, contenders.OURS, direction, **problem.described(), **figures, **here))
    return rows


def _layer(problem: Problem, here: dict[str, Any]) -> list[Row]:
    """Rows of the layer, with its kernels generated on the chip and stored in memory, and with the unfold formula."""
    x, _, grad = problem.tensors("cuda")
    fused = Involution2d(problem.channels, problem.kernel_size, group_channels=problem.group_channels).to(x)
    stored = Involution2d(problem.channels, problem.kernel_size, group_channels=problem.group_channels, fused=False)
    stored.to(x).load_state_dict(fused.state_dict())
    layers: dict[str, nn.Module] = {"Involution2d": fused, "Involution2d, kernels stored": stored}
    layers["Involution2d, unfold formula"] = contenders.UnfoldInvolution2d(fused)
    parameters = {name: list(layer.parameters()) for name, layer in layers.items()}
    rows = []
    for direction in ("forward", "forward+backward"):
        _say("layer", problem.shape, problem.dtype, direction)
        for name, layer in layers.items():

            def forward(layer: nn.Module = layer) -> Tensor:
                with torch.no_grad():
                    return layer(x)

            def both(layer: nn.Module = layer, wanted: tuple[Tensor, ...] = (x, *parameters[name])) -> object:
                return torch.autograd.grad(layer(x), wanted, grad)

            run = forward if direction == "forward" else both
            figures = record.figures(_times(_graph(run)), 0.0, 0.0, _peak_mib(run))
            rows.append(Row("layer", name, "Involution2d", direction, **problem.described(), **figures, **here))
    return rows


def _networks(direction: str, batch: int, dtype: str, here: dict[str, Any]) -> list[Row]:
    """Rows of RedNet-50 and ResNet-50, one after the other, so that neither is in the other's memory."""
    rows = []
    for name, base in (("rednet50", "resnet50"), ("resnet50", "resnet50")):
        _say(name, batch, dtype, direction)
        torch._dynamo.reset()
        torch.manual_seed(0)
        network = (timm.create_model(name) if name == "rednet50" else mirrored_resnet(50)).cuda()
        images = torch.randn(batch, 3, 224, 224, device="cuda")
        number = getattr(torch, dtype)
        step = (_inference if direction.startswith("inference") else _training)(network, images, number)
        work = cost.macs(network.eval(), images[:1].to(next(network.parameters()))) * batch * 2e-6
        network.train(direction.startswith("training"))
        passes = 3 if direction.startswith("training") else 1
        replay = _graph(step)
        figures = record.figures(_times(replay), passes * work, 0.0, _peak_mib(step))
        shape = "x".join(map(str, images.shape))
        described: dict[str, Any] = {"shape": shape, "window": "", "dtype": dtype, "layout": "channels_last"}
        rows.append(Row("model", name, base, direction, **described, **figures, **here))
        del network, images, step, replay
    return rows


def _inference(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    network.eval().to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = images.to(dtype, memory_format=torch.channels_last)
    run = torch.compile(network, dynamic=False)

    def infer() -> object:
        with torch.no_grad():
            return run(images)

    return infer


def _training(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    network.train().to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (len(images),), device="cuda")
    run = torch.compile(network, dynamic=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, fused=True)

    def step() -> None:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _graph(run: Callable[[], object]) -> Callable[[], object]:
    """`run` recorded as a CUDA graph, which takes no time of the processor to start."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _times(run: Callable[[], object]) -> list[float]:
    """Milliseconds of each of many runs, by the device's clock; between them its cache is swept."""
    from triton.testing import do_bench

    times: list[float] = do_bench(run, warmup=20, rep=150, return_mode="all")
    return times


def _peak_mib(run: Callable[[], object]) -> float:
    """MiB by which one run raises the allocated memory, at its highest."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _say(*words: object) -> None:
    print("timing", *words, "...", file=sys.stderr, flush=True)
