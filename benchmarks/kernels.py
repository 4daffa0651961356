"""Every kernel as training launches it, and how to compile one for a GPU that need not be here.

To add a kernel, add a line to `variants`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ghm_triton.ops.asl1 import asl1_backward_kernel, asl1_forward_kernel
from ghm_triton.ops.bce import bce_backward_kernel, bce_forward_kernel
from ghm_triton.ops.binning import count_asl1_kernel, count_bce_kernel
from ghm_triton.ops.density import density_kernel
from ghm_triton.ops.tiles import MAX_BLOCK_C, MAX_PROGRAMS, OPTIONS, TILE, sum_partials_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

# What a detector passes: contiguous rows of 80 classes, or of 4 box deltas.
CLASSES, DELTAS, ROWS = 80, 4, 1 << 20
CLASS_TILE = {"BLOCK_R": TILE // MAX_BLOCK_C, "BLOCK_C": MAX_BLOCK_C}
DELTA_TILE = {"BLOCK_R": TILE // DELTAS, "BLOCK_C": DELTAS}

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A kernel and the arguments of one launch.

    Args:
        kernel: The `triton.jit` function.
        name: What sets this variant apart from the others of its kernel.
        dtype: Of the logits; empty for a kernel that no logit passes through.
        arguments: By name: the value of a number or of a constexpr; of a pointer its type, or None
            where none is passed.
        moved: Bytes an element that must pass between memory and the GPU.
        entries: Elements of a program's tile; 0 for a kernel that does not work on elements.
    """

    kernel: Any
    name: str
    dtype: str
    arguments: Arguments
    moved: float = 0.0
    entries: int = 0

    @property
    def key(self) -> str:
        """The kernel, the variant and the dtype, as one word."""
        return ".".join(filter(None, (self.kernel.__name__, self.name, self.dtype)))


def variants(dtype: str) -> Iterator[Variant]:
    """Every kernel at one dtype of logits, `fp32`, `fp16` or `bf16`."""
    size, pointer = BYTES[dtype], f"*{dtype}"
    logits: Arguments = {
        "logits_ptr": pointer,
        "rows": ROWS,
        "cols": CLASSES,
        **_strides("logits", CLASSES),
    }
    shared = {**logits, **_absent("weight"), **CLASS_TILE, "BINS": 30}
    index = {**shared, "INDEX": True, "target_ptr": "*i64", "target_row": 1, "target_col": 0}
    dense = {**shared, "INDEX": False, "target_ptr": "*fp32", **_strides("target", CLASSES)}
    counts: Arguments = {"counts_ptr": "*i64", "positives_ptr": "*fp64", "BLOCK_BINS": 32}
    loss: Arguments = {
        "table_ptr": "*fp32",
        "scale_ptr": "*fp32",
        "WEIGHTED": False,
        "REDUCE": True,
    }
    forward = {**loss, "out_ptr": "*fp32"}
    backward = {**loss, "grad_loss_ptr": "*fp32", "gradient_ptr": pointer}
    backward |= {"grad_loss_row": 0, "grad_loss_col": 0}
    for name, common, target in (("index", index, 8 / CLASSES), ("dense", dense, 4)):
        both = {**common, **backward, **_strides("gradient", CLASSES)}
        read = size + target
        yield Variant(count_bce_kernel, name, dtype, common | counts, read, TILE)
        yield Variant(bce_forward_kernel, name, dtype, common | forward, read, TILE)
        yield Variant(bce_backward_kernel, name, dtype, both, read + size, TILE)

    deltas: Arguments = {"pred_ptr": pointer, "target_ptr": pointer, "weight_ptr": "*fp32"}
    deltas |= {"rows": ROWS, "cols": DELTAS, "MU": 0.02, "BINS": 10, **DELTA_TILE}
    deltas |= {k: v for n in ("pred", "target", "weight") for k, v in _strides(n, DELTAS).items()}
    counts |= {"BLOCK_BINS": 16}
    both = {**deltas, **backward, **_strides("gradient", DELTAS)}
    read = 2 * size + 4
    yield Variant(count_asl1_kernel, "", dtype, deltas | counts, read, TILE)
    yield Variant(asl1_forward_kernel, "", dtype, deltas | forward, read, TILE)
    yield Variant(asl1_backward_kernel, "", dtype, both, read + size, TILE)


def state_variants() -> Iterator[Variant]:
    """The kernels that no logit passes through."""
    density: Arguments = dict.fromkeys(("regions_ptr", "invalid_ptr", "updates_ptr"), "*i64")
    density |= dict.fromkeys(("smoothed_ptr", "strength_ptr", "weights_ptr", "scale_ptr"), "*fp32")
    density |= {"positives_ptr": "*fp64", "sums": MAX_PROGRAMS, "factor": 1.0}
    density |= {"BINS": 30, "BLOCK_BINS": 32, "BLOCK_SUMS": MAX_PROGRAMS, "VALID_BINS": True}
    density |= {"MOMENTUM": 0.75, "LOG_MOMENTUM": -0.2877, "MAX_WEIGHT": None, "PERSIST": True}
    density |= {"DIVISOR": "positives"}
    for ema in ("debiased", "mmdet"):
        yield Variant(density_kernel, ema, "", {**density, "DEBIASED": ema == "debiased"})
    partials: Arguments = dict.fromkeys(("partials_ptr", "scale_ptr", "total_ptr"), "*fp32")
    partials |= {"count": MAX_PROGRAMS, "BLOCK": MAX_PROGRAMS}
    yield Variant(sum_partials_kernel, "", "", partials)


def _strides(name: str, cols: int) -> Arguments:
    return {f"{name}_row": cols, f"{name}_col": 1}


def _absent(name: str) -> Arguments:
    return {f"{name}_ptr": None, f"{name}_row": 0, f"{name}_col": 0}


@dataclass(frozen=True)
class Specialisation:
    """What the compiler is told of each argument."""

    types: dict[str, str]
    constants: Arguments
    attributes: dict[tuple[int, ...], list[list[Any]]]


def specialise(variant: Variant) -> Specialisation:
    """As a launch does it: 1 and None are compiled in, multiples of 16 are told.

    Raises:
        ValueError: The kernel has an argument that the variant does not name.
    """
    told = Specialisation({}, {}, {})
    for parameter in variant.kernel.params:
        name = parameter.name
        if name not in variant.arguments:
            raise ValueError(f"{variant.key} lacks the argument {name}: name it in {__name__}")
        value = variant.arguments[name]
        whole = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (whole and value == 1):
            told.types[name], told.constants[name] = "constexpr", value
            continue
        told.types[name] = value if isinstance(value, str) else _number(value)
        if isinstance(value, str) or (whole and value % 16 == 0):
            told.attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return told


def _number(value: float) -> str:
    return "i32" if isinstance(value, int) else "fp32"


def build(variant: Variant, target: GPUTarget) -> CompiledKernel:
    """Compile as a launch with these arguments would."""
    told = specialise(variant)
    source = ASTSource(variant.kernel, told.types, told.constants, told.attributes)
    return triton.compile(source, target=target, options=dict(OPTIONS))
