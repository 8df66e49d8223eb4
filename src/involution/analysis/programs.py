"""What the Triton programs compile to, without a GPU: registers, spills, shared memory, instructions an output."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from involution.analysis import table
from involution.ops import generated as generating
from involution.ops import programs as given
from involution.ops import triton as implementation

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.int32: "i32",
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
_SOURCES: dict[ModuleType, tuple[str, ...]] = {
    given: ("slide", "products", "slide_tile", "products_tile"),
    generating: ("generated_strip", "generated_grad_x_strip", "generated_grad_kernel_tile"),
}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Launch:
    """A call of a program, as the implementation made it."""

    program: Any
    blocks: int
    arguments: tuple[Any, ...]
    settings: dict[str, Any]

    @property
    def turns(self) -> int:
        """How often the loop over the rows of a strip runs; in a program without one, 0."""
        names = dict(zip(self.program.arg_names, self.arguments, strict=False))
        if "height" not in names:
            return 0
        by_row = self.program.__name__ == "generated_grad_x_strip"
        return names["height"] + self.settings["K_Y"] - 1 if by_row else -(-names["height"] // 2)

    def compile(self, target: GPUTarget) -> CompiledKernel:
        """Compile for `target` with what Triton would know of the arguments there."""
        names = self.program.arg_names
        settings = dict(self.settings)
        if target.backend == "hip" and settings.get("PRECISION") == "tf32x3":
            settings["PRECISION"] = "ieee"  # as the implementation asks for there
        options = {"num_warps": settings.pop("num_warps")}
        signature, constants, attributes = {}, dict(settings), {}
        for index, (name, value) in enumerate(zip(names, self.arguments, strict=False)):
            if isinstance(value, Tensor):
                signature[name] = "*" + _TYPES[value.dtype]
            elif value == 1 and name not in self.program.do_not_specialize:
                constants[name] = 1
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = isinstance(value, Tensor) or (value % 16 == 0 and name not in self.program.do_not_specialize)
            if name in signature and aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        ordered = {name: signature[name] for name in names}
        code = ASTSource(fn=self.program, signature=ordered, constexprs=constants, attrs=attributes)
        return triton.compile(code, target=target, options=options)


@dataclass(frozen=True)
class Compiled:
    """What came out for one program and target.

    `instructions` are thread instructions for each output element and exist only where they can be counted: in a
    program for an NVIDIA GPU without loops, or with one over the rows of a strip.
    """

    program: str
    direction: str
    target: str
    shape: str
    dtype: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    widest_load_bytes: int
    instructions: float | None


def programs(
    targets: Sequence[Literal["sm_80", "sm_90", "gfx942"]] = ("sm_80", "sm_90", "gfx942"),
    dtypes: Sequence[Literal["bfloat16", "float16", "float32"]] = ("bfloat16", "float16", "float32"),
    out: Path = Path("runs/bench"),
) -> list[Compiled]:
    """Compile the programs that RedNet-50 calls for GPUs that need not be here, and tell what came out.

    Args:
        targets: sm_80 (A100), sm_90 (H100, H200) and gfx942 (MI300).
        dtypes: of all tensors.
        out: folder for programs.csv, which is written anew.
    """
    found = []
    for target in targets:
        for dtype in dtypes:
            print(f"compiling for {target}, {dtype} ...", file=sys.stderr, flush=True)
            for shape, outputs, launch in rednet50(getattr(torch, dtype)):
                if not launch.program.__name__.startswith("generated") or TARGETS[target].backend == "cuda":
                    found.append(inspect(launch, target, outputs, shape))
    out.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(Compiled)]
    with (out / "programs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in found)
    print(f"\nwritten to {out / 'programs.csv'}\n")
    print(table.markdown([names, *(["-" if cell is None else str(cell) for cell in astuple(row)] for row in found)]))
    return found


def launches(call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` would make; its tensors may be on the meta device, as nothing runs."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, program: Any) -> None:
            self.program = program

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(*arguments: Any, **settings: Any) -> None:
                found.append(Launch(self.program, grid[0], arguments, settings))

            return launch

    with _replaced(Recorder):
        call()
    return found


@contextmanager
def _replaced(recorder: Callable[[Any], Any]) -> Iterator[None]:
    patches = [
        patch.object(source, name, recorder(getattr(source, name)))
        for source, names in _SOURCES.items()
        for name in names
    ]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def inspect(launch: Launch, target: str, outputs: int, shape: str) -> Compiled:
    """Compile `launch` for `target` and read what came out; `outputs` are the elements that all blocks write."""
    kernel = launch.compile(TARGETS[target])
    name, reads_gradient = launch.program.__name__, launch.settings.get("TRANSPOSED", False)
    direction = "gradient of x" if reads_gradient or "grad_x" in name else "forward"
    if "products" in name or "grad_kernel" in name:
        direction = "gradient of kernel"
    dtype = str(launch.arguments[0].dtype).removeprefix("torch.")
    if TARGETS[target].backend == "hip":
        text = kernel.asm["amdgcn"]
        found = [int(re.findall(rf"\.{field}:\s+(\d+)", text)[-1]) for field in ("vgpr_count", "vgpr_spill_count")]
        widest = max((4 * int(n) for n in re.findall(r"(?:global|buffer)_load_dwordx(\d)", text)), default=4)
        return Compiled(
            name, direction, target, shape, dtype, found[0], 4 * found[1], kernel.metadata.shared, widest, None
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage, code = (_tool(option, file.name) for option in ("-res-usage", "-sass"))
    registers, stack = (int(re.findall(rf"{field}:(\d+)", usage)[-1]) for field in ("REG", "STACK"))
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", code)
    wide = r"^LDG(?:STS)?\.E(?:\.\w+)*?\.(32|64|128)"
    widths = [int(n) // 8 for _, op, _ in instructions for n in re.findall(wide, op)]
    threads = launch.blocks * 32 * launch.settings["num_warps"]
    issued = _issued(instructions, launch.turns)
    counted = None if issued is None else round(issued * threads / outputs, 1)
    shared, widest = kernel.metadata.shared, max(widths, default=4)
    return Compiled(name, direction, target, shape, dtype, registers, stack, shared, widest, counted)


def _issued(instructions: list[tuple[str, str, str]], turns: int) -> int | None:
    """How many instructions a warp runs through, whose only loop it runs through `turns` times; None if unknown."""
    work = [(int(at, 16), op, rest) for at, op, rest in instructions if not op.startswith("NOP")]
    loops = [
        (start, at)
        for at, op, rest in work
        # The last instruction of a program branches to itself.
        if op.startswith("BRA")
        and (goal := re.search(r"0x([0-9a-f]+)", rest))
        and (start := int(goal.group(1), 16)) < at
    ]
    if len(loops) != (1 if turns else 0):
        return None
    inside = sum(start <= at <= end for start, end in loops for at, _, _ in work)
    return len(work) + inside * (turns - 1)


def _tool(option: str, file: str) -> str:
    return subprocess.run([_TOOLS / "cuobjdump", option, file], capture_output=True, text=True, check=True).stdout


def rednet50(dtype: torch.dtype, batch: int = 128) -> Iterator[tuple[str, int, Launch]]:
    """Shape of outputs, elements written and launches of programs where RedNet-50 calls them, in channels-last layout.

    Of launches that differ in nothing that is compiled, the first.
    """
    seen = set()
    shapes = [(64, 56, 1), (128, 28, 1), (256, 14, 1), (512, 7, 1), (128, 28, 2), (256, 14, 2), (512, 7, 2)]
    for channels, side, stride in shapes:
        groups, window = channels // 16, ((stride, stride), (3, 3), (1, 1))

        def tensor(width: int, side: int = side) -> Tensor:
            empty = torch.empty(batch, width, side, side, dtype=dtype, device="meta")
            return empty.to(memory_format=torch.channels_last)

        x, y, kernel = tensor(channels, side * stride), tensor(channels), tensor(groups * 49)
        kernel = kernel.unflatten(1, (groups, 7, 7))
        weight = torch.empty(groups * 49, channels // 4, dtype=dtype, device="meta")
        span = (tensor(channels // 4), weight, weight[:, 0].contiguous())
        calls: list[tuple[Tensor, Callable[[], None]]] = [
            (y, partial(implementation.forward, y, x, kernel, *window)),
            (x, partial(implementation.grad_x, x, y, kernel, *window)),
            (y, partial(implementation.grad_kernel, kernel, y, x, *window)),
            (y, partial(implementation.generated, y, x, *span, (7, 7), *window)),
            (x, partial(implementation.generated_grad_x, x, y, *span, (7, 7), *window)),
            (y, partial(implementation.grad_span, span, y, x, *span[:2], (7, 7), *window)),
        ]
        for written, call in calls:
            for launch in launches(call):
                compiled = (launch.program, *sorted((name, str(value)) for name, value in launch.settings.items()))
                if compiled not in seen:
                    seen.add(compiled)
                    label = "x".join(map(str, y.shape)) + (f", stride {stride}" if stride > 1 else "")
                    yield label, written.numel(), launch
