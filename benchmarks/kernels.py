"""Every kernel as training launches it, compiled for a GPU that need not be present.

Nothing is launched: launchers are called with tensors on the meta device, and the arguments that
they pass to Triton are recorded. To add a kernel, add a call of its launcher to `calls`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from ghm_triton.ops import asl1, bce, density, focal, launch, softmax
from ghm_triton.ops.launch import MAX_PROGRAMS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TYPES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.uint8: "u8",
}

# Inputs of a detector: contiguous rows of 80 classes or 4 box deltas; and rows of 20 classes, which
# neither tiles nor wide accesses divide.
ROWS, CLASSES, FEW_CLASSES, DELTAS = 1 << 20, 80, 20, 4

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """A recorded launch: kernel, arguments by name, and options."""

    kernel: Any
    arguments: Arguments
    options: dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A launch that is measured.

    Args:
        launch: The kernel and its arguments.
        name: Name of the variant among those of its kernel.
        dtype: Dtype of the logits; empty for a kernel without logits.
        moved: Minimum traffic in bytes per element; 0 for a kernel that does not work on elements.
    """

    launch: Launch
    name: str
    dtype: str
    moved: float

    @property
    def key(self) -> str:
        """Kernel, variant and dtype as one word."""
        return ".".join(filter(None, (self.launch.kernel.__name__, self.name, self.dtype)))

    @property
    def entries(self) -> float:
        """Average number of elements per tile, as tiles overlap the edges; 0 without elements."""
        given = self.launch.arguments
        if not self.moved:
            return 0.0
        if "BLOCK" in given:
            return float(given["BLOCK"])
        cols, width = given["cols"], given["BLOCK_C"]
        return float(given["BLOCK_R"] * cols / triton.cdiv(cols, width))


# Name of the variant, bytes per element, launcher, its arguments.
Call = tuple[str, float, Callable[..., object], tuple[Any, ...]]


def calls(dtype: str) -> Iterator[Call]:
    """Yield the calls of every launcher that works on elements, as in training."""
    logits, few = (_empty(ROWS, cols, dtype=dtype) for cols in (CLASSES, FEW_CLASSES))
    labels, dense = _empty(ROWS, dtype="i64"), _empty(ROWS, CLASSES)
    table, scale, outer = _empty(30), _empty(), _empty()
    size = logits.itemsize
    for name, values, target, extra in (
        ("index", logits, labels, 8 / CLASSES),
        ("index20", few, labels, 8 / FEW_CLASSES),
        ("dense", logits, dense, 4.0),
    ):
        data, read = (values, target, None), size + extra
        weighed = (*data, table, scale, False, True)
        yield name, read, bce.launch_count, (*data, 30)
        yield name, read + size, bce.WEIGHTED_BCE.forward, (*weighed, True)
        if name != "index20":
            yield (
                name,
                read + size,
                focal.FOCAL.forward,
                (*data, scale, 0.25, 2.0, False, True, True),
            )
        if name == "index":
            # In float16 the gradient has a pass of its own.
            again = (*data, table, scale, outer, False)
            yield "gradient", read + size, bce.WEIGHTED_BCE.backward, again
            yield "", read, softmax.launch_count, (*data, 30)
            yield "", read + size, softmax.WEIGHTED_SOFTMAX.forward, (*weighed, True)

    pred, deltas, weight = (_empty(ROWS, DELTAS, dtype=dtype) for _ in range(3))
    pair, mu = (pred, deltas, weight), 0.02
    yield "", 3 * size, asl1.launch_count, (*pair, 10, mu)
    yield (
        "",
        4 * size,
        asl1.WEIGHTED_ASL1.forward,
        (*pair, _empty(10), scale, mu, False, True, True),
    )
    yield "", 2 * size, launch.scale_gradient, (logits, outer)


def state_calls() -> Iterator[Call]:
    """Yield the calls of launchers without logits."""
    counts = (_empty(30, dtype="i64"), _empty(MAX_PROGRAMS, dtype="fp64"), _empty(dtype="i64"))
    state = (_empty(30), _empty(dtype="i64"), _empty())
    for ema in ("debiased", "mmdet"):
        options: tuple[Any, ...] = (0.75, ema, "valid_bins", None, True, "positives", 1.0)
        yield ema, 0.0, density.launch_density, (*counts, *state, *options)
    yield "", 0.0, launch.sum_partials, (_empty(MAX_PROGRAMS), _empty())


def _empty(*shape: int, dtype: str = "fp32") -> Tensor:
    return torch.empty(shape, dtype=_NAMES[dtype], device="meta")


_NAMES = {name: dtype for dtype, name in TYPES.items()}


def variants(dtypes: list[str]) -> Iterator[Variant]:
    """Yield every variant of every kernel."""
    for dtype in dtypes:
        for name, moved, launcher, arguments in calls(dtype):
            yield Variant(first_launch(launcher, *arguments), name, dtype, moved)
    for name, moved, launcher, arguments in state_calls():
        yield Variant(first_launch(launcher, *arguments), name, "", moved)


def first_launch(launcher: Callable[..., object], *arguments: Any) -> Launch:
    """Record the first launch of a call; no kernel runs.

    Raises:
        ValueError: It launches none.
    """
    found: list[Launch] = []

    def write_down(kernel: Any, *positional: Any, **named: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        given = dict(zip(names, positional, strict=False))
        given |= {name: named.pop(name) for name in names if name in named}
        options = {name: v for name, v in named.items() if name not in ("grid", "warmup")}
        found.append(Launch(kernel, given, options))

    with mock.patch.object(JITFunction, "run", write_down):
        launcher(*arguments)
    if not found:
        raise ValueError(f"{launcher.__name__} launches nothing")
    return found[0]


@dataclass(frozen=True)
class Specialisation:
    """Types, constants and attributes of the arguments, as passed to the compiler."""

    types: dict[str, str]
    constants: Arguments
    attributes: dict[tuple[int, ...], list[list[Any]]]


def specialise(launch: Launch) -> Specialisation:
    """Specialise as a launch does: 1 and None are constants, divisibility by 16 is an attribute."""
    told = Specialisation({}, {}, {})
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        whole = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (whole and value == 1):
            told.types[name], told.constants[name] = "constexpr", value
            continue
        told.types[name] = _type(value)
        if isinstance(value, Tensor) or (whole and value % 16 == 0):
            told.attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return told


def _type(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def build(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """Compile as the launch would, with tensors aligned to 16 bytes, as torch allocates them."""
    told = specialise(launch)
    source = ASTSource(launch.kernel, told.types, told.constants, told.attributes)
    return triton.compile(source, target=target, options=launch.options)
